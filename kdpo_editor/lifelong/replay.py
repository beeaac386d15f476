"""The replay buffer: edits that a model has had before, kept so that later ones do not undo them (``replay``).

Of each, its tokens and what the part of the model below the first edited matrix made of them. That part never changes,
so an earlier edit is looked at again, and trained again if need be, for the cost of a forward pass from the cache. The
entries follow the model object, so the next call finds them; ``ReplayBuffer.of(model, weights)`` shows them.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import inf
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..engine.activation_cache import ActivationCache
from ..engine.batches import Batch, footprint, lost, make_batch, make_batches
from ..engine.cached_forward import CachedForward
from ..engine.grouping import group, padded, trained_tokens
from ..engine.structure import room
from ..engine.weights import find_matrices, only_training
from ..errors import RequestError
from ..hparams import KDPOHyperParams
from ..requests.forms import standing
from ..requests.tokens import EditTokens, tokenize
from .contexts import in_contexts

LOG = logging.getLogger(__name__)
# Lengths are rounded up to a multiple of this, so that few occur, and what blocks are called with is kept for the last
# few of them.
ROUND_TO = 4
KEPT_LENGTHS = 64
# An earlier edit is trained again once its margin is below this share of the one that edits are trained to, and then up
# to all of it. Trained at every touch, some would be for each new edit.
HELD = 0.5


@dataclass(eq=False)
class Entry:
    """One earlier edit. ``hidden`` ``[L, D]`` and ``inner`` ``[L, F]`` or ``None``: its row of a
    :class:`~kdpo_editor.engine.activation_cache.ActivationCache`.

    ``margin``: logits by which its weakest token led when last looked at; infinite before that.
    """

    tokens: EditTokens
    hidden: Tensor
    inner: Tensor | None
    margin: float = inf

    @cached_property
    def of(self) -> tuple[int, ...]:
        """The token ids of its request's own prompt."""
        return self.tokens.request or self.tokens.prompt_ids

    @property
    def bytes(self) -> int:
        """Memory held by what was captured."""
        return sum(t.numel() * t.element_size() for t in (self.hidden, self.inner) if t is not None)


