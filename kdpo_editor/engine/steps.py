"""One cycle's optimiser steps on mini-batches of preference pairs.

On a CPU the host reads each loss before it decides on a step. On a GPU it never waits: what should not be done is
masked there, so the kernels of a step are always the same, and with ``cuda_graphs`` they are recorded once and
replayed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import EditDiverged
from ..hparams import KDPOHyperParams
from .cached_forward import CachedForward
from .optimizers import Stepper

# Edits from which on another attention pays.
MATH_ATTENTION_FROM = 8


class Trainable(Protocol):
    """What steps are taken on: a batch of preference pairs, or the ablation's pair of a free answer."""

    history: list[Tensor]

    @property
    def forward(self) -> CachedForward:
        """Where it was captured."""

    @property
    def members(self) -> list[int]:
        """The position of each of its ``B`` edits in the list of edits."""

    def losses(self, hparams: KDPOHyperParams) -> Tensor:
        """The loss of each edit, ``[B]``."""


def run_cycle(minibatches: Sequence[Sequence[Trainable]], stepper: Stepper, hparams: KDPOHyperParams) -> None:
    """Take up to ``num_steps`` steps on each mini-batch, in turn; their losses are added to each ``history``.

    A mini-batch is over before a step for which every loss is below ``stop_loss``.
    """
    going = [Steps(some, stepper, hparams) for some in minibatches]
    for _ in range(hparams.num_steps):
        going = [steps for steps in going if steps.take()]
    check_finite(torch.stack(current.history).flatten().tolist() for current in chain(*minibatches))


class Steps:
    """Of ``work``, which shares each step; an edit whose loss is below ``stop_loss`` has no part in it."""

    def __init__(self, work: Sequence[Trainable], stepper: Stepper, hparams: KDPOHyperParams) -> None:
        self.work, self.stepper, self.hparams = work, stepper, hparams
        forward = work[0].forward
        self.waits = host_waits(forward.device, hparams.optimizer)
        # Not a method bound to this, which would keep the work in memory until garbage is collected.
        self._recorded = Recorded() if are_recorded(forward, hparams) else None

    def take(self) -> bool:
        """One step. Returns whether there was anything to do, as far as the host knows."""
        if not self.waits:
            found = self._unseen() if self._recorded is None else self._recorded(self._unseen)
            for current, losses in zip(self.work, found, strict=True):
                current.history.append(losses)
            return True
        going = False
        for current in self.work:
            losses, loss, live = self._losses(current)
            current.history.append(losses)
            check_finite([losses.tolist()])
            if remaining := int(live.sum()):
                self.stepper.gather(loss, remaining)
                going = True
        if going:
            self.stepper.step()
        return going

    def _unseen(self) -> list[Tensor]:
        found, lives = [], []
        for current in self.work:
            losses, loss, live = self._losses(current)
            self.stepper.gather(loss)
            found.append(losses)
            lives.append(live)
        self.stepper.step(skip=~torch.cat(lives).any())
        return found

    def _losses(self, current: Trainable) -> tuple[Tensor, Tensor, Tensor]:
        """Those of one batch, ``[B]`` without graph; what is minimised; and which of its edits have a part in it.

        Batches are gone through one by one, so that the graph of one is all that is held.
        """
        with _attention(self.work):
            losses = current.losses(self.hparams)
        live = losses.detach() >= self.hparams.stop_loss
        # The sum over edits: no optimiser here minds its scale, and one edit stays exactly the paper's.
        return losses.detach(), (losses * live).sum(), live


class Recorded:
    """A step that is recorded as a CUDA graph, and replayed from then on.

    The first step of a cycle may be another than the rest, and the second loads whatever kernels are not loaded yet;
    so the third is the one recorded. ``step`` must read and write the same memory each time and never wait for the
    device, and what it differentiates must have been computed in :func:`recording`.
    """

    EAGER = 2

    def __init__(self) -> None:
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.found: list[Tensor] = []

    def __call__(self, step: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What ``step``, the same each time, gives, in memory of its own."""
        self.calls += 1
        if self.calls <= self.EAGER:
            return step()
        if self.graph is None:
            self.graph, self.found = self._record(step)
        self.graph.replay()
        return [losses.clone() for losses in self.found]

    def _record(self, step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        # As torch.cuda.graph does, but that it collects garbage first, which takes longer than an edit. Here that
        # waits: memory of the device that is freed during a recording ends it.
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()
        try:
            graph.capture_begin()
            try:
                found = step()
            finally:
                graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return graph, found


def are_recorded(forward: CachedForward, hparams: KDPOHyperParams) -> bool:
    """Whether steps are recorded as CUDA graphs, which are of one device's kernels."""
    if not hparams.cuda_graphs or forward.device.type != "cuda":
        return False
    return len({p.device for p in forward.model.parameters()}) == 1


@contextmanager
def recording(forward: CachedForward, hparams: KDPOHyperParams) -> Iterator[None]:
    """A stream of its own where steps are recorded, which the default stream cannot be. A backward pass runs in the
    streams of its forward, and a weight's gradient goes to the one in which the weight was first seen."""
    if not are_recorded(forward, hparams):
        yield
        return
    outside, inside = torch.cuda.current_stream(forward.device), torch.cuda.Stream(forward.device)
    inside.wait_stream(outside)
    try:
        with torch.cuda.stream(inside):
            yield
    finally:
        outside.wait_stream(inside)


def host_waits(device: torch.device, optimizer: str) -> bool:
    """Whether losses are read as they come; on a GPU, steps that should not be taken are masked there instead.

    Polyak's one or two steps of a cycle are not worth computing all of its steps.
    """
    return device.type != "cuda" or optimizer == "polyak"


def check_finite(losses: Iterable[Iterable[float]]) -> None:
    """Raise :class:`~kdpo_editor.EditDiverged` where a loss is NaN or infinite."""
    for loss in chain(*losses):
        if not isfinite(loss):
            raise EditDiverged(f"the loss became {loss}")


def _attention(work: Sequence[Trainable]) -> AbstractContextManager[None]:
    """Torch's fused attention takes four times as long backwards as its plain one on a CPU in half precision.

    For a few edits that is not much. A refresh is left to the model's own.
    """
    weight = next(work[0].forward.module.parameters())
    slow = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
    many = sum(len(current.members) for current in work) >= MATH_ATTENTION_FROM
    return sdpa_kernel(SDPBackend.MATH) if slow and many else nullcontext()
