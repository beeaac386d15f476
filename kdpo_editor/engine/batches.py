"""Edits side by side: padded batches of edits alike in length, what the policy says of each, and what is left to do."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..hparams import KDPOHyperParams
from ..objectives import ce_loss, hardest_rejected, hinge_loss, kdpo_loss
from ..requests.tokens import EditTokens
from .activation_cache import ActivationCache
from .cached_forward import CachedForward
from .examination import FEWEST
from .grouping import Footprint, first_trained, group, padded, trained_tokens
from .prefix import prefix_bytes
from .traces import Cycle, cycles_of
from .upper_part import HeadRows


@dataclass(eq=False)
class Batch:
    """``B`` edits, captured together, and how they stand.

    ``members``: the position of each in the list of edits. ``chosen`` ``[B, T]``: the new answers, padded.
    ``mask`` ``[B, T]``: where they are real. ``real`` ``[N]`` int64: the same as indices, of ``B * T``.
    ``hidden`` ``[B, T, D]``: the policy's final hidden states, as of the last :meth:`refresh`.
    ``reference`` ``[B, T, D]``: the same before the first step, without graph.
    ``rejected`` ``[B, T]`` and ``margins`` ``[B]``: what :func:`~kdpo_editor.objectives.hardest_rejected` found in the
    policy's logits. A margin is that of an answer's weakest token, in logits, and negative where it does not win.
    Logits themselves are not kept.
    ``cache``: what passes begin from. ``whole``: where those run each row from its first trained token on alone, with
    keys and values for what is before it, the cache of all its tokens, from which :meth:`renew` computes them again.
    ``graph``: of the memory that graphs may take, the share that the graph of one row's step takes.
    """

    forward: CachedForward
    members: list[int]
    cache: ActivationCache
    chosen: Tensor
    mask: Tensor
    margin: float
    hidden: Tensor
    reference: Tensor
    real: Tensor
    rejected: Tensor
    margins: Tensor
    whole: ActivationCache | None = None
    graph: float = 0.0

    def refresh(self) -> None:
        """Bring what is known of the policy up to date with the weights."""
        self.hidden = self.forward.from_cache(self.cache)
        self.rejected, self.margins = _standing(self.forward, self.hidden, self.chosen, self.real, self.margin)

    @torch.no_grad()
    def renew(self) -> None:
        """As :meth:`refresh`, what is before the first trained tokens included."""
        if self.whole is None:
            self.refresh()
            return
        self.cache = self.whole  # the old keys and values are given back before there are new ones
        frozen = self.forward.freeze(self.whole)
        assert frozen is not None
        self.cache, self.hidden = frozen
        self.rejected, self.margins = _standing(self.forward, self.hidden, self.chosen, self.real, self.margin)

    @property
    def losing(self) -> Tensor:
        """Which edits do not win everywhere, ``[B]`` bool."""
        return ((self.rejected != self.chosen) & self.mask).any(-1)

    def take_hidden(self) -> Tensor:
        """The final hidden states, ``[B, T, D]``, with their graph.

        After a refresh with gradients they are those that it computed, once. Otherwise a forward pass is made.
        """
        hidden = self.hidden
        if not hidden.requires_grad:
            return self.forward.from_cache(self.cache)
        self.hidden = hidden.detach()
        return hidden

    def remaining(self) -> Batch | None:
        """The edits whose new answer does not win everywhere, as a batch of their own; ``None`` if all do."""
        return self._rows(self.losing)

    def only(self, members: Container[int]) -> Batch | None:
        """Those edits whose numbers are in ``members``, as a batch of their own; ``None`` if there are none."""
        return self._rows(torch.tensor([member in members for member in self.members]))

    def _rows(self, chosen: Tensor) -> Batch | None:
        if not chosen.any():
            return None
        if chosen.all():
            return self
        rows = chosen.nonzero().flatten().to(self.mask.device)
        hidden, reference = (states[rows.to(states.device)] for states in (self.hidden, self.reference))
        mask = self.mask[rows]
        return replace(
            self,
            members=[self.members[i] for i in rows.tolist()],
            cache=self.cache.rows(rows),
            chosen=self.chosen[rows],
            mask=mask,
            hidden=hidden,
            reference=reference,
            real=mask.flatten().nonzero().flatten(),
            rejected=self.rejected[rows],
            margins=self.margins[rows],
            whole=None,
        )


@dataclass
class PreferenceBatch:
    """One cycle's work on a batch of unfinished edits: their chosen and rejected answers.

    ``pair`` ``[B, T, 2]``: both tokens of each position. ``history``: the losses ``[B]`` of each step so far.
    """

    batch: Batch
    pair: Tensor = field(init=False)
    history: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pair = torch.stack([self.batch.chosen, self.batch.rejected], -1)

    @property
    def forward(self) -> CachedForward:
        """Where the batch was captured."""
        return self.batch.forward

    @property
    def members(self) -> list[int]:
        """The position of each edit in the list of edits."""
        return self.batch.members

    @cached_property
    def head_rows(self) -> HeadRows | None:
        """The head's rows for ``pair``, or ``None`` if this head cannot be divided."""
        return self.forward.head_rows(self.pair)

    @cached_property
    def reference_pairs(self) -> Tensor:
        """``[B, T, 2]``: the reference's logits of ``pair``."""
        with torch.no_grad():
            return self._pairs(self.batch.reference)

    @cached_property
    def lost(self) -> Tensor:
        """``[B, T]``: the positions that are not won yet."""
        return self.batch.mask & (self.pair[..., 0] != self.pair[..., 1])

    def losses(self, hparams: KDPOHyperParams) -> Tensor:
        """The loss of each edit, ``[B]``."""
        batch = self.batch
        hidden = batch.take_hidden()
        if hparams.objective == "ce":
            return ce_loss(self.forward.logits(hidden).to(self.pair.device), self.pair[..., 0], batch.mask)
        pairs = self._pairs(hidden)
        if hparams.objective == "hinge":
            # So far beyond the margin that the loss of what does not win is never below what ends a cycle.
            return hinge_loss(pairs, batch.margin + hparams.stop_loss, self.lost)
        return kdpo_loss(pairs, self.reference_pairs, hparams.beta, batch.mask)

    def finished(self, stop_loss: float) -> list[Cycle]:
        """The cycle, now over, of each member."""
        rejected = [row[real].tolist() for row, real in zip(self.pair[..., 1], self.batch.mask, strict=True)]
        return cycles_of(rejected, self.history, stop_loss)

    def _pairs(self, hidden: Tensor) -> Tensor:
        """Logits of ``pair``, ``[B, T, 2]``, of final hidden states ``[B, T, D]``."""
        logits = self.forward.logits(hidden, self.head_rows).to(self.pair.device)
        return logits.gather(-1, self.pair) if self.head_rows is None else logits


