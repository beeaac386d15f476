"""Whether edits hold and what they harmed: one model asked the same before them and with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..compare.run.datasets import Record
from ..compare.run.evaluate import Evaluator, accuracy
from ..compare.run.harness import measure as run_tasks
from ..compare.run.known import MARGIN, known_facts, right
from ..edits.delta import EditDelta
from ..edits.measures import less_is_better
from ..edits.switching import edited
from ..requests.answers import begins_with_one
from ..requests.chat import as_chat, chat_of
from ..requests.forms import right_answers
from ..requests.tokens import token_ids

KINDS = ("prompt", "rephrase", "chat")
"""What is asked of the edits themselves."""


@dataclass(frozen=True)
class Measure:
    """One figure before the edits and with them; ``None`` where it could not be measured.

    ``count``: what it is a share of, or the tokens of a text. ``bound``: the least that ``after`` may be, or the most
    where ``at_most``; ``None`` where the unedited model gives none.
    """

    name: str
    before: float | None
    after: float | None
    bound: float | None
    count: int
    at_most: bool = False

    @property
    def holds(self) -> bool | None:
        """Whether ``after`` keeps to the bound; ``None`` where it was not measured."""
        if self.before is None or self.bound is None:
            return None
        if self.after is None:  # what was a number is none any more
            return False
        return self.after <= self.bound if self.at_most else self.after >= self.bound

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), "holds": self.holds}


@dataclass(frozen=True)
class Answer:
    """What was answered to one prompt of an edit.

    ``kind``: one of :data:`KINDS`. ``right``: the target, and what else counts as right.
    """

    kind: str
    prompt: str
    right: tuple[str, ...]
    before: str
    after: str

    @property
    def reached_before(self) -> bool:
        """Whether the unedited model's answer begins with a right one."""
        return begins_with_one(self.before, self.right)

    @property
    def reached(self) -> bool:
        """Whether the edited model's answer begins with a right one."""
        return begins_with_one(self.after, self.right)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        texts = {"kind": self.kind, "prompt": self.prompt, "target_new": self.right[0], "right": list(self.right)}
        said = {"before": self.before, "after": self.after}
        return {**texts, **said, "reached_before": self.reached_before, "reached": self.reached}


@dataclass(frozen=True)
class Bounds:
    """What a check asks for.

    ``prompt``, ``rephrase``, ``chat``: the least share of answers that begin with the target. ``known``: the least
    share of facts still answered right, of those that the unedited model answers right. ``perplexity``: the most that
    it may be, as a multiple of the unedited model's. ``agreement``: the least share of a text's next tokens that both
    models choose alike. ``tasks``: the most that a figure of a task may be below the unedited model's; a perplexity
    among them is held to ``perplexity``.
    """

    prompt: float
    rephrase: float
    chat: float
    known: float
    perplexity: float
    agreement: float
    tasks: float


@dataclass(frozen=True)
class Probes:
    """What is asked beside the edits.

    ``chat``: also every prompt in the model's chat template. ``known``: how many known facts at most, of the data set
    ``source``; 0 for none. ``documents``: texts to read; none leaves perplexity and agreement out. ``tasks``: of the
    evaluation harness, ``limit`` examples of each at most.
    """

    chat: bool
    known: int
    source: str
    documents: Sequence[str]
    tasks: Sequence[str] = ()
    limit: int | None = None


