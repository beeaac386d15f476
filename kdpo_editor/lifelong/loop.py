"""The loop of KDPO-L: several edits trained together, until they and what they must not harm hold at once.

What must hold is an ordered list of constraint sets: the edits, then the earlier edits of the same model. Each says
which of its members are violated now. The loop takes the first set that has any, adds them to the work, and runs one
cycle on them, with the function that the paper's algorithm uses. After each quarter of the cycles the order is turned
around once, so that an edit that is never won does not keep the others from being looked at.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain, islice
from math import ceil, inf

import torch
from torch import Tensor, nn

from ..engine.batches import Batch, PreferenceBatch, lost, make_batches, only, refresh, unfinished
from ..engine.cached_forward import CachedForward
from ..engine.grouping import SMALLEST_PART
from ..engine.half_products import copied_bytes, half_products, halved
from ..engine.optimizers import Stepper
from ..engine.steps import run_cycle
from ..engine.traces import Cycle, EditTrace
from ..hparams import KDPOHyperParams
from ..requests.tokens import EditTokens
from .preconditioning import Preconditioner, preconditioned
from .replay import EarlierEdits, ReplayBuffer

# From so many phrasings on, those that are won are not looked at until the others are won too, or for this share of the
# cycles; and of each request one phrasing is trained at a time, in turn, or as many as make up this number.
LAZY_FROM = SMALLEST_PART
PATIENCE = 0.25
# The longest step, in what the matrices typically make of an input, for each phrasing that is trained. Longer ones are
# taken at first, where the loss is high and hardly depends on the weights, and stay as harm to everything else. After
# each such share of the cycles as above it is doubled, for those whose inputs are common and so count for little.
REACH = 0.25


def kdpo_l(
    forward: CachedForward,
    weights: Mapping[str, nn.Parameter],
    edits: Sequence[EditTokens],
    hparams: KDPOHyperParams,
    buffer: ReplayBuffer | None = None,
    preconditioners: Sequence[Preconditioner] = (),
) -> list[EditTrace]:
    """Optimise ``weights`` in place until the model answers each prompt of ``edits`` with its chosen answer.

    Args:
        forward: the model, from the first of ``weights`` up.
        weights: ``{parameter name: matrix}``, the only parameters that require gradients.
        edits: token ids, trained together; they share the optimiser and, in mini-batches, its steps.
        hparams: settings.
        buffer: earlier edits of the model. Some are looked at; those that a new one pushed below half of ``margin``
            are trained along. The new edits that are won are added.
        preconditioners: one for each of ``weights``, or none at all.

    Returns:
        A trace of each of ``edits``.

    Raises:
        EditDiverged: a loss became NaN or infinite.
    """
    traces: defaultdict[int, EditTrace] = defaultdict(EditTrace)  # earlier edits' are not asked for
    longest = REACH * typical_gain(weights.values())
    half = halved(forward, weights, hparams.bf16)
    budget = hparams.memory_budget
    hparams = replace(hparams, memory_budget=max(budget - copied_bytes(half), budget / 2))
    with preconditioned(forward.model, weights, preconditioners):
        own = make_batches(forward, edits, hparams)
        work = Work(own, edits, hparams)
        earlier = None if buffer is None else EarlierEdits(buffer, forward, edits, hparams)
        sets: list[Callable[[], list[list[PreferenceBatch]]]] = [work.violated]
        if earlier is not None:
            sets.append(partial(work.join, earlier))
        stepper = Stepper(weights.values(), hparams)
        settled = False  # whether the last look was at the weights as they are now
        with half_products(half):
            for cycle in range(hparams.cycles):
                quarters, since = divmod(cycle, work.patience)
                others_first = quarters > 0 and since == 0
                order = reversed(sets) if others_first else sets
                violated = next(filter(None, (violated_of() for violated_of in order)), [])
                if not violated:
                    settled = True
                    break
                stepper.longest = longest * 2**quarters
                run_cycle(violated, stepper, hparams)
                for member, done in _finished(violated, hparams.stop_loss):
                    traces[member].cycles.append(done)
                violated.clear()  # what it holds is given back before more is made
    rounded = bool(preconditioners) and any(w.dtype not in (torch.float32, torch.float64) for w in weights.values())
    if rounded or not settled:
        for batch in chain(*work.batches):
            batch.renew()
    missed = set(lost(own))
    for i in range(len(edits)):
        traces[i].converged = i not in missed
    if earlier is not None:
        earlier.close(own, rounded or not settled)
    return [traces[i] for i in range(len(edits))]


def _finished(work: Iterable[Iterable[PreferenceBatch]], stop_loss: float) -> Iterator[tuple[int, Cycle]]:
    """The cycle, now over, of each member of ``work``."""
    for pairs in chain.from_iterable(work):
        yield from zip(pairs.members, pairs.finished(stop_loss), strict=True)


@torch.no_grad()
def typical_gain(weights: Iterable[Tensor]) -> float:
    """By how much ``weights``, each ``[..., D, F]``, typically lengthen an input, all of them together.

    Of each that is the root mean square of its singular values. Infinite where all weights are zero.
    """
    squares = [weight.float().square().sum() * max(weight.shape[-2:]) / weight.numel() for weight in weights]
    return float(torch.stack([square.cpu() for square in squares]).sum().sqrt()) or inf


class Work:
    """What is trained: the edits of a call and whatever joined them.

    Of many edits, a request's phrasings take turns: each cycle looks at one of those that were not won, and trains it.
    Once none is left, all are looked at.

    Where keys and values stand in for tokens that are not trained, they are renewed once all is won with them, and it
    counts as won only if it still is.
    """

    def __init__(self, batches: Sequence[list[Batch]], edits: Sequence[EditTokens], hparams: KDPOHyperParams) -> None:
        self.batches = list(batches)
        self.lazy = len(edits) >= LAZY_FROM
        self.patience = ceil(PATIENCE * hparams.cycles)
        # A request's own prompt comes before its other phrasings.
        self._request_of = dict(enumerate(accumulate(not tokens.request for tokens in edits)))
        self._open: dict[int, deque[int]] = {}  # of each request, the phrasings that were not won when last looked at
        self._current = True  # all of it is up to date with the weights
        self._renewed = True  # and what is before the trained tokens as well
        self._waited = 0  # cycles since all of it was looked at

    def violated(self) -> list[list[PreferenceBatch]]:
        """What is to be trained now, in mini-batches; of many edits those that were won are looked at last."""
        if self._waited >= self.patience:
            self._open.clear()
        return self._begun(self._turn() or self._look())

    def join(self, earlier: EarlierEdits) -> list[list[PreferenceBatch]]:
        """Take up for good those of ``earlier`` that are violated now; what is left to do of them."""
        batches = earlier.violated()
        self.batches += batches
        return self._begun(self._first_turn(batches)) if batches else []

    def _look(self) -> list[list[PreferenceBatch]]:
        """What is to be trained now, after a look at all."""
        if not self._current:
            with torch.set_grad_enabled(not self.lazy):  # few of many are trained, in a pass of their own
                refresh(self.batches)
            self._current = True
        self._waited = 0
        found = self._first_turn(self.batches)
        if not found and not self._renewed and any(batch.whole is not None for batch in chain(*self.batches)):
            for batch in chain(*self.batches):
                batch.renew()
            self._renewed = True
            found = self._first_turn(self.batches)
        return found

    def _turn(self) -> list[list[PreferenceBatch]]:
        """What is to be trained of phrasings whose turn it is, after as many turns as need no training."""
        while self._open:
            taken = self._next()
            some = only(self.batches, taken)
            refresh(some)
            found = unfinished(some)
            won = taken.difference(*(pairs.members for pairs in chain(*found)))
            left = {request: deque(m for m in phrasings if m not in won) for request, phrasings in self._open.items()}
            self._open = {request: phrasings for request, phrasings in left.items() if phrasings}
            if found:
                return found
        return []

    def _next(self) -> set[int]:
        """The phrasings whose turn it is."""
        each = max(1, LAZY_FROM // len(self._open))
        taken: set[int] = set()
        for phrasings in self._open.values():
            taken.update(islice(phrasings, each))
            phrasings.rotate(-each)
        return taken

    def _first_turn(self, batches: list[list[Batch]]) -> list[list[PreferenceBatch]]:
        """What is to be trained now of ``batches``, which are up to date; of many, the rest takes turns.

        Each phrasing that joined counts as a request of its own.
        """
        if not self.lazy:
            return unfinished(batches)
        each = (zip(batch.members, batch.losing.tolist(), strict=True) for batch in chain(*batches))
        for member in sorted(member for member, loses in chain(*each) if loses):
            self._open.setdefault(self._request_of.get(member, -member), deque()).append(member)
        return unfinished(only(batches, self._next())) if self._open else []

    def _begun(self, found: list[list[PreferenceBatch]]) -> list[list[PreferenceBatch]]:
        """``found``, after which nothing is up to date any more."""
        if found:
            self._current = self._renewed = False
            self._waited += 1
        return found
