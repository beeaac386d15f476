"""Edits that a model has had before, kept so that later ones do not undo them (``replay``).

Of each, its tokens and what the part of the model below the first edited matrix made of them: that part never
changes, so an earlier edit is looked at again, and trained again if need be, for the cost of the replayed suffix. The
edits follow the model object, so they are found again by the next call; ``EarlierEdits.of(model, weights)`` shows them.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..engine.batches import Batch, group, look, make_batch, padded, subjects
from ..engine.cached_forward import Arguments, Captured, Suffix, rows_of
from ..engine.weights import find_matrices, only_training
from ..hparams import KDPOHyperParams
from ..models import room
from ..own_texts import LEAD
from ..requests import EditTokens, tokenize

LOG = logging.getLogger(__name__)
# Lengths are rounded up to a multiple of this, so that few occur, and what blocks are called with is kept for the last
# few. It is taken from so many rows: a prime number, which hardly anything but rows is a multiple of.
ROUND = 4
LENGTHS = 64
ROWS = 13
# An earlier edit is trained again once it leads by less than this share of the margin, and then up to all of it.
# Trained at every touch, some would be for each new edit.
HELD = 0.5
# The logits by which facts that are to stay are held: half of what they led by at least.
FACT = LEAD / 2


@dataclass(eq=False)
class Kept:
    """One edit. ``hidden`` ``[L, D]`` and ``inner`` ``[L, F]`` or ``None``: see :class:`~.cached_forward.Captured`.

    ``lead``: logits by which its weakest token led when last looked at; infinite before that.
    """

    tokens: EditTokens
    hidden: Tensor
    inner: Tensor | None
    lead: float = inf

    @property
    def bytes(self) -> int:
        """Memory held by what was captured."""
        return sum(t.numel() * t.element_size() for t in (self.hidden, self.inner) if t is not None)


class EarlierEdits:
    """The edits that one model has had, for as long as its edited matrices are what the last of them left.

    ``kept``: the edits, oldest first, each phrasing by itself. ``left``: the matrices after the last one, by name.
    ``dropped``: how many were given up to stay within ``replay_budget``. ``repaired``: how often one had lost half its
    margin and was trained again.
    """

    def __init__(self) -> None:
        self.kept: list[Kept] = []
        self.left: dict[str, Tensor] = {}
        self.dropped = 0
        self.repaired = 0
        self._seen = 0
        self._arguments: dict[tuple[int, torch.device], list[Arguments]] = {}

    @classmethod
    def of(cls, model: nn.Module, weights: dict[str, nn.Parameter]) -> EarlierEdits:
        """The edits kept for ``model``, to be added to and handed to :meth:`store`.

        None, if ``weights``, the matrices to be edited, are others than the last edit's or were changed since.
        Changes elsewhere in the model go unnoticed.
        """
        stored = _STORED.get(model)
        if stored is None:
            return cls()
        if stored.left.keys() != weights.keys() or not all(
            _same(weights[name], value) for name, value in stored.left.items()
        ):
            LOG.info("%d earlier edits are forgotten: the edited weights are not as they left them", len(stored.kept))
            return cls()
        fresh = copy.copy(stored)
        fresh.kept = list(stored.kept)
        return fresh

    @classmethod
    def recall(
        cls, model: nn.Module, tok: Any, requests: Sequence[Mapping[str, Any]], hparams: KDPOHyperParams
    ) -> None:
        """Keep ``requests``, oldest first, as the edits that ``model`` has had, unless some are kept for it already.

        This is how a run that goes on from a ledger knows what it did before. With no more of them than
        ``replay_checks`` it goes on bit for bit as if it had never stopped; with more, others are looked at, since how
        they led is not known.
        """
        weights = find_matrices(model, hparams)
        earlier = cls.of(model, weights)
        if earlier.kept or not requests:
            return
        latest = {request["prompt"]: request for request in requests}
        done = [request for request in requests if latest[request["prompt"]] is request]
        edits = tokenize(tok, done, append_eos=hparams.append_eos, with_subject=hparams.needs_subject)
        with only_training(model, weights, {name: w.detach().clone() for name, w in weights.items()}):
            suffix = Suffix.above(model, weights, hparams)
            # Each by itself, as when it was made: the shape of a batch shows in the last bits.
            earlier.kept = [one for phrasings in edits for one in earlier.capture(suffix, phrasings, hparams)]
        earlier.store(model, weights, hparams)

    def store(self, model: nn.Module, weights: dict[str, nn.Parameter], hparams: KDPOHyperParams) -> None:
        """Keep these edits for ``model`` with ``weights`` as they are now, within ``replay_budget``."""
        held, dropped = sum(one.bytes for one in self.kept), 0
        for one in sorted(self.kept, key=lambda one: -one.lead):
            if held <= hparams.replay_budget:
                break
            self.kept.remove(one)
            held, dropped = held - one.bytes, dropped + 1
        if dropped:
            self.dropped += dropped
            LOG.info("%d earlier edits were dropped to stay within replay_budget, %d in all", dropped, self.dropped)
        place = "cpu" if hparams.captured_on_host else None
        self.left = {name: w.detach().to(place, copy=True) for name, w in weights.items()}
        _STORED[model] = self

    def to_check(self, edits: Sequence[EditTokens], checks: int) -> list[Kept]:
        """At most ``checks`` for each of ``edits``: half those that led by least, half a seeded sample of the rest.

        Edits of a prompt that is edited again are forgotten, in all their phrasings.
        """
        again = {tokens.prompt_ids for tokens in edits}
        self.kept = [one for one in self.kept if again.isdisjoint({one.tokens.prompt_ids, one.tokens.request})]
        most = checks * len(edits)
        if len(self.kept) <= most:
            return list(self.kept)
        by_lead = sorted(self.kept, key=lambda one: one.lead)
        fragile = most // 2
        self._seen += 1
        return by_lead[:fragile] + random.Random(self._seen).sample(by_lead[fragile:], most - fragile)

    def capture(self, suffix: Suffix, edits: Sequence[EditTokens], hparams: KDPOHyperParams) -> list[Kept]:
        """Run the whole model over ``edits`` and keep what is needed of it; they are not among :attr:`kept` yet."""
        new: dict[int, Kept] = {}
        for members in chain(*group(suffix, edits, hparams.memory_budget)):
            chosen = [edits[i] for i in members]
            ids, _, _, positions = padded(chosen)
            with torch.no_grad():
                captured, _ = suffix.capture(ids, positions)
            for row, (i, tokens) in enumerate(zip(members, chosen, strict=True)):
                here = slice(0, len(tokens.sequence))
                inner = None if captured.inner is None else captured.inner[row, here].clone()
                new[i] = Kept(tokens, captured.hidden[row, here].clone(), inner)
        return [new[i] for i in range(len(edits))]

    def batches(
        self,
        suffix: Suffix,
        edits: Sequence[Kept],
        hparams: KDPOHyperParams,
        members: Sequence[int] | None = None,
        adapted: Callable[[Captured], Captured] = lambda captured: captured,
        margin: float | None = None,
    ) -> list[list[Batch]]:
        """``edits``, captured some time, as :func:`~.batches.make_batches` gives them, as they stand now.

        ``members``: which of them, by their positions; ``None`` is all. ``adapted``: see
        :func:`~kdpo_editor.lifelong.preserve.sparing`. ``margin``: logits, ``None`` is the settings'.
        """
        members = range(len(edits)) if members is None else members
        margin = hparams.margin if margin is None else margin

        def batch(here: list[int]) -> Batch:
            chosen = [edits[member] for member in here]
            _, answers, mask, positions = padded([one.tokens for one in chosen])
            captured = adapted(self._stack(suffix, chosen, positions.to(suffix.device)))
            hidden = suffix.replay(captured)
            return make_batch(suffix, here, captured, hidden, answers, mask, margin)

        groups = group(suffix, [edits[member].tokens for member in members], hparams.memory_budget)
        with torch.no_grad():
            return [[batch([members[i] for i in part]) for part in parts] for parts in groups]

    def _stack(self, suffix: Suffix, edits: Sequence[Kept], positions: Tensor) -> Captured:
        """One capture of them all; what else blocks are told is the same for any tokens."""
        length = int(min(-(-max(len(one.hidden) for one in edits) // ROUND) * ROUND, room(suffix.model)))
        key = length, suffix.place
        if key not in self._arguments:
            if len(self._arguments) == LENGTHS:
                del self._arguments[next(iter(self._arguments))]
            anything = torch.zeros(ROWS, length, dtype=torch.int64)
            self._arguments[key] = suffix.capture(anything, anything[:, :1])[0].arguments

        def stack(rows: list[Tensor]) -> Tensor:
            return torch.stack([nn.functional.pad(r.to(suffix.store), (0, 0, 0, length - len(r))) for r in rows])

        inner = [one.inner for one in edits if one.inner is not None]
        hidden = stack([one.hidden for one in edits])
        where = subjects([one.tokens for one in edits], suffix, length)
        arguments = rows_of(self._arguments[key], ROWS, torch.zeros(len(edits), dtype=torch.int64))
        return Captured(hidden, stack(inner) if inner else None, arguments, positions, where)


class Review:
    """Some edits, the earlier ones that are looked at on their account, and facts that are to stay.

    ``kept``: the edits, captured, and after them the others, in this order.
    """

    def __init__(
        self,
        earlier: EarlierEdits,
        suffix: Suffix,
        edits: Sequence[EditTokens],
        hparams: KDPOHyperParams,
        facts: Sequence[EditTokens] = (),
    ) -> None:
        self.earlier, self.suffix, self.hparams = earlier, suffix, hparams
        self.own = range(len(edits))
        self.kept = [*earlier.capture(suffix, edits, hparams), *earlier.to_check(edits, hparams.replay_checks)]
        self._facts = range(len(self.kept), len(self.kept) + len(facts))
        self.kept += earlier.capture(suffix, facts, hparams)
        self._looked: list[list[Batch]] = []

    def batches(self) -> list[list[Batch]]:
        """Mini-batches of the edits themselves."""
        return self.earlier.batches(self.suffix, self.kept, self.hparams, self.own)

    def harmed(self, active: Sequence[Sequence[Batch]], adapted: Callable[[Captured], Captured]) -> list[list[Batch]]:
        """Mini-batches of the earlier edits that hold no more and are not among the ``active`` ones already.

        ``adapted``: see :func:`~kdpo_editor.lifelong.preserve.sparing`.
        """
        if self._looked:
            self.look()
        else:
            others = range(len(self.own), self._facts.start)
            self._looked = self.earlier.batches(self.suffix, self.kept, self.hparams, others, adapted)
        trained = {member for batch in chain(*active) for member in batch.members}
        leads = chain(*(zip(b.members, b.lead.tolist(), strict=True) for b in chain(*self._looked)))
        again = [member for member, lead in leads if lead < HELD * self.hparams.margin and member not in trained]
        self.earlier.repaired += len(again)
        return self.earlier.batches(self.suffix, self.kept, self.hparams, again, adapted)

    def facts(self, adapted: Callable[[Captured], Captured]) -> list[list[Batch]]:
        """Mini-batches of the facts, held by less. ``adapted``: see :func:`~kdpo_editor.lifelong.preserve.sparing`."""
        return self.earlier.batches(self.suffix, self.kept, self.hparams, self._facts, adapted, FACT)

    def look(self) -> None:
        """Bring what is known of the earlier edits up to date with the weights."""
        look(self._looked, graph=False)

    def end(self, batches: Sequence[Sequence[Batch]]) -> None:
        """Add the edits, whose ``batches`` are up to date, to the earlier ones, and note how all of them lead."""
        for batch in chain(*batches, *self._looked):
            for member, value in zip(batch.members, batch.lead.tolist(), strict=True):
                self.kept[member].lead = value
        self.earlier.kept += self.kept[: len(self.own)]


def _same(weight: Tensor, value: Tensor) -> bool:
    return weight.dtype == value.dtype and torch.equal(weight.detach().to(value.device), value)


# The edits hold no reference to their model, so they go when it does.
_STORED: WeakKeyDictionary[nn.Module, EarlierEdits] = WeakKeyDictionary()
