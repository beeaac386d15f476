"""CounterFact's own scores, as ROME publishes them (arXiv 2202.05262): is the new answer likelier than the old one?

An answer's probability after a prompt is ``exp`` of the mean log-probability of its tokens, their geometric mean, so
that long answers are not the less likely for their length. For the edit's prompt (efficacy) and its rephrasings
(paraphrase) success is the share of prompts where the new answer is likelier, for neighbours the share where the old
one is, which is theirs too. The magnitude is the mean difference of the two probabilities, in the direction wanted.
The score is the harmonic mean of the three successes, each averaged over edits first:
:func:`~kdpo_editor.compare.report.means.cell_means`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from .datasets import Record
from .evaluate import Evaluator

# What is asked about an edit, and the score's name for it.
SCORES = {"rewrite": "efficacy", "rephrase": "paraphrase", "locality.neighborhood": "neighborhood"}
NEIGHBORS = "locality.neighborhood"

Losses = dict[str, list[list[float]]]
"""By group, for each prompt the mean negative log-likelihood a token of the new and of the old answer, in nats."""


def prompts(record: Record) -> dict[str, list[str]]:
    """The prompts of a record by group, none where it has no old answer. Neighbours are those whose answer that is."""
    if not record.ground_truth:
        return {}
    neighbors = record.locality.get("neighborhood", ())
    return {
        "rewrite": [record.prompt],
        "rephrase": list(record.rephrase_prompts),
        NEIGHBORS: [probe.prompt for probe in neighbors if record.ground_truth in probe.answers],
    }


def observe(evaluator: Evaluator, records: Sequence[Record]) -> list[Losses]:
    """How likely both answers of every record are, batched over all of them."""
    asked = [
        (i, group, prompt) for i, record in enumerate(records) for group, of in prompts(record).items() for prompt in of
    ]
    pairs = [(prompt, answer) for i, _, prompt in asked for answer in (records[i].target_new, records[i].ground_truth)]
    losses = evaluator.losses(pairs)
    found: list[Losses] = [{} for _ in records]
    for (i, group, _), new, old in zip(asked, losses[::2], losses[1::2], strict=True):
        found[i].setdefault(group, []).append([new, old])
    return found


def rows(losses: Mapping[str, Sequence[Sequence[float]]]) -> Iterator[tuple[str, float]]:
    """Success and magnitude of one record, for each group that it has."""
    for group, pairs in losses.items():
        sign = -1 if group == NEIGHBORS else 1
        leads = [sign * (math.exp(-new) - math.exp(-old)) for new, old in pairs]
        yield f"counterfact.{SCORES[group]}", fmean(sign * (old - new) > 0 for new, old in pairs)
        yield f"counterfact.{SCORES[group]}_magnitude", fmean(leads)
