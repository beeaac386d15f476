"""Edit a model: check the requests, choose the method, and leave the model as it was if anything goes wrong."""

from __future__ import annotations

import copy as copying
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .ablation import dpo
from .derived import complete
from .engine.batches import lost, make_batches
from .engine.cached_forward import CachedForward
from .engine.steps import recording
from .engine.structure import room
from .engine.traces import EditTrace
from .engine.weights import find_blocks, find_matrices, only_training, uncompiled
from .errors import EditDiverged, ModelError, RequestError
from .hparams import KDPOHyperParams
from .kdpo import kdpo
from .lifelong.contexts import in_contexts
from .lifelong.loop import kdpo_l
from .lifelong.preconditioning import preconditioners
from .lifelong.replay import ReplayBuffer
from .lifelong.second_moments import remember_copy
from .requests.forms import numbered, plain_requests, same_request, say_once
from .requests.tokens import EditTokens, tokenize

LOG = logging.getLogger(__name__)
# A matrix that changes by more than so many times its own norm is not edited but destroyed. Sixty edits by KDPO-L make
# the norms of the edited matrices grow by a quarter at most.
LARGEST_CHANGE = 10.0


def edit(
    model: nn.Module, tok: Any, requests: Sequence[Mapping[str, Any]], hparams: KDPOHyperParams, copy: bool = False
) -> tuple[nn.Module, dict[str, Tensor], list[EditTrace]]:
    """Edit ``model`` so that it answers each request's prompt with its target.

    Args:
        model: a decoder-only ``transformers`` model, edited in place unless ``copy``. What ``torch.compile`` made of
            one will do; the edit itself is not compiled.
        tok: its tokenizer. Neither its padding side nor anything else of it is changed.
        requests: ``[{"prompt": str, "target_new": str}, ...]``, edited in this order. ``"rephrases"``, a list of other
            prompts for the same target, is trained too. ``"subject"``, a part of the prompt, is looked for in it where
            ``fact_token`` is not "all", and guessed where it is missing. Other keys are ignored. A request that repeats
            another is edited once. What else is understood says :func:`kdpo_editor.requests.forms.plain_request`.
        hparams: settings. With the paper's alone, an edit is :func:`kdpo_editor.kdpo.kdpo`, with ``objective: dpo``
            :func:`kdpo_editor.ablation.dpo`, and with any other :func:`kdpo_editor.lifelong.loop.kdpo_l`.
        copy: edit and return a deep copy instead.

    Returns:
        The edited model, the edited matrices as they were, ``{parameter name: tensor}``, and a trace of each edit. It
        is converged where the new answer wins after the prompt, after each of the ``rephrases`` and behind each of the
        sentences that ``context_templates`` puts before it.

    Raises:
        RequestError, ModelError: something cannot be edited; found before anything is changed.
        EditDiverged: a loss or weight became NaN or infinite, or a matrix changed by more than ten times its norm.
            Whatever is raised during an edit, the model is left as it was before the call.
    """
    _check_kinds(model, tok)
    given, model = model, uncompiled(model)
    hparams = complete(hparams, model)
    requests = plain_requests(requests)
    edits, weights = check(model, tok, requests, hparams)
    # Of each request, the first that asks for the same; each is edited once.
    firsts = _firsts(requests)
    edits = [phrasings for i, phrasings in enumerate(edits) if firsts[i] == i]
    spared = preconditioners(model, tok, weights, hparams)
    buffer = ReplayBuffer.of(model, weights) if hparams.replay else None
    if copy:
        unedited, model = model, copying.deepcopy(model)
        given = model
        remember_copy(model, unedited)
        weights = find_matrices(model, hparams)
    originals = {name: w.detach().clone() for name, w in weights.items()}
    forward = CachedForward.above(model, weights, hparams)
    together = [[*chain(*edits)]] if hparams.schedule == "breadth_first" else edits
    with only_training(model, weights, originals), recording(forward, hparams):
        found: list[EditTrace] = []
        for some in together:
            with _scaled(weights, hparams.update_scale):
                if hparams.objective == "dpo":
                    found.append(dpo(forward, weights, some[0], hparams))
                elif len(some) == 1 and hparams.is_published:
                    found.append(kdpo(forward, weights, some[0], hparams))
                else:
                    found += kdpo_l(forward, weights, some, hparams, buffer, spared)
            _check_finite(weights)
        if hparams.update_scale != 1.0:
            _judge(forward, [*chain(*edits)], found, hparams)
        _check_size(weights, originals)
        of_first = dict(zip(sorted(set(firsts)), _split(found, edits), strict=True))
        _say_missed(requests, [of_first[first] for first in firsts], hparams.cycles)
        whole = {first: _of_request(phrasings) for first, phrasings in of_first.items()}
        if buffer is not None:  # last: what fails before it leaves what was kept of the model as well
            buffer.store(model, weights, hparams)
    return given, originals, [whole[first] for first in firsts]


