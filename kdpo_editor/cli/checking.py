"""Whether edits hold and what they harmed: one model asked the same before them and with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..compare.run.datasets import Record
from ..compare.run.evaluate import Evaluator, accuracy
from ..compare.run.known import MARGIN, known_facts, right
from ..edits.delta import EditDelta
from ..edits.switching import edited
from ..engine.answers import begins_with
from ..requests import as_chat, token_ids, tokenize

KINDS = ("prompt", "rephrase", "chat")
"""What is asked of the edits themselves."""


@dataclass(frozen=True)
class Measure:
    """One figure before the edits and with them; ``None`` where it could not be measured.

    ``count``: what it is a share of, or the tokens of a text. ``bound``: the least that ``after`` may be, or the most
    where ``at_most``.
    """

    name: str
    before: float | None
    after: float | None
    bound: float
    count: int
    at_most: bool = False

    @property
    def holds(self) -> bool | None:
        """Whether ``after`` keeps to the bound; ``None`` where it was not measured."""
        if self.after is None:
            return None
        return self.after <= self.bound if self.at_most else self.after >= self.bound

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), "holds": self.holds}


@dataclass(frozen=True)
class Answer:
    """What was answered to one prompt of an edit; ``kind`` is one of :data:`KINDS`."""

    kind: str
    prompt: str
    target_new: str
    before: str
    after: str

    @property
    def reached(self) -> bool:
        """Whether the edited model's answer begins with the target."""
        return begins_with(self.after, self.target_new)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), "reached": self.reached}


@dataclass(frozen=True)
class Bounds:
    """What a check asks for.

    ``prompt``, ``rephrase``, ``chat``: the least share of answers that begin with the target. ``known``: the least
    share of facts still answered right, of those that the unedited model answers right. ``perplexity``: the most that
    it may be, as a multiple of the unedited model's. ``agreement``: the least share of a text's next tokens that both
    models choose alike.
    """

    prompt: float = 1.0
    rephrase: float = 1.0
    chat: float = 1.0
    known: float = 0.9
    perplexity: float = 1.05
    agreement: float = 0.9


@dataclass(frozen=True)
class Probes:
    """What is asked beside the edits.

    ``chat``: also every prompt in the model's chat template. ``known``: how many known facts at most, of the data set
    ``source``; 0 for none. ``documents``: texts to read; none leaves perplexity and agreement out.
    """

    chat: bool
    known: int
    source: str
    documents: Sequence[str]


def examine(
    model: nn.Module, tok: Any, delta: EditDelta, probes: Probes, bounds: Bounds
) -> tuple[list[Measure], list[Answer]]:
    """Ask ``model``, which is as before the edits and left so, and again with ``delta`` on it.

    Raises:
        RequestError: the prompts are to be asked in a chat and the tokenizer has no template for one.
        FingerprintError: the model is not as before the edits.
        DataError: the known facts cannot be read.
    """
    requests = _standing(delta.info.requests)
    asked = _asked(tok, requests, probes.chat)
    evaluator = Evaluator(model, tok, progress="before the edits")
    longest = _longest(tok, requests)
    said = _say(evaluator, asked, longest)
    facts = _known(evaluator, requests, probes)
    read = evaluator.read(probes.documents)
    evaluator.progress = "after the edits"
    with edited(model, delta):
        now = _say(evaluator, asked, longest)
        still = right(evaluator, facts)
        reread = evaluator.read(probes.documents)
    answers = [Answer(*of, *pair) for of, *pair in zip(asked, said, now, strict=True)]
    measures = [_share(kind, [a for a in answers if a.kind == kind], getattr(bounds, kind)) for kind in KINDS]
    found = [m for m in measures if m.count]
    if probes.known:
        share = sum(still) / len(still) if still else None
        found.append(Measure("known", 1.0 if still else None, share, bounds.known, len(still)))
    if probes.documents:
        tokens = len(read.choices)
        most = read.perplexity * bounds.perplexity
        # What cannot be told from a number is no number: NaN keeps to no bound and is not JSON.
        found += [
            Measure("perplexity", _number(read.perplexity), _number(reread.perplexity), most, tokens, at_most=True),
            Measure("agreement", 1.0, _number(accuracy(reread.choices, read.choices)), bounds.agreement, tokens),
        ]
    return found, answers


def _standing(requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The requests, without those whose prompt a later one edits to another target."""
    return list({request["prompt"]: request for request in requests}.values())


def _asked(tok: Any, requests: Sequence[dict[str, Any]], chat: bool) -> list[tuple[str, str, str]]:
    """Kind, prompt and target of everything that the edits are asked by."""
    found = []
    for request in requests:
        prompt, target = request["prompt"], request["target_new"]
        found.append(("prompt", prompt, target))
        found += [("rephrase", rephrase, target) for rephrase in _rephrasings(request)]
        if chat:
            found.append(("chat", prompt if _is_chat(tok, prompt) else as_chat(tok, prompt), target))
    return found


def _rephrasings(request: dict[str, Any]) -> list[str]:
    """The rephrasings that the edit was made with, and EasyEdit's one, which is for evaluation alone."""
    given = request.get("rephrases", [])
    other = request.get("rephrase_prompt", [])
    texts = [*([given] if isinstance(given, str) else given), *([other] if isinstance(other, str) else other)]
    return [text for text in dict.fromkeys(texts) if text.strip()]


def _is_chat(tok: Any, prompt: str) -> bool:
    """Whether ``prompt`` is in the chat template already, as ``kdpo edit --chat`` records it."""
    end = as_chat(tok, "QUESTION").rpartition("QUESTION")[2]
    return bool(end.strip()) and prompt.endswith(end)


def _longest(tok: Any, requests: Sequence[dict[str, Any]]) -> int:
    pairs = [{"prompt": r["prompt"], "target_new": r["target_new"]} for r in requests]
    return MARGIN + max((len(edit.chosen) for edit, *_ in tokenize(tok, pairs)), default=0) if pairs else MARGIN


def _say(evaluator: Evaluator, asked: Sequence[tuple[str, str, str]], longest: int) -> list[str]:
    prompts = [token_ids(evaluator.tok, prompt) for _, prompt, _ in asked]
    return [text.strip() for text, _ in evaluator.go_on(prompts, longest)]


def _known(evaluator: Evaluator, requests: Sequence[dict[str, Any]], probes: Probes) -> list[Record]:
    """Facts that the unedited model knows, none about a subject that stands in an edit's prompt."""
    if not probes.known:
        return []
    records = [
        Record(r.get("subject", ""), r["prompt"], r["target_new"], "", (), {}, {}, i) for i, r in enumerate(requests)
    ]
    facts = known_facts(evaluator, probes.source, probes.known, records, lambda _, compute: compute())
    prompts = [request["prompt"].casefold() for request in requests]
    return [f for f in facts if not (f.subject and any(f.subject.casefold() in prompt for prompt in prompts))]


def _share(kind: str, answers: Sequence[Answer], bound: float) -> Measure:
    n = len(answers)
    before = sum(begins_with(a.before, a.target_new) for a in answers) / n if n else None
    return Measure(kind, before, sum(a.reached for a in answers) / n if n else None, bound, n)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
