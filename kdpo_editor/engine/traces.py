"""What happened during edits: their cycles, losses and steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Cycle:
    """One cycle of one edit.

    ``rejected``: its rejected answer, ``T`` token ids. ``losses``: before each step and, where the cycle ended by it,
    below ``stop_loss``, in nats. ``steps``: optimiser steps taken.
    """

    rejected: list[int]
    losses: list[float]
    steps: int


@dataclass
class EditTrace:
    """What happened during one edit.

    ``cycles``: those that began with an unfinished edit. ``converged``: whether every answer position ended up as the
    argmax, by whatever margin. Where an edit is trained in several phrasings, ``cycles`` are those of its
    prompt, and ``converged`` is about all of them.
    """

    cycles: list[Cycle] = field(default_factory=list)
    converged: bool = False

    @property
    def steps(self) -> int:
        """Optimiser steps taken."""
        return sum(cycle.steps for cycle in self.cycles)


def cycles_of(rejected: Sequence[list[int]], history: Sequence[Tensor], stop_loss: float) -> list[Cycle]:
    """The cycle of each of ``B`` edits: their rejected answers, and the losses ``[B]`` of every step."""
    cycles = []
    for answer, losses in zip(rejected, torch.stack(list(history)).T.tolist(), strict=True):
        taken = next((n for n, loss in enumerate(losses) if loss < stop_loss), len(losses))
        cycles.append(Cycle(answer, losses[: taken + 1], taken))
    return cycles
