"""How much memory a call needs at its highest, on a GPU or a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Linux: writing "5" to the first puts the second's VmHWM, the process's highest memory, back to what it is now.
RESET, STATUS = "/proc/self/clear_refs", "/proc/self/status"


@dataclass
class Peak:
    """``bytes`` above what was held at the start, at the highest; ``None`` where the system does not tell."""

    bytes: int | None = None


@contextmanager
def high_water() -> Iterator[Peak]:
    """Measure what is done inside, at no cost to its speed: the GPU's memory, or else the process's.

    The process's memory is what the system counts of it (Linux): all of its pages, not tensors alone. What its
    allocator had kept of memory that was freed before is given back first.
    """
    peak = Peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.bytes = int(torch.cuda.max_memory_allocated()) - before
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc only
    held = _reset()
    yield peak
    if held is not None:
        peak.bytes = max(_status("VmHWM") - held, 0)


def _reset() -> int | None:
    """Put the process's highest memory back to what it holds now, in bytes; ``None`` where that cannot be done."""
    try:
        with open(RESET, "w", encoding="ascii") as file:
            file.write("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(key: str) -> int:
    with open(STATUS, encoding="ascii", errors="replace") as file:
        line = next(line for line in file if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


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
    if torch.cuda.is_available():
        with high_water() as peak:
            call()
        return peak.bytes or 0
    with LiveBytes() as live:
        call()
    return int(live.peak)
