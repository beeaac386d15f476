"""What only the PyPI form needs, and what can go with it: its MEMIT and its devices."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def mend_memit() -> None:
    """Let MEMIT trace blocks that return a tensor where they returned a tuple before transformers 4.56."""
    compute_z: Any = importlib.import_module("easyeditor.models.memit.compute_z")
    nethook = compute_z.nethook

    class TraceDict(nethook.TraceDict):  # type: ignore[misc, name-defined]
        """Shows a block's output as a tuple, to the function that edits it and to whoever reads it afterwards."""

        def __init__(self, *args: Any, edit_output: Callable[..., Any], **kwargs: Any) -> None:
            def edit(output: Any, layer: str) -> Any:
                if not isinstance(output, torch.Tensor):
                    return edit_output(output, layer)
                return edit_output((output,), layer)[0]

            super().__init__(*args, edit_output=edit, **kwargs)

        def __getitem__(self, layer: str) -> Any:
            trace = super().__getitem__(layer)
            if isinstance(trace.output, torch.Tensor):
                return SimpleNamespace(output=(trace.output,))
            return trace

    compute_z.nethook = SimpleNamespace(**{**vars(nethook), "TraceDict": TraceDict})


# Devices ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_device(hparams: Any) -> Iterator[None]:
    """Let the PyPI form, which knows CUDA indices only, work where ``hparams.device`` says.

    Inside, ``hparams.device`` is an index; where that stands for a CPU, tensors that are sent to CUDA stay.
    """
    given = getattr(hparams, "device", None)
    index = _cuda_index(given)
    hparams.device = index or 0
    try:
        with _StayOnCPU() if index is None else contextlib.nullcontext():
            yield
    finally:
        hparams.device = given


def _cuda_index(device: Any) -> int | None:
    """The CUDA index that an EasyEdit ``device`` means, or ``None`` for the CPU."""
    if device is None:
        return 0 if torch.cuda.is_available() else None
    if isinstance(device, int) or str(device).isdigit():
        return int(device)
    device = torch.device(device)
    return None if device.type == "cpu" else device.index or 0


def on_its_device(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of ``BaseEditor`` that works where its settings say; see :func:`on_device`."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        hparams = self.hparams if "hparams" in self.__dict__ else (args[0] if args else kwargs["hparams"])
        with on_device(hparams):
            return method(self, *args, **kwargs)

    return wrapped


class _StayOnCPU(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        elif func is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(a) else a for a in args)
        elif func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)


def _is_cuda(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