def prepare(model: nn.Module, tok: Any, hparams: KDPOHyperParams) -> None:
    """Compute what a model's first edit needs and every later one shares: second moments, where they are asked for.

    Raises :class:`~kdpo_editor.ModelError` where the model cannot be edited with these settings.
    """
    model = uncompiled(model)
    hparams = complete(hparams, model)
    preconditioners(model, tok, find_matrices(model, hparams), hparams)


def check(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: KDPOHyperParams,
    names: Sequence[str] = (),
) -> tuple[list[list[EditTokens]], dict[str, nn.Parameter]]:
    """Find what an edit would train, or raise what :func:`edit` would before it changes anything.

    ``names``: of the requests, for messages; none: "request 0" and so on.

    Returns the token ids of each request's phrasings, and the matrices by parameter name.

    Raises also :class:`~kdpo_editor.RequestError` where two requests give one prompt different targets.
    """
    _check_kinds(model, tok)
    model = uncompiled(model)
    asked = requests = plain_requests(requests, names)
    names = names or numbered(requests)
    requests = in_contexts(tok, requests, hparams.context_templates)
    edits = tokenize(tok, requests, append_eos=hparams.append_eos, with_subject=hparams.needs_subject, names=names)
    if hparams.objective == "dpo" and any(len(phrasings) > 1 for phrasings in edits):
        raise RequestError("'rephrases' cannot be trained where objective is dpo")
    targets = Targets()
    for name, request, phrasings in zip(names, asked, edits, strict=True):
        targets.take(name, request, phrasings)
    weights = find_matrices(model, hparams)
    _check_layers(model, hparams)
    _check_lengths(model, edits, names)
    return edits, weights


def _check_kinds(model: Any, tok: Any) -> None:
    """Raise where the model or its tokenizer is something else altogether, such as a name."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}; kdpo_editor.load gives one and its tokenizer")
    if not callable(tok):
        raise ModelError(f"the tokenizer is a {type(tok).__name__}; kdpo_editor.load gives a model and its tokenizer")


class Targets:
    """What each prompt of a call, a request's own or a rephrase, is to be answered with."""

    def __init__(self) -> None:
        self._taken: dict[tuple[int, ...], tuple[list[int], str, str]] = {}

    def take(self, name: str, request: Mapping[str, Any], phrasings: Sequence[EditTokens]) -> None:
        """Take up ``request``, called ``name`` in messages, with its ``phrasings``.

        Raises :class:`~kdpo_editor.RequestError`, and takes nothing up, where one of its prompts has another target.
        """
        target = request["target_new"]
        for tokens in phrasings:
            answer, first, other = self._taken.get(tokens.prompt_ids, (tokens.chosen.tolist(), name, target))
            if answer != tokens.chosen.tolist():
                raise RequestError(
                    f"{first} and {name} give the prompt {tokens.text!r:.200} two targets, {other!r:.200} and "
                    f"{target!r:.200}; keep one, or make two calls"
                )
        for tokens in phrasings:
            self._taken.setdefault(tokens.prompt_ids, (tokens.chosen.tolist(), name, target))