def make_batches(forward: CachedForward, edits: Sequence[EditTokens], hparams: KDPOHyperParams) -> list[list[Batch]]:
    """Capture ``edits`` in the mini-batches of :func:`group`, each a list of batches that share their steps.

    With a single mini-batch, of which the graphs may be held, the hidden states carry that of the first step, unless
    what is before each row's first trained token is frozen.
    """
    size = None if len(edits) == 1 else footprint(forward, edits).within(hparams.memory_budget, edits, forward)
    groups, graph = group(forward, edits, hparams.memory_budget, size)

    def capture(members: list[int]) -> Batch:
        chosen = [edits[i] for i in members]
        ids, answers, mask, positions = padded(chosen)
        trained = trained_tokens(chosen, forward)
        if trained is None or (size is not None and not size.frozen):
            (cache, hidden), frozen = forward.capture(ids, positions, trained), None
        else:
            cache, frozen, hidden = forward.capture_frozen(ids, positions, trained)
        batch = make_batch(forward, members, frozen or cache, hidden, answers, mask, hparams.margin)
        return replace(batch, whole=cache if frozen else None, graph=graph)

    with torch.set_grad_enabled(torch.is_grad_enabled() and len(groups) == 1 and graph * len(edits) <= 1):
        return [[capture(members) for members in parts] for parts in groups]


