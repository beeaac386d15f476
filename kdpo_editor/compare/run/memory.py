"""How much memory a call needs at its highest, on a GPU or a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn

# Linux: writing "5" to the first puts the second's VmHWM, the process's highest memory, back to what it is now.
RESET, STATUS = "/proc/self/clear_refs", "/proc/self/status"


@dataclass
class Peak:
    """``bytes`` above what was held at the start, at the highest, and ``total``, with it: what the machine must have.

    ``None`` where the system does not tell.
    """

    bytes: int | None = None
    total: int | None = None


def gpus_of(model: nn.Module) -> set[torch.device]:
    """The GPUs that parameters of ``model`` are on."""
    return {p.device for p in model.parameters() if p.device.type == "cuda"}


def wait_for(gpus: Collection[torch.device]) -> None:
    """Wait until ``gpus`` have done what they were told."""
    for gpu in gpus:
        torch.cuda.synchronize(gpu)


@contextmanager
def high_water(gpus: Collection[torch.device]) -> Iterator[Peak]:
    """Measure what is done inside, at no cost to its speed: the memory of ``gpus``; of the process if there are none.

    The process's memory is what the system counts of it (Linux): all of its pages, not tensors alone. What its
    allocator had kept of memory that was freed before is given back first.
    """
    peak = Peak()
    if gpus:
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        before = sum(torch.cuda.memory_allocated(gpu) for gpu in gpus)
        yield peak
        peak.total = sum(int(torch.cuda.max_memory_allocated(gpu)) for gpu in gpus)
        peak.bytes = peak.total - before
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc only
    held = _reset()
    yield peak
    if held is not None:
        peak.total = _status("VmHWM")
        peak.bytes = max(peak.total - held, 0)


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
