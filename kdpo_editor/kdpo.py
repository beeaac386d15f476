"""KDPO: Knowledge Direct Preference Optimization (Rozner et al., Findings of EMNLP 2024), the algorithm.

One edit, as in the paper's section 3:

    tokens    x, y_w                      the prompt and the new answer
    reference the policy before the first step, kept as its final hidden states
    cycle     y_l = argmax of the policy at each answer position; done if y_l == y_w
      step    loss = -log sigmoid(beta * [(log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))])
              one Adam step on one matrix
"""

from __future__ import annotations

import copy as copying
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .ablation import OwnAnswerRound
from .derived import complete
from .engine.batches import Batch, Round, look, lost, make_batches, unfinished
from .engine.cached_forward import Suffix
from .engine.optimizers import make_optimizer
from .engine.steps import Steps, check_finite, recording
from .engine.weights import find_blocks, find_matrices, only_training
from .errors import EditDiverged, ModelError, RequestError
from .hparams import OWN, KDPOHyperParams
from .lifelong.preserve import Preconditioner, preconditioners, sparing
from .lifelong.replay import EarlierEdits, Review
from .models import room
from .own_words import words_and_facts
from .requests import PHRASINGS, EditTokens, tokenize

LOG = logging.getLogger(__name__)
# A matrix that changes by more than so many times its own norm is not edited but destroyed. Sixty edits of the shipped
# model by KDPO-L make its matrices' norms grow by 7 to 26%.
LARGEST = 10.0
# Of so many edits those that are won are not looked at until the others are won too, or for this share of the cycles; a
# look at few is cheap.
MANY = 16
UNSEEN = 0.25


@dataclass
class Cycle:
    """One cycle of an edit: its negative answer (token ids, ``[T]``) and the loss of each step, in nats."""

    negative: list[int]
    losses: list[float] = field(default_factory=list)


@dataclass
class EditTrace:
    """What happened during one edit.

    ``cycles``: those that began with an unfinished edit. ``steps``: optimiser steps taken. ``converged``:
    whether every answer position ended up as the argmax (by ``margin``, if one is set). Where an edit is trained in
    several phrasings, ``cycles`` and ``steps`` are those of its prompt, and ``converged`` is about all that were asked
    for. ``own_words``: the prompts that were trained besides, which the model wrote itself.
    """

    cycles: list[Cycle] = field(default_factory=list)
    steps: int = 0
    converged: bool = False
    own_words: list[str] = field(default_factory=list)


