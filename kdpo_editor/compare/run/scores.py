"""From a model's outputs on the probes of many records to rows of figures.

Names are EasyEdit's: ``rewrite_acc``, ``rephrase_acc``, ``locality.<key>_acc``, ``portability.<key>_acc`` and
``fluency.ngram_entropy``. Beside them stand ``<...>_gen``, whether the greedy answer begins with an accepted one, and
``<...>_gen_stop``, whether it is an accepted one and the model stopped there. ``counterfact.<...>`` are that data
set's own scores (:mod:`~.counterfact`), ``wild.<...>`` those of :mod:`~.wild`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from . import counterfact, wild
from .datasets import Probe, Record
from .evaluate import Evaluator, Generation, accuracy, ngram_entropy
from .judge import Judge


@dataclass
class Outputs:
    """What a model says to the probes of one record.

    ``predicted``, ``wanted``: token ids at the answer's positions under teacher forcing, per probe of each group.
    ``generated``: free answers, per probe of each group; locality is not generated.
    ``losses``: of the new and of the old answer; ``wild``: what a user is answered. Both where they were asked for.
    """

    predicted: dict[str, list[list[int]]]
    wanted: dict[str, list[list[int]]]
    generated: dict[str, list[Generation]]
    fluency: float | None = None
    losses: counterfact.Losses = field(default_factory=dict)
    wild: wild.Answers = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        said = {k: [[g.text, g.stopped] for g in v] for k, v in self.generated.items()}
        return {**vars(self), "generated": said}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outputs:
        """The reverse of :meth:`to_json`."""
        said = {k: [Generation(*g) for g in v] for k, v in data["generated"].items()}
        return cls(**{**data, "generated": said})


def probes(record: Record) -> dict[str, tuple[Probe, ...]]:
    """What is asked about one edit, by group: ``rewrite``, ``rephrase``, ``locality.<key>``, ``portability.<key>``."""
    new = (record.target_new,)
    return {
        "rewrite": (Probe(record.prompt, new),),
        "rephrase": tuple(Probe(prompt, new) for prompt in record.rephrase_prompts),
        **{f"locality.{key}": group for key, group in record.locality.items()},
        **{f"portability.{key}": group for key, group in record.portability.items()},
    }


def observe(
    evaluator: Evaluator,
    records: Sequence[Record],
    longest: int,
    fluency: int,
    probabilities: bool = False,
    as_users: bool = False,
    judge: Judge | None = None,
) -> list[Outputs]:
    """Ask everything about ``records``, batched over all of them.

    ``longest``: tokens generated at most for an answer. ``fluency``: tokens generated for the n-gram entropy, or 0.
    ``probabilities``: also how likely the new and the old answer are. ``as_users``: also in WILD's three forms, which
    ``judge`` may judge.
    """
    asked = [
        (i, group, probe) for i, record in enumerate(records) for group, of in probes(record).items() for probe in of
    ]
    # An answer that is not known (locality may lack one) is replaced by a word: only agreement is looked at.
    forced = evaluator.predict([(p.prompt, p.answers[0] if p.answers else "the") for _, _, p in asked])
    free = [(i, group, probe) for i, group, probe in asked if not group.startswith("locality.")]
    said = evaluator.generate([p.prompt for _, _, p in free], longest)
    outputs = [Outputs({}, {}, {}) for _ in records]
    for (i, group, _), (predicted, wanted) in zip(asked, forced, strict=True):
        outputs[i].predicted.setdefault(group, []).append(predicted)
        outputs[i].wanted.setdefault(group, []).append(wanted)
    for (i, group, _), generation in zip(free, said, strict=True):
        outputs[i].generated.setdefault(group, []).append(generation)
    if fluency:
        written = evaluator.write([record.prompt for record in records], fluency)
        for output, text in zip(outputs, written, strict=True):
            output.fluency = ngram_entropy(text)
    if probabilities:
        for output, losses in zip(outputs, counterfact.observe(evaluator, records), strict=True):
            output.losses = losses
    if as_users:
        for output, answers in zip(outputs, wild.observe(evaluator, records, judge), strict=True):
            output.wild = answers
    return outputs


def rows(record: Record, before: Outputs, now: Outputs, stops: bool = False) -> Iterator[tuple[str, float]]:
    """Metric and value of one record, given what the model said before any edit and says now.

    ``stops``: also whether answers stop, for models that are to say no more than the answer.
    """
    asked = probes(record)
    for group, predicted in now.predicted.items():
        reference = before.predicted[group] if group.startswith("locality.") else now.wanted[group]
        yield f"{group}_acc", fmean(accuracy(p, r) for p, r in zip(predicted, reference, strict=True))
    for group, said in now.generated.items():
        pairs = list(zip(said, asked[group], strict=True))
        yield f"{group}_gen", fmean(g.answers(p.answers) for g, p in pairs)
        if stops:
            yield f"{group}_gen_stop", fmean(g.answers_and_stops(p.answers) for g, p in pairs)
    if now.fluency is not None:
        yield "fluency.ngram_entropy", now.fluency
    yield from counterfact.rows(now.losses)
    yield from wild.rows(now.wild)


def texts(record: Record, now: Outputs) -> Iterator[dict[str, Any]]:
    """The raw generations of one record."""
    for group, said in now.generated.items():
        for generation, probe in zip(said, probes(record)[group], strict=True):
            yield {
                "kind": group,
                "prompt": probe.prompt,
                "wanted": list(probe.answers),
                "text": generation.text,
                "stopped": generation.stopped,
            }
    for kind, answers in now.wild.items():
        for answer in answers:
            yield {"kind": f"wild.{kind}", **answer, "wanted": [answer["wanted"]]}