@contextmanager
def _scaled(weights: Mapping[str, nn.Parameter], scale: float) -> Iterator[None]:
    """Multiply what ``weights`` change by inside, by ``scale``."""
    start = {name: w.detach().clone() for name, w in weights.items()} if scale != 1.0 else {}
    yield
    with torch.no_grad():
        for name, before in start.items():
            weights[name].copy_(before + scale * (weights[name] - before))


@torch.no_grad()
def _judge(forward: CachedForward, edits: list[EditTokens], traces: list[EditTrace], hparams: KDPOHyperParams) -> None:
    """Say of each trace again whether its edit is won, by the weights as they are now."""
    missed = set(lost(make_batches(forward, edits, hparams)))
    for i, trace in enumerate(traces):
        trace.converged = i not in missed


def _split(traces: Sequence[EditTrace], edits: Sequence[Sequence[EditTokens]]) -> Iterator[list[EditTrace]]:
    """The traces of each request's phrasings."""
    rest = iter(traces)
    for phrasings in edits:
        yield [next(rest) for _ in phrasings]


def _of_request(traces: list[EditTrace]) -> EditTrace:
    """The trace of the prompt, converged only if all phrasings are."""
    return EditTrace(traces[0].cycles, all(trace.converged for trace in traces))


def _say_missed(requests: Sequence[Mapping[str, Any]], traces: Sequence[Sequence[EditTrace]], cycles: int) -> None:
    for request, phrasings in zip(requests, traces, strict=True):
        missed = sum(not trace.converged for trace in phrasings)
        if missed:
            where = f" in {missed} of {len(phrasings)} phrasings" if len(phrasings) > 1 else ""
            LOG.warning(
                "the edit %r -> %r did not reach its target within %d cycles%s",
                request["prompt"],
                request["target_new"],
                cycles,
                where,
            )


def _check_finite(weights: Mapping[str, nn.Parameter]) -> None:
    if not all(torch.isfinite(w).all() for w in weights.values()):
        raise EditDiverged("the edited weights became NaN or infinite")


@torch.no_grad()
def _check_size(weights: Mapping[str, nn.Parameter], originals: Mapping[str, Tensor]) -> None:
    """Weights may grow without bound and stay finite, where a loss hardly depends on the layers that are edited."""
    for name, original in originals.items():
        # Of each expert by itself, where they are stacked.
        change, size = (tensor.float().norm(dim=(-2, -1)) for tensor in (weights[name] - original, original))
        if ((change > LARGEST_CHANGE * size) & (size > 0)).any():
            largest = (change / size)[size > 0].max().item()
            raise EditDiverged(f"{name} changed by {largest:.3g} times its norm")


def _firsts(requests: Sequence[Mapping[str, Any]]) -> list[int]:
    """The position of the first request that asks for the same as each; a repetition is said once."""
    seen: dict[Any, int] = {}
    firsts = [seen.setdefault(same_request(request), i) for i, request in enumerate(requests)]
    for i, first in enumerate(firsts):
        if first < i:
            say_once(f"repeats request {first}, {requests[i]['prompt']!r}; it is edited once", f"request {i}")
    return firsts


def _check_layers(model: nn.Module, hparams: KDPOHyperParams) -> None:
    last = len(find_blocks(model, hparams)) - 1
    if hparams.needs_subject and last in hparams.place[0]:
        raise ModelError(f"layers: {last} is the last layer, where a subject's tokens reach no answer; see fact_token")


def _check_lengths(model: nn.Module, edits: Sequence[Sequence[EditTokens]], names: Sequence[str]) -> None:
    most = room(model)
    for name, phrasings in zip(names, edits, strict=True):
        longest = max(tokens.length for tokens in phrasings)
        if longest > most:
            raise ModelError(f"{name} has {longest} tokens with its target; the model takes {most} at most")