def apply_kdpo_to_model(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: KDPOHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Edit ``model`` so that it answers each request's prompt with its target; EasyEdit's method interface.

    Args:
        model: a decoder-only ``transformers`` model, edited in place unless ``copy``.
        tok: its tokenizer; neither its padding side nor anything else of it is changed.
        requests: ``[{"prompt": str, "target_new": str}, ...]``, edited in this order; ``"rephrases"``, a list of other
            prompts for the same target, is trained too; ``"subject"``, a part of the prompt, is needed where
            ``subject_layers``, ``own_words``, ``own_openings``, ``own_facts`` or ``own_namesakes`` is set; with
            ``"own_words"``, such as a trace has, none are sought for a request; other keys are ignored.
        hparams: settings. With ``ledger`` set, a call that succeeds is journaled there (:meth:`EditLedger.edit`).
        copy: edit and return a deep copy instead.
        return_orig_weights: also return the edited matrices as they were.
        keep_original_weight, kwargs: accepted for EasyEdit's sake, without effect.

    Returns:
        The edited model, and ``{parameter name: original tensor}``, empty unless ``return_orig_weights``.

    Raises:
        RequestError, ModelError: something cannot be edited; found before anything is changed.
        EditDiverged: a loss or weight became NaN or infinite, or a matrix changed by more than ten times its norm.
            Whatever is raised during an edit, the model is left as it was before the call.
    """
    if hparams.ledger is None:
        model, originals, _ = edit(model, tok, requests, hparams, copy=copy)
    else:
        from .edits.ledger import writing

        with writing(hparams.ledger) as ledger:
            model, originals, _ = ledger.edit(model, tok, requests, hparams, copy=copy)
    return model, originals if return_orig_weights else {}


def edit(
    model: nn.Module, tok: Any, requests: Sequence[Mapping[str, Any]], hparams: KDPOHyperParams, copy: bool = False
) -> tuple[nn.Module, dict[str, Tensor], list[EditTrace]]:
    """As :func:`apply_kdpo_to_model`, but always with the original weights, and with a trace of each edit."""
    hparams = complete(hparams, model)
    edits = tokenize(tok, requests, append_eos=hparams.append_eos, with_subject=hparams.needs_subject)
    for key in PHRASINGS:
        if hparams.objective == "dpo" and any(request.get(key) for request in requests):
            raise RequestError(f"{key!r} cannot be trained where objective is dpo")
    weights = find_matrices(model, hparams)
    last = len(find_blocks(model, hparams)) - 1
    if last in (hparams.subject_layers or ()):
        raise ModelError(f"subject_layers: {last} is the last layer, where a subject's tokens reach no answer")
    _check_lengths(model, edits)
    spared = preconditioners(model, tok, weights, hparams)
    earlier = EarlierEdits.of(model, weights) if hparams.replay else None
    facts: list[list[EditTokens]] = [[] for _ in edits]
    own = {key.removeprefix("own_"): getattr(hparams, key) for key in OWN}
    if any(own.values()):
        kept = [] if earlier is None else [one.tokens for one in earlier.kept]
        requests, facts = words_and_facts(model, tok, requests, edits, **own, earlier=kept)
        edits = tokenize(tok, requests, append_eos=hparams.append_eos, with_subject=True)
    if copy:
        model = copying.deepcopy(model)
        weights = find_matrices(model, hparams)
    originals = {name: w.detach().clone() for name, w in weights.items()}
    suffix = Suffix.above(model, weights, hparams)
    with only_training(model, weights, originals), recording(suffix, hparams):
        together = [*zip(edits, facts, strict=True)]
        if hparams.schedule == "breadth_first":
            together = [([*chain(*edits)], [*chain(*facts)])]
        traced = [optimise(suffix, weights, some, hparams, earlier, spared, held) for some, held in together]
        found = chain(*traced)
        _check_size(weights, originals)
    if earlier is not None:
        earlier.store(model, weights, hparams)
    traces = [_of_request(r, [next(found) for _ in phrasings]) for r, phrasings in zip(requests, edits, strict=True)]
    missed = sum(not trace.converged for trace in traces)
    if missed:
        LOG.info("%d of %d edits did not reach their target within %d cycles", missed, len(traces), hparams.cycles)
    return model, originals, traces


def optimise(
    suffix: Suffix,
    weights: dict[str, nn.Parameter],
    edits: list[EditTokens],
    hparams: KDPOHyperParams,
    earlier: EarlierEdits | None = None,
    spared: Sequence[Preconditioner] = (),
    facts: Sequence[EditTokens] = (),
) -> list[EditTrace]:
    """Optimise ``weights`` in place until the model answers each prompt of ``edits`` with its chosen answer.

    One edit is the paper's procedure. Several share the optimiser and its steps, in mini-batches; those that are won
    are skipped for the cycle and looked at again in the next, or, of many, once the others are won too. When all are
    won, ``facts`` join them, answers that the model gives and is to keep, for half the cycles at most. When these hold
    too, some of the ``earlier`` edits are looked at, and those that were harmed join ``edits``, which are added to the
    earlier ones in the end. ``spared``: a preconditioner for each matrix, or none at all.
    """
    if earlier is None and facts:
        earlier = EarlierEdits()
    review = None if earlier is None else Review(earlier, suffix, edits, hparams, facts)
    batches = make_batches(suffix, edits, hparams) if review is None else review.batches()
    # Whether the pass that reads off the negatives is the first step's forward too.
    alone = review is None and len(batches) == 1 and not spared
    traces = [EditTrace() for _ in (edits if review is None else review.kept)]

    with sparing(suffix, weights, spared, inside=batches[0][0].captured.inner is not None) as adapted:
        keep = hparams.objective == "dpo" or hparams.update_scale != 1.0 or hparams.shrink > 0
        start = {name: w.detach().clone() for name, w in weights.items()} if keep else {}
        optimizer = make_optimizer(list(weights.values()), hparams)
        active = list(batches)
        if spared:
            active = [[replace(b, captured=adapted(b.captured)) for b in some] for some in batches]
        looked = active  # what the next cycle looks at
        seen = 0  # the last that looked at all
        held: list[list[Batch]] | None = None  # the facts, once they have joined
        for number in range(hparams.cycles):
            if held and 2 * number >= hparams.cycles:
                active = looked = [some for some in active if some not in held]
                held = []
            if number > 0:
                look(looked, graph=alone)
            rounds: Sequence[Sequence[Round | OwnAnswerRound]] = unfinished(looked)
            if not rounds and looked != active:
                looked = active
                look(looked, graph=alone)
                rounds = unfinished(looked)
            if not rounds and review is not None and held is None and 2 * number < hparams.cycles:
                held = review.facts(adapted)
                active += held
                rounds = unfinished(held)
            if not rounds and review is not None:
                harmed = review.harmed(active, adapted)
                active += harmed
                rounds = unfinished(harmed)
            if looked == active:
                seen = number
            if len(edits) >= MANY and number + 1 - seen < UNSEEN * hparams.cycles:
                looked = [[current.batch for current in some] for some in rounds]
            else:
                looked = active
            if not rounds:
                break
            if hparams.objective == "dpo":
                rounds = [[OwnAnswerRound(suffix, active[0][0], edits[0].prompt, weights, start)]]
            going = [Steps(some, optimizer, hparams) for some in rounds]
            for step in range(hparams.num_steps):
                going = [steps for steps in going if steps.take(use_first=alone and step == 0)]
            for current in chain(*rounds):
                _record(current, traces, hparams)
            if hparams.shrink and number < hparams.shrink_cycles:
                optimizer.pull(hparams.shrink, start.values())
                looked = active
        if hparams.update_scale != 1.0:
            with torch.no_grad():
                for name, w in weights.items():
                    w.copy_(start[name] + hparams.update_scale * (w - start[name]))
        if review is not None and (rounds or hparams.update_scale != 1.0):
            review.look()

    if not all(torch.isfinite(w).all() for w in weights.values()):
        raise EditDiverged("the edited weights became NaN or infinite")
    if rounds or hparams.update_scale != 1.0 or spared:
        look(batches, graph=False)
    missed = set(lost(batches))
    for i, trace in enumerate(traces):
        trace.converged = i not in missed
    if review is not None:
        review.end(batches)
    return traces[: len(edits)]


def _record(current: Round | OwnAnswerRound, traces: list[EditTrace], hparams: KDPOHyperParams) -> None:
    """Add a finished cycle to the traces of its edits."""
    history = torch.stack(current.history).T.tolist()
    check_finite(chain(*history))
    for member, negative, losses in zip(current.members, current.negatives, history, strict=True):
        taken = next((n for n, loss in enumerate(losses) if loss < hparams.stop_loss), len(losses))
        traces[member].cycles.append(Cycle(negative, losses[: taken + 1]))
        traces[member].steps += taken


@torch.no_grad()
def _check_size(weights: dict[str, nn.Parameter], originals: dict[str, Tensor]) -> None:
    """Weights may grow without bound and stay finite, where a loss hardly depends on the layers that are edited."""
    for name, original in originals.items():
        change, size = (tensor.float().norm().item() for tensor in (weights[name] - original, original))
        if change > LARGEST * size > 0:
            raise EditDiverged(f"{name} changed by {change / size:.3g} times its norm")


def _of_request(request: Mapping[str, Any], traces: list[EditTrace]) -> EditTrace:
    """The trace of the prompt, converged only if the rephrases that it was given are too."""
    own = list(request.get("own_words") or ())
    asked = traces[: len(traces) - len(own)]
    return replace(traces[0], converged=all(trace.converged for trace in asked), own_words=own)


def _check_lengths(model: nn.Module, edits: list[list[EditTokens]]) -> None:
    most = room(model)
    for i, phrasings in enumerate(edits):
        longest = max(len(tokens.sequence) for tokens in phrasings)
        if longest > most:
            raise ModelError(f"request {i} has {longest} tokens with its target; the model takes {most} at most")
