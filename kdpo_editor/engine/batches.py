"""Edits side by side: mini-batches, of padded batches alike in length, and what is left to do in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from math import inf

import torch
from torch import Tensor

from ..hparams import KDPOHyperParams
from ..objectives import ce_loss, ipo_loss, kdpo_loss, kdpo_token_loss, margin_loss, standing
from ..requests import EditTokens
from .cached_forward import Captured, HeadRows, Suffix

# A mini-batch is replayed in so many batches, but not in smaller ones than these: a matrix product of few rows is slow.
PARTS = 4
LEAST = 16


@dataclass(eq=False)
class Batch:
    """``B`` edits, captured together.

    ``members``: the position of each in the list of edits. ``chosen`` ``[B, T]``: the new answers, padded.
    ``mask`` ``[B, T]``: where they are real; ``real`` ``[N]`` int64: the same as indices, of ``B * T``.
    ``hidden`` ``[B, T, D]``: the policy's final hidden states now; ``reference``: those before the first step, without
    gradient. Read from the policy's logits now, at ``margin`` (:func:`~kdpo_editor.objectives.standing`): ``negative``
    ``[B, T]``, and ``lead`` ``[B]``, by how many logits the weakest token of an answer leads, negative where it does
    not win. Logits themselves are not kept.
    """

    suffix: Suffix
    members: list[int]
    captured: Captured
    chosen: Tensor
    mask: Tensor
    margin: float
    hidden: Tensor
    reference: Tensor
    real: Tensor
    negative: Tensor
    lead: Tensor

    def look(self) -> None:
        """Bring what is known of the policy up to date with the weights."""
        self.hidden = self.suffix.replay(self.captured)
        self.negative, self.lead = _standing(self.suffix, self.hidden, self.chosen, self.real, self.margin)

    @property
    def losing(self) -> Tensor:
        """Which edits do not win everywhere, ``[B]`` bool."""
        return ((self.negative != self.chosen) & self.mask).any(-1)

    def remaining(self) -> Batch | None:
        """The edits whose new answer does not win everywhere, as a batch of their own; ``None`` if all do."""
        lost = self.losing
        if not lost.any():
            return None
        if lost.all():
            return self
        rows = lost.nonzero().flatten()
        hidden, reference = (states[rows.to(states.device)] for states in (self.hidden, self.reference))
        mask = self.mask[rows]
        return replace(
            self,
            members=[self.members[i] for i in rows.tolist()],
            captured=self.captured.rows(rows),
            chosen=self.chosen[rows],
            mask=mask,
            hidden=hidden,
            reference=reference,
            real=mask.flatten().nonzero().flatten(),
            negative=self.negative[rows],
            lead=self.lead[rows],
        )


@dataclass
class Round:
    """One cycle's work on ``batch``, of unfinished edits only.

    ``pair`` ``[B, T, 2]``: chosen and rejected tokens. ``history``: the losses ``[B]`` of each step so far.
    """

    batch: Batch
    pair: Tensor = field(init=False)
    history: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pair = torch.stack([self.batch.chosen, self.batch.negative], -1)

    @property
    def suffix(self) -> Suffix:
        """Where the batch was captured."""
        return self.batch.suffix

    @property
    def members(self) -> list[int]:
        """The position of each edit in the list of edits."""
        return self.batch.members

    @cached_property
    def head_rows(self) -> HeadRows | None:
        """The head's rows for ``pair``, or ``None`` if this head cannot be divided."""
        return self.suffix.head_rows(self.pair)

    @cached_property
    def reference_pairs(self) -> Tensor:
        """``[B, T, 2]``: the reference's logits of ``pair``."""
        with torch.no_grad():
            return self._pairs(self.batch.reference)

    @cached_property
    def lost(self) -> Tensor:
        """``[B, T]``: the positions that are not won yet."""
        return self.batch.mask & (self.pair[..., 0] != self.pair[..., 1])

    @property
    def negatives(self) -> list[list[int]]:
        """The rejected answers, without padding."""
        return [row[kept].tolist() for row, kept in zip(self.pair[..., 1], self.batch.mask, strict=True)]

    def losses(self, hparams: KDPOHyperParams, use_first: bool) -> Tensor:
        """The loss of each edit, ``[B]``; ``use_first`` takes the hidden states that the negatives were read from."""
        batch = self.batch
        hidden = batch.hidden if use_first else self.suffix.replay(batch.captured)
        if hparams.objective == "ce":
            return ce_loss(self.suffix.logits(hidden).to(self.pair.device), self.pair[..., 0], batch.mask)
        pairs = self._pairs(hidden)
        if hparams.objective == "margin":
            return margin_loss(pairs, batch.margin, self.lost)
        if hparams.objective == "kdpo_token":
            return kdpo_token_loss(pairs, self.reference_pairs, hparams.beta, self.lost)
        loss = ipo_loss if hparams.objective == "ipo" else kdpo_loss
        return loss(pairs, self.reference_pairs, hparams.beta, batch.mask)

    def _pairs(self, hidden: Tensor) -> Tensor:
        """Logits of ``pair``, ``[B, T, 2]``, of final hidden states ``[B, T, D]``."""
        logits = self.suffix.logits(hidden, self.head_rows).to(self.pair.device)
        return logits.gather(-1, self.pair) if self.head_rows is None else logits