class ReplayBuffer:
    """The edits that one model has had, for as long as its edited matrices are what the last of them left.

    ``entries``: the edits, oldest first, each phrasing by itself. ``left``: the matrices after the last one, by name.
    ``dropped``: how many were given up to stay within ``replay_budget``. ``repaired``: how often one had lost half its
    margin and was trained again.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.left: dict[str, Tensor] = {}
        self.dropped = 0
        self.repaired = 0
        self._samples = 0
        self._blank: dict[tuple[int, torch.device], ActivationCache] = {}

    @classmethod
    def of(cls, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> ReplayBuffer:
        """The edits kept for ``model``, to be added to and handed to :meth:`store`.

        None, if ``weights``, the matrices to be edited, are others than the last edit's or were changed since. Changes
        elsewhere in the model go unnoticed.
        """
        stored = _STORED.get(model)
        if stored is None:
            return cls()
        if stored.left.keys() != weights.keys() or not all(
            _same(weights[name], value) for name, value in stored.left.items()
        ):
            if stored.entries:
                count = len({entry.of for entry in stored.entries})
                LOG.warning("%d earlier edits are forgotten: the edited weights are not as they left them", count)
            return cls()
        fresh = copy.copy(stored)
        fresh.entries = [replace(entry) for entry in stored.entries]  # whose margins change
        return fresh

    @classmethod
    def rebuild(
        cls, model: nn.Module, tok: Any, requests: Sequence[Mapping[str, Any]], hparams: KDPOHyperParams
    ) -> None:
        """Keep ``requests``, oldest first, as the edits that ``model`` has had, unless some are kept for it already.

        This is how a run that goes on from a ledger knows what it did before. With no more of them than
        ``replay_checks`` it goes on bit for bit as if it had never stopped. With more, others may be looked at, since
        their margins are those that they have now.
        """
        weights = find_matrices(model, hparams)
        buffer = cls.of(model, weights)
        if buffer.entries or not requests:
            return
        edits: list[list[EditTokens]] = []
        for request in in_contexts(tok, standing(requests), hparams.context_templates):
            try:
                (phrasings,) = tokenize(
                    tok, [request], append_eos=hparams.append_eos, with_subject=hparams.needs_subject
                )
                if max(tokens.length for tokens in phrasings) > room(model):
                    raise RequestError("it has more tokens than the model takes")
            except RequestError as error:  # it was made with other settings
                LOG.warning("the earlier edit %r cannot be trained again: %s", request["prompt"], error)
                continue
            again = {tokens.prompt_ids for tokens in phrasings}
            edits = [[one for one in of if again.isdisjoint({one.prompt_ids, one.request})] for of in edits]
            edits.append(phrasings)
        originals = {name: w.detach().clone() for name, w in weights.items()}
        with only_training(model, weights, originals), torch.no_grad():
            forward = CachedForward.above(model, weights, hparams)
            # Each by itself, as when it was made: the shape of a batch shows in the last bits.
            for phrasings in filter(None, edits):
                buffer.add(phrasings, make_batches(forward, phrasings, hparams))
        buffer.store(model, weights, hparams)

    def store(self, model: nn.Module, weights: Mapping[str, nn.Parameter], hparams: KDPOHyperParams) -> None:
        """Keep these edits for ``model`` with ``weights`` as they are now, within ``replay_budget``."""
        held, dropped = sum(entry.bytes for entry in self.entries), 0
        for entry in sorted(self.entries, key=lambda entry: -entry.margin):
            if held <= hparams.replay_budget:
                break
            self.entries.remove(entry)
            held, dropped = held - entry.bytes, dropped + 1
        if dropped:
            self.dropped += dropped
            LOG.warning("%d earlier edits were dropped to stay within replay_budget, %d in all", dropped, self.dropped)
        self.left = {name: w.detach().clone() for name, w in weights.items()}
        _STORED[model] = self

    def add(self, edits: Sequence[EditTokens], batches: Sequence[Sequence[Batch]]) -> None:
        """Take ``edits`` up, as ``batches`` of them stand; those that are not won are left out."""
        missed = set(lost(batches))
        self.entries += [entry for i, entry in enumerate(entries_of(edits, batches)) if i not in missed]

    def sample(self, edits: Sequence[EditTokens], checks: int) -> list[Entry]:
        """At most ``checks`` for each request of ``edits``: half those of least margin, half drawn from the rest.

        Of a request with several phrasings that is one, its prompt where it is held. Edits of a prompt that is edited
        again are forgotten, in all their phrasings.
        """
        again = {tokens.prompt_ids for tokens in edits}
        self.entries = [e for e in self.entries if again.isdisjoint({e.tokens.prompt_ids, e.tokens.request})]
        most = checks * sum(not tokens.request for tokens in edits)
        first = list({entry.of: entry for entry in reversed(self.entries)}.values())[::-1]
        if len(first) <= most:
            return first
        by_margin = sorted(first, key=lambda entry: entry.margin)
        fragile = most // 2
        self._samples += 1
        return by_margin[:fragile] + random.Random(self._samples).sample(by_margin[fragile:], most - fragile)

    @torch.no_grad()
    def batches(
        self, forward: CachedForward, entries: Mapping[int, Entry], hparams: KDPOHyperParams, trained: bool = False
    ) -> list[list[Batch]]:
        """Mini-batches of ``entries``, as they stand now; the keys are their numbers among a call's edits.

        ``trained``: steps will be taken on them.
        """
        numbers = list(entries)

        def batch(here: list[int]) -> Batch:
            members = [numbers[i] for i in here]
            chosen = [entries[member] for member in members]
            _, answers, mask, positions = padded([entry.tokens for entry in chosen])
            cache = self._stack(forward, chosen, positions.to(forward.device))
            frozen = forward.freeze(cache) if size is not None and size.frozen else None
            begun, hidden = frozen or (cache, forward.from_cache(cache))
            made = make_batch(forward, members, begun, hidden, answers, mask, hparams.margin)
            return replace(made, whole=cache if frozen else None, graph=graph)

        some = [entries[number].tokens for number in numbers]
        size = footprint(forward, some).within(hparams.memory_budget, some, forward) if trained and some else None
        groups, graph = group(forward, some, hparams.memory_budget, size)
        return [[batch(part) for part in parts] for parts in groups]

    def _stack(self, forward: CachedForward, entries: Sequence[Entry], positions: Tensor) -> ActivationCache:
        """One capture of them all. What else blocks are called with is the same for any tokens of that length."""
        longest = max(len(entry.hidden) for entry in entries)
        length = int(min(-(-longest // ROUND_TO) * ROUND_TO, room(forward.model)))
        key = length, forward.place
        if key not in self._blank:
            if len(self._blank) == KEPT_LENGTHS:
                del self._blank[next(iter(self._blank))]
            anything = torch.zeros(1, length, dtype=torch.int64)
            self._blank[key] = forward.capture(anything, anything[:, :1])[0]

        def stack(rows: list[Tensor]) -> Tensor:
            return torch.stack([nn.functional.pad(r.to(forward.place), (0, 0, 0, length - len(r))) for r in rows])

        blank = self._blank[key].rows(torch.zeros(len(entries), dtype=torch.int64))
        captured = [entry.inner for entry in entries if entry.inner is not None]
        hidden = stack([entry.hidden for entry in entries])
        trained = trained_tokens([entry.tokens for entry in entries], forward, length)
        inner = stack(captured) if captured else None
        return replace(blank, hidden=hidden, inner=inner, positions=positions, trained=trained)


def entries_of(edits: Sequence[EditTokens], batches: Sequence[Sequence[Batch]]) -> list[Entry]:
    """What ``batches`` of ``edits`` hold of each, in the order of ``edits``."""
    new: dict[int, Entry] = {}
    for batch in chain(*batches):
        cache = batch.whole or batch.cache
        for row, (member, margin) in enumerate(zip(batch.members, batch.margins.tolist(), strict=True)):
            here = slice(0, edits[member].length)
            inner = None if cache.inner is None else cache.inner[row, here].clone()
            new[member] = Entry(edits[member], cache.hidden[row, here].clone(), inner, margin)
    return [new[i] for i in range(len(edits))]


class EarlierEdits:
    """The constraint that earlier edits hold: a sample of a buffer, for some new ``edits``."""

    def __init__(
        self, buffer: ReplayBuffer, forward: CachedForward, edits: Sequence[EditTokens], hparams: KDPOHyperParams
    ) -> None:
        self.buffer, self.forward, self.edits, self.hparams = buffer, forward, edits, hparams
        sampled = buffer.sample(edits, hparams.replay_checks)
        self._entries = dict(enumerate(sampled, start=len(edits)))
        self._sampled: list[list[Batch]] = []
        self._trained: list[list[Batch]] = []

    def violated(self) -> list[list[Batch]]:
        """Mini-batches of those that lost half their margin and are not trained yet.

        Other phrasings of a request are looked at once the one that was has lost it.
        """
        if self._sampled:
            self._refresh()
        else:
            self._sampled = self.buffer.batches(self.forward, self._entries, self.hparams)
        self._look_further()
        trained = {member for batch in chain(*self._trained) for member in batch.members}
        weak = {m: self._entries[m] for m, margin in self._margins(self._sampled).items() if self._weak(margin)}
        weak = {member: entry for member, entry in weak.items() if member not in trained}
        self.buffer.repaired += len(weak)
        joined = self.buffer.batches(self.forward, weak, self.hparams, trained=True)
        self._trained += joined
        return joined

    def _look_further(self) -> None:
        """Look at the other phrasings of requests of which one is weak."""
        weak = {self._entries[m].of for m, margin in self._margins(self._sampled).items() if self._weak(margin)}
        known = set(map(id, self._entries.values()))
        others = [entry for entry in self.buffer.entries if entry.of in weak and id(entry) not in known]
        numbered = dict(enumerate(others, start=len(self.edits) + len(self._entries)))
        self._entries |= numbered
        self._sampled += self.buffer.batches(self.forward, numbered, self.hparams)

    def close(self, own: Sequence[Sequence[Batch]], changed: bool) -> None:
        """Note how the earlier edits stand, and take up the new ones, whose batches are ``own``.

        An earlier edit that was trained again in vain is forgotten, or every later call would try it anew. ``changed``:
        the weights were changed since the last look.
        """
        if changed:
            self._refresh()
        margins = {**self._margins(self._sampled), **self._margins(self._trained)}
        for member, margin in margins.items():
            self._entries[member].margin = margin
        for member, margin in self._margins(self._trained).items():
            if self._weak(margin):
                entry = self._entries[member]
                self.buffer.entries.remove(entry)
                LOG.warning("the earlier edit of %r is lost and forgotten", entry.tokens.text)
        self.buffer.add(self.edits, own)

    @torch.no_grad()
    def _refresh(self) -> None:
        for batch in chain(*self._sampled):
            batch.refresh()

    def _weak(self, margin: float) -> bool:
        return margin < HELD * self.hparams.margin

    @staticmethod
    def _margins(batches: Sequence[Sequence[Batch]]) -> dict[int, float]:
        each = chain(*batches)
        return {m: margin for batch in each for m, margin in zip(batch.members, batch.margins.tolist(), strict=True)}


def _same(weight: Tensor, value: Tensor) -> bool:
    return weight.dtype == value.dtype and torch.equal(weight.detach().to(value.device), value)


# The entries hold no reference to their model, so they go when it does.
_STORED: WeakKeyDictionary[nn.Module, ReplayBuffer] = WeakKeyDictionary()