def examine(
    model: nn.Module, tok: Any, delta: EditDelta, probes: Probes, bounds: Bounds
) -> tuple[list[Measure], list[Answer]]:
    """Ask ``model``, which is as before the edits and left so, and again with ``delta`` on it.

    Raises:
        RequestError: the prompts are to be asked in a chat and the tokenizer has no template for one.
        FingerprintError: the model is not as before the edits.
        DataError: the known facts cannot be read.
        HyperParamsError: a task is not known. ``ModuleNotFoundError``: tasks are asked for without the harness.
    """
    requests = _standing(delta.info.requests)
    asked = _asked(tok, requests, probes.chat)
    evaluator = Evaluator(model, tok, progress="before the edits")
    longest = _longest(tok, asked)
    said = _say(evaluator, asked, longest)
    facts = _known(evaluator, requests, probes)
    read = evaluator.read(probes.documents)
    figures = _tasks(evaluator, probes)
    evaluator.progress = "after the edits"
    with edited(model, delta):
        now = _say(evaluator, asked, longest)
        still = right(evaluator, facts)
        reread = evaluator.read(probes.documents)
        refigures = _tasks(evaluator, probes)
    answers = [Answer(*of, *pair) for of, *pair in zip(asked, said, now, strict=True)]
    measures = [_share(kind, [a for a in answers if a.kind == kind], getattr(bounds, kind)) for kind in KINDS]
    found = [m for m in measures if m.count]
    if probes.known:
        share = sum(still) / len(still) if still else None
        found.append(Measure("known", 1.0 if still else None, share, bounds.known, len(still)))
    if probes.documents:
        tokens, same = len(read.choices), _number(accuracy(reread.choices, read.choices))
        most = _number(read.perplexity * bounds.perplexity)
        # What cannot be told from a number is no number: NaN keeps to no bound and is not JSON.
        found += [
            Measure("perplexity", _number(read.perplexity), _number(reread.perplexity), most, tokens, at_most=True),
            Measure("agreement", 1.0 if tokens else None, same, bounds.agreement, tokens),
        ]
    found += [_task(name, figures[name], refigures[name], bounds) for name in figures]
    return found, answers


def _standing(requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The requests, without those whose prompt a later one edits to another target."""
    return list({request["prompt"]: request for request in requests}.values())


_Asked = tuple[str, str, tuple[str, ...]]


def _asked(tok: Any, requests: Sequence[dict[str, Any]], chat: bool) -> list[_Asked]:
    """Kind, prompt and right answers of everything that the edits are asked by."""
    found: list[_Asked] = []
    for request in requests:
        prompt, right = request["prompt"], right_answers(request)
        found.append(("prompt", prompt, right))
        found += [("rephrase", rephrase, right) for rephrase in _rephrasings(request)]
        if chat:
            found.append(("chat", prompt if _is_chat(tok, prompt) else as_chat(tok, prompt), right))
    return found


def _rephrasings(request: dict[str, Any]) -> list[str]:
    """The rephrasings that the edit was made with, and EasyEdit's one, which is for evaluation alone."""
    given = request.get("rephrases", [])
    other = request.get("rephrase_prompt", [])
    texts = [*([given] if isinstance(given, str) else given), *([other] if isinstance(other, str) else other)]
    return [text for text in dict.fromkeys(texts) if text.strip()]


def _is_chat(tok: Any, prompt: str) -> bool:
    """Whether ``prompt`` is in the chat template already, as ``kdpo edit --chat`` records it."""
    end = chat_of(tok).end
    return bool(end.strip()) and prompt.endswith(end)


def _longest(tok: Any, asked: Sequence[_Asked]) -> int:
    """Tokens that the longest right answer may take."""
    return MARGIN + max(len(token_ids(tok, f" {answer}")) for *_, right in asked for answer in right)


def _say(evaluator: Evaluator, asked: Sequence[_Asked], longest: int) -> list[str]:
    prompts = [token_ids(evaluator.tok, prompt) for _, prompt, _ in asked]
    return [text.strip() for text, _ in evaluator.go_on(prompts, longest)]


def _known(evaluator: Evaluator, requests: Sequence[dict[str, Any]], probes: Probes) -> list[Record]:
    """Facts that the unedited model knows, none about a subject that stands in an edit's prompt."""
    if not probes.known:
        return []
    records = [
        Record(r.get("subject") or "", r["prompt"], r["target_new"], "", (), {}, {}, i) for i, r in enumerate(requests)
    ]
    facts = known_facts(evaluator, probes.source, probes.known, records)
    prompts = [request["prompt"].casefold() for request in requests]
    return [f for f in facts if not (f.subject and any(f.subject.casefold() in prompt for prompt in prompts))]


def _share(kind: str, answers: Sequence[Answer], bound: float) -> Measure:
    n = len(answers)
    before = sum(a.reached_before for a in answers) / n if n else None
    return Measure(kind, before, sum(a.reached for a in answers) / n if n else None, bound, n)


def _tasks(evaluator: Evaluator, probes: Probes) -> dict[str, float]:
    return run_tasks(evaluator, probes.tasks, probes.limit, seed=0) if probes.tasks else {}


def _task(name: str, before: float, after: float, bounds: Bounds) -> Measure:
    """One figure of a task: a share, of which more is better, or what is better the less it is."""
    less = less_is_better(name)
    bound = before * bounds.perplexity if less else before - bounds.tasks
    return Measure(name, _number(before), _number(after), _number(bound), 0, at_most=less)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
