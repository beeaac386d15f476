"""Which edits share a mini-batch and a batch, so that what they take stays within a budget, and how they are padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..requests.tokens import EditTokens
from .upper_part import UpperPart

# A mini-batch runs in so many batches at most, none smaller than this: a matrix product of few rows is slow.
MOST_PARTS = 4
SMALLEST_PART = 16


def group(
    forward: UpperPart, edits: Sequence[EditTokens], budget: float, size: Footprint | None = None
) -> tuple[list[list[list[int]]], float]:
    """The positions of ``edits`` in mini-batches that fit into ``budget`` bytes, alike in length; each in its batches.

    Half of the budget is for what is held of a mini-batch: captured inputs, in the model's dtype, and keys and values.
    A quarter is for the graph of a batch while it takes a step, and as much for two tables of its logits, in fp32,
    while it is refreshed. A mini-batch of many is divided, so that short edits are not padded to the length of long
    ones, and so that each batch's share suffices. One edit is always taken, whatever it needs; of no edits there are no
    mini-batches.

    Args:
        forward: what they run on.
        edits: token ids.
        budget: bytes.
        size: what a token takes; ``None`` where no steps are taken.

    Returns:
        The mini-batches, and the share of the room for graphs that an edit's graph takes.
    """
    weight = next(p for p in forward.module.parameters() if p.ndim > 1)
    vocabulary = forward.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    size = size or Footprint()
    a_token = sum(weight.shape[-2:]) * weight.element_size()
    lengths = [edit.length for edit in edits]
    before = [first_trained(edit, forward) if size.frozen else 0 for edit in edits]
    copies = held_of_each(edits)
    groups: list[list[int]] = []
    longest, most_before = 0, 0  # of the last group
    # What is run of them alike in length first, since that is what is padded in every step.
    for i in sorted(range(len(edits)), key=lambda i: (lengths[i] - before[i], lengths[i])):
        longest, most_before = max(longest, lengths[i]), max(most_before, before[i])
        a_row = copies * (longest * a_token + most_before * size.prefix)
        if groups and (len(groups[-1]) + 1) * a_row <= budget / 2:
            groups[-1].append(i)
        else:
            groups.append([i])
            longest, most_before = lengths[i], before[i]

    def steps(i: int) -> float:
        """The bytes of one edit's graph."""
        return size.graph * (lengths[i] - before[i])

    def most(members: Sequence[int]) -> float:
        logits = max(len(edits[i].chosen) for i in members) * vocabulary * 8
        return len(members) * max(*map(steps, members), logits) if members else 0.0

    parts = [_divided(members, lambda part: most(part) <= budget / 4) for members in groups]
    whole = sum(map(steps, range(len(edits))))
    return parts, whole / (budget / 4) / max(1, len(edits))


def held_of_each(edits: Sequence[EditTokens]) -> float:
    """How often what was captured of each of ``edits`` is held: once, and a copy of those that are trained at a time.

    That is one phrasing of each request, and a :data:`SMALLEST_PART` at least. Of keys and values the copy is the one
    that attention reads.
    """
    requests = sum(not edit.request for edit in edits)
    return 1 + min(1.0, max(SMALLEST_PART, requests) / max(1, len(edits)))


def _divided(members: list[int], fits: Callable[[list[int]], bool]) -> list[list[int]]:
    """``members`` in at most ``MOST_PARTS`` parts alike in size, none of them small, or in as many as must be."""
    parts = max(1, min(MOST_PARTS, len(members) // SMALLEST_PART))
    while True:
        size = -(-len(members) // parts)
        found = [members[start : start + size] for start in range(0, len(members), size)]
        if size == 1 or all(map(fits, found)):
            return found
        parts += 1


def padded(edits: Sequence[EditTokens]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids ``[B, L]``, answers ``[B, T]``, their mask ``[B, T]`` and where they are predicted ``[B, T]``."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([e.sequence for e in edits], batch_first=True)
    chosen = pad([e.chosen for e in edits], batch_first=True)
    mask = pad([torch.ones(len(e.chosen), dtype=torch.bool) for e in edits], batch_first=True)
    positions = pad([torch.arange(len(e.prompt) - 1, e.length) for e in edits], batch_first=True)
    return ids, chosen, mask, positions


def trained_tokens(edits: Sequence[EditTokens], forward: UpperPart, length: int | None = None) -> Tensor | None:
    """Which tokens weights are trained through, ``[B, L]`` bool; ``None`` is all.

    ``length``: ``L``, by default that of :func:`padded`.
    """
    if forward.fact_token == "all":
        return None
    where = torch.zeros(len(edits), length or max(e.length for e in edits), dtype=torch.bool)
    for row, edit in zip(where, edits, strict=True):
        row[first_trained(edit, forward) : edit.subject[1] or None] = True
    return where.to(forward.device)


def first_trained(edit: EditTokens, forward: UpperPart) -> int:
    """The first token of ``edit`` that weights are trained through; of one whose subject is not known, its first."""
    begin, end = edit.subject
    return {"all": 0, "subject": begin, "subject_last": max(0, end - 1)}[forward.fact_token]


@dataclass(frozen=True)
class Footprint:
    """Bytes for each token: of the ``graph`` of a step, and of the keys and values of the ``prefix``.

    ``frozen``: whether steps run each row from its first trained token on alone.
    """

    graph: float = 0.0
    prefix: float = 0.0
    frozen: bool = False

    def within(self, budget: float, edits: Sequence[EditTokens], forward: UpperPart) -> Footprint:
        """This, or without keys and values where those of ``edits`` take more than half of ``budget`` bytes."""
        fits = held_of_each(edits) * self.prefix * sum(first_trained(edit, forward) for edit in edits) <= budget / 2
        return self if fits else Footprint(self.graph)
