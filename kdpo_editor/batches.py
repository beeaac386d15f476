"""Edits side by side: padded mini-batches, and what is left to do in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .objectives import competitors, kdpo_loss
from .requests import EditTokens
from .suffix import Captured, HeadRows, Suffix


@dataclass
class Batch:
    """``B`` edits, captured together.

    ``members``: the position of each in the list of edits. ``chosen`` ``[B, T]``: the new answers, padded.
    ``mask`` ``[B, T]``: where they are real. ``logits`` ``[B, T, V]``: the policy as it is now, fp32.
    ``reference`` ``[B, T, V]``: the policy before the first step, without gradient.
    """

    members: list[int]
    captured: Captured
    chosen: Tensor
    mask: Tensor
    logits: Tensor
    reference: Tensor

    def remaining(self, suffix: Suffix, margin: float) -> Round | None:
        """The edits whose new answer does not win everywhere, with their negatives; ``None`` if all do."""
        negative = competitors(self.logits.detach(), self.chosen, margin)
        lost = ((negative != self.chosen) & self.mask).any(-1)
        if not lost.any():
            return None
        logits, rejected, chosen, mask = self.logits, negative, self.chosen, self.mask
        captured, reference, members = self.captured, self.reference, self.members
        if not lost.all():
            rows = lost.nonzero().flatten()
            captured = captured.rows(rows)
            logits, reference = logits[rows], reference[rows]
            rejected, chosen, mask = rejected[rows], chosen[rows], mask[rows]
            members = [members[i] for i in rows.tolist()]
        pair = torch.stack([chosen, rejected], -1)
        return Round(
            suffix,
            members,
            captured,
            pair,
            mask,
            suffix.head_rows(pair),
            logits.gather(-1, pair),
            reference.gather(-1, pair),
        )


@dataclass
class Round:
    """One cycle's work on the unfinished edits of a batch: chosen and rejected tokens, ``pair`` ``[B, T, 2]``."""

    suffix: Suffix
    members: list[int]
    captured: Captured
    pair: Tensor
    mask: Tensor
    head_rows: HeadRows | None
    first: Tensor
    reference: Tensor

    @property
    def negatives(self) -> list[list[int]]:
        """The rejected answers, without padding."""
        return [row[kept].tolist() for row, kept in zip(self.pair[..., 1], self.mask, strict=True)]

    def losses(self, beta: float, use_first: bool) -> Tensor:
        """The loss of each edit, ``[B]``; ``use_first`` takes the logits that the negatives were read from."""
        if use_first:
            pairs = self.first
        else:
            pairs = self.suffix.replay(self.captured, self.head_rows).to(self.pair.device)
            if self.head_rows is None:
                pairs = pairs.gather(-1, self.pair)
        return kdpo_loss(pairs, self.reference, beta, self.mask)


def make_batches(suffix: Suffix, edits: Sequence[EditTokens], budget: float) -> list[Batch]:
    """Capture ``edits`` in as few mini-batches as ``budget`` bytes each allow, alike in length.

    A batch holds captured inputs, in the model's dtype, and reference logits, in fp32. One edit is always taken,
    whatever it needs. With a single batch the logits carry the graph of the first step.
    """
    weight = suffix.module.weight
    assert isinstance(weight, Tensor)
    vocabulary = suffix.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    order = sorted(range(len(edits)), key=lambda i: len(edits[i].sequence))
    groups: list[list[int]] = [[]]
    for i in order:
        group = [*groups[-1], i]
        tokens = max(len(edits[k].sequence) for k in group)
        answer = max(len(edits[k].chosen) for k in group)
        bytes_ = len(group) * (tokens * sum(weight.shape) * weight.element_size() + answer * vocabulary * 4)
        if groups[-1] and bytes_ > budget:
            groups.append([i])
        else:
            groups[-1] = group
    with torch.set_grad_enabled(len(groups) == 1):
        return [_captured(suffix, group, [edits[i] for i in group]) for group in groups]


def _captured(suffix: Suffix, members: list[int], edits: list[EditTokens]) -> Batch:
    device = suffix.device
    pad = torch.nn.utils.rnn.pad_sequence
    chosen = pad([e.chosen for e in edits], batch_first=True)
    mask = pad([torch.ones(len(e.chosen), dtype=torch.bool) for e in edits], batch_first=True)
    positions = pad([torch.arange(len(e.prompt) - 1, len(e.sequence)) for e in edits], batch_first=True)
    ids = pad([e.sequence for e in edits], batch_first=True)
    captured, logits = suffix.capture(ids, positions)
    logits = logits.to(device)
    return Batch(members, captured, chosen.to(device), mask.to(device), logits, logits.detach())
