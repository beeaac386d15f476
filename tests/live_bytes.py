"""How much memory a call's tensors need at their highest: exact to the byte on a CPU, where the call takes longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensor storages made inside and still alive; ``peak`` is their highest."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.held = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                storage = t.untyped_storage()
                _, before = self.storages.get(storage.data_ptr(), (None, 0))
                self.storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
                self.held += storage.nbytes() - before
        if self.held > self.peak:  # some of it may be gone by now
            self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
            self.held = sum(size for _, size in self.storages.values())
            self.peak = max(self.peak, self.held)
        return result


def peak_bytes(call: Callable[[], Any]) -> int:
    """Memory of tensors above what was held before, at its highest: exact to the byte, but ``call`` takes longer."""
    with LiveBytes() as live:
        call()
    return int(live.peak)