def refresh(batches: Sequence[Sequence[Batch]]) -> None:
    """Bring every batch of some mini-batches up to date with the weights.

    Those of a single mini-batch get a graph for its next step, as far as there is room. Those of several would be stale
    once the first has taken its step.
    """
    graphs, held = 0.0, torch.is_grad_enabled() and len(batches) == 1
    for batch in chain(*batches):
        graphs += batch.graph * len(batch.members)
        with torch.set_grad_enabled(held and graphs <= 1):
            batch.refresh()


def unfinished(batches: Sequence[Sequence[Batch]]) -> list[list[PreferenceBatch]]:
    """What remains to be done in each mini-batch, without those of which nothing does."""
    work = [[PreferenceBatch(left) for batch in some if (left := batch.remaining()) is not None] for some in batches]
    return [some for some in work if some]


def only(batches: Sequence[Sequence[Batch]], members: Container[int]) -> list[list[Batch]]:
    """Those edits of each mini-batch whose numbers are in ``members``, without mini-batches that have none of them."""
    some = [[part for batch in parts if (part := batch.only(members)) is not None] for parts in batches]
    return [parts for parts in some if parts]


def lost(batches: Sequence[Sequence[Batch]]) -> list[int]:
    """The edits of which an answer is not the argmax, by their numbers; by how much the others lead does not matter."""
    each = ((batch, batch.losing & ~(batch.margins > 0)) for batch in chain(*batches))  # so is one that is NaN
    return [m for batch, loses in each for m, one in zip(batch.members, loses.tolist(), strict=True) if one]


def make_batch(
    forward: CachedForward,
    members: list[int],
    cache: ActivationCache,
    hidden: Tensor,
    chosen: Tensor,
    mask: Tensor,
    margin: float,
) -> Batch:
    """A batch whose reference is the policy as it is now; arguments as :class:`Batch`, ``chosen`` ``[B, T]``."""
    real = mask.flatten().nonzero().flatten().to(forward.device)
    chosen, mask = chosen.to(forward.device), mask.to(forward.device)
    found = _standing(forward, hidden, chosen, real, margin)
    return Batch(forward, members, cache, chosen, mask, margin, hidden, hidden.detach(), real, *found)


@torch.no_grad()
def _standing(
    forward: CachedForward, hidden: Tensor, chosen: Tensor, real: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    """``rejected`` and ``margins`` of a :class:`Batch`; the head, most of a refresh, is run at real tokens only."""
    rows = hidden.flatten(0, 1).index_select(0, real.to(hidden.device))
    logits = forward.logits(rows.unsqueeze(0)).squeeze(0).to(forward.device)
    rejected, margins = hardest_rejected(logits, chosen.flatten()[real], margin)
    every = margins.new_full(chosen.shape, inf).flatten().index_copy(0, real, margins)
    return chosen.flatten().index_copy(0, real, rejected).view_as(chosen), every.view_as(chosen).amin(-1)


def footprint(forward: CachedForward, edits: Sequence[EditTokens]) -> Footprint:
    """What a token takes, measured on the longest of ``edits`` once for each model, matrix and ``fact_token``.

    An edit with nothing before the trained tokens, or too short to tell whether keys and values can stand in for it,
    tells nothing of others, and is measured by itself.
    """
    edit = max(edits, key=lambda edit: edit.length)
    short = " short" if edit.length < FEWEST or first_trained(edit, forward) == 0 else ""

    def saved(rows: int) -> tuple[int, ActivationCache, ActivationCache | None]:
        """The bytes that a step's graph holds of so many copies of ``edit``, and what they were captured in."""
        ids, _, _, positions = padded([edit] * rows)
        cache, frozen, _ = forward.capture_frozen(ids, positions, trained_tokens([edit] * rows, forward))
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = forward.from_cache(frozen or cache)
        del hidden
        return sum(sizes.values()), cache, frozen

    def find() -> list[Any]:
        # What one more row takes: the matrices that a graph holds are there anyway.
        one, cache, frozen = saved(1)
        graph = (saved(2)[0] - one) / (frozen or cache).hidden.shape[1]
        kept = 0 if frozen is None else prefix_bytes(frozen)
        return [graph, kept / max(1, first_trained(edit, forward)), frozen is not None]

    return Footprint(*forward.findings.once(f"footprint {forward.module_name} {forward.fact_token}{short}", find))