def make_batches(suffix: Suffix, edits: Sequence[EditTokens], hparams: KDPOHyperParams) -> list[list[Batch]]:
    """Capture ``edits`` in the mini-batches of :func:`group`, each a list of batches that share their steps.

    With a single mini-batch the hidden states carry the graph of the first step.
    """
    groups = group(suffix, edits, hparams.memory_budget)

    def capture(members: list[int]) -> Batch:
        ids, chosen, mask, positions = padded([edits[i] for i in members])
        captured, hidden = suffix.capture(ids, positions, subjects([edits[i] for i in members], suffix))
        return make_batch(suffix, members, captured, hidden, chosen, mask, hparams.margin)

    with torch.set_grad_enabled(len(groups) == 1):
        return [[capture(members) for members in parts] for parts in groups]


def look(batches: Sequence[Sequence[Batch]], graph: bool) -> None:
    """Bring every batch of some mini-batches up to date with the weights; ``graph``: for the next step to use."""
    with torch.set_grad_enabled(graph):
        for batch in chain(*batches):
            batch.look()


def unfinished(batches: Sequence[Sequence[Batch]]) -> list[list[Round]]:
    """What remains to be done in each mini-batch, without those of which nothing does."""
    rounds = [[Round(left) for batch in some if (left := batch.remaining()) is not None] for some in batches]
    return [some for some in rounds if some]


def lost(batches: Sequence[Sequence[Batch]]) -> list[int]:
    """The edits that are not won, by their numbers."""
    each = chain(*batches)
    return [m for batch in each for m, loses in zip(batch.members, batch.losing.tolist(), strict=True) if loses]


def make_batch(
    suffix: Suffix,
    members: list[int],
    captured: Captured,
    hidden: Tensor,
    chosen: Tensor,
    mask: Tensor,
    margin: float,
) -> Batch:
    """A batch whose reference is the policy as it is now; arguments as :class:`Batch`, ``chosen`` ``[B, T]``."""
    real = mask.flatten().nonzero().flatten().to(suffix.device)
    chosen, mask = chosen.to(suffix.device), mask.to(suffix.device)
    found = _standing(suffix, hidden, chosen, real, margin)
    return Batch(suffix, members, captured, chosen, mask, margin, hidden, hidden.detach(), real, *found)


@torch.no_grad()
def _standing(suffix: Suffix, hidden: Tensor, chosen: Tensor, real: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """``negative`` and ``lead`` of a :class:`Batch`; the head, most of a look, is run at real tokens only."""
    rows = hidden.flatten(0, 1).index_select(0, real.to(hidden.device))
    logits = suffix.logits(rows.unsqueeze(0)).squeeze(0).to(suffix.device)
    negative, leads = standing(logits, chosen.flatten()[real], margin)
    every = leads.new_full(chosen.shape, inf).flatten().index_copy(0, real, leads)
    return chosen.flatten().index_copy(0, real, negative).view_as(chosen), every.view_as(chosen).amin(-1)


def group(suffix: Suffix, edits: Sequence[EditTokens], budget: float) -> list[list[list[int]]]:
    """The positions of ``edits`` in mini-batches of at most ``budget`` bytes, alike in length; each in its batches.

    A mini-batch of many is divided, so that short edits are not padded to the length of long ones. It needs room for
    captured inputs, in the model's dtype, and, while it is looked at, for two tables of logits, in fp32. One edit is
    always taken, whatever it needs; of no edits there are no mini-batches.
    """
    weight = suffix.module.weight
    assert isinstance(weight, Tensor)
    vocabulary = suffix.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    groups: list[list[int]] = [[]]
    for i in sorted(range(len(edits)), key=lambda i: len(edits[i].sequence)):
        members = [*groups[-1], i]
        tokens = max(len(edits[k].sequence) for k in members)
        answer = max(len(edits[k].chosen) for k in members)
        bytes_ = len(members) * (tokens * sum(weight.shape) * weight.element_size() + answer * vocabulary * 8)
        if groups[-1] and bytes_ > budget:
            groups.append([i])
        else:
            groups[-1] = members
    return [_divided(members) for members in groups if members]


def _divided(members: list[int]) -> list[list[int]]:
    """``members`` in at most ``PARTS`` parts alike in size, none of them small."""
    size = -(-len(members) // max(1, min(PARTS, len(members) // LEAST)))
    return [members[start : start + size] for start in range(0, len(members), size)]


def padded(edits: Sequence[EditTokens]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids ``[B, L]``, answers ``[B, T]``, their mask ``[B, T]`` and where they are predicted ``[B, T]``."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([e.sequence for e in edits], batch_first=True)
    chosen = pad([e.chosen for e in edits], batch_first=True)
    mask = pad([torch.ones(len(e.chosen), dtype=torch.bool) for e in edits], batch_first=True)
    positions = pad([torch.arange(len(e.prompt) - 1, len(e.sequence)) for e in edits], batch_first=True)
    return ids, chosen, mask, positions


def subjects(edits: Sequence[EditTokens], suffix: Suffix, length: int | None = None) -> Tensor | None:
    """Where their subjects' tokens are, ``[B, L]`` bool, if anything of ``suffix`` is trained there only.

    ``length``: ``L``, by default that of :func:`padded`.
    """
    if not suffix.at_subject:
        return None
    where = torch.zeros(len(edits), length or max(len(e.sequence) for e in edits), dtype=torch.bool)
    for row, edit in zip(where, edits, strict=True):
        row[slice(*edit.subject)] = True
    return where.to(suffix.device)
