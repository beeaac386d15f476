"""CounterFact's own scores equal ROME's definition, worked out token by token and then by hand."""

from __future__ import annotations

from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import pandas as pd
import pytest
import torch

from kdpo_editor import SHIPPED_MODEL
from kdpo_editor.compare.report.means import cell_means
from kdpo_editor.compare.run import counterfact
from kdpo_editor.compare.run.datasets import Record, load
from kdpo_editor.compare.run.evaluate import Evaluator
from kdpo_editor.compare.run.scores import Outputs, observe, rows
from kdpo_editor.models.loading import load as load_model

DATA = Path(__file__).parent / "data"
# By the arithmetic of `by_hand` alone: the unedited shipped model on ten records of the package.
TEN = {
    "counterfact.efficacy": 0.2,
    "counterfact.efficacy_magnitude": -0.004097,
    "counterfact.paraphrase": 0.2,
    "counterfact.paraphrase_magnitude": -0.009670,
    "counterfact.neighborhood": 0.6,
    "counterfact.neighborhood_magnitude": 0.000633,
}


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load_model(SHIPPED_MODEL, device="cpu")


@pytest.fixture(scope="module")
def ten() -> list[Record]:
    """Eight records of the package and two as published, with two rephrasings and ten neighbours each."""
    published = load(str(DATA / "counterfact.json"), shuffle=False)
    return [*load("counterfact", shuffle=False, n_edits=10 - len(published)), *published]


def probability(model: Any, tok: Any, prompt: str, answer: str) -> float:
    """The geometric mean of the answer's token probabilities, one token and one forward pass at a time."""
    ids = tok(f"{prompt} {answer}")["input_ids"]
    start = len(tok(prompt)["input_ids"])
    product = 1.0
    for at in range(start, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:at]])).logits[0, -1].double()
        product *= float(logits.exp()[ids[at]] / logits.exp().sum())
    return product ** (1 / (len(ids) - start))


def by_hand(model: Any, tok: Any, record: Record) -> dict[str, float]:
    """Success and magnitude of one record by loops over its prompts."""
    found = {}
    neighbors = [probe.prompt for probe in record.locality["neighborhood"]]
    asked = {"efficacy": [record.prompt], "paraphrase": record.rephrase_prompts, "neighborhood": neighbors}
    for name, prompts in asked.items():
        wins, lead = 0, 0.0
        for prompt in prompts:
            new = probability(model, tok, prompt, record.target_new)
            old = probability(model, tok, prompt, record.ground_truth)
            better, worse = (old, new) if name == "neighborhood" else (new, old)
            wins += better > worse
            lead += better - worse
        found[f"counterfact.{name}"] = wins / len(prompts)
        found[f"counterfact.{name}_magnitude"] = lead / len(prompts)
    return found


def scores(outputs: list[Outputs], records: list[Record]) -> list[dict[str, float]]:
    every = [dict(rows(record, output, output)) for record, output in zip(records, outputs, strict=True)]
    return [{name: value for name, value in each.items() if name.startswith("counterfact.")} for each in every]


def test_ten_records_score_as_worked_out_by_hand(shipped: tuple[Any, Any], ten: list[Record]) -> None:
    found = scores(observe(Evaluator(*shipped), ten, 1, 0, probabilities=True), ten)
    for record, each in zip(ten, found, strict=True):
        assert each == pytest.approx(by_hand(*shipped, record), abs=1e-6)
    means = pd.DataFrame(found).mean().to_dict()
    assert means == pytest.approx(TEN, abs=1e-5)


def test_success_is_by_the_mean_over_tokens_and_reversed_for_neighbours() -> None:
    # Mean losses in nats, new answer first: ln 2 is one half, ln 4 a quarter.
    half, quarter = 0.6931471805599453, 1.3862943611198906
    losses = {"rewrite": [[half, quarter]], "rephrase": [[half, quarter], [quarter, half]]}
    losses[counterfact.NEIGHBORS] = [[half, quarter], [quarter, half], [quarter, half], [half, half]]
    assert dict(counterfact.rows(losses)) == pytest.approx(
        {
            "counterfact.efficacy": 1.0,
            "counterfact.efficacy_magnitude": 0.25,
            "counterfact.paraphrase": 0.5,
            "counterfact.paraphrase_magnitude": 0.0,
            "counterfact.neighborhood": 0.5,
            "counterfact.neighborhood_magnitude": 0.0625,
        }
    )


def test_an_answer_of_several_tokens_is_not_the_less_likely_for_its_length(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    (loss,) = Evaluator(model, tok).losses([("Reedy Glacier is in", "the south of Antarctica")])
    ids = torch.tensor([tok("Reedy Glacier is in the south of Antarctica")["input_ids"]])
    labels = ids.clone()
    labels[:, : len(tok("Reedy Glacier is in")["input_ids"])] = -100
    assert (labels >= 0).sum() > 1
    with torch.no_grad():
        assert loss == pytest.approx(float(model(ids, labels=labels).loss), abs=1e-5)


def test_batches_and_single_answers_agree(shipped: tuple[Any, Any], ten: list[Record]) -> None:
    pairs = [(record.prompt, record.target_new) for record in ten]
    together, alone = (Evaluator(*shipped, alone=alone).losses(pairs) for alone in (False, True))
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_record_without_an_old_answer_has_no_such_scores(shipped: tuple[Any, Any]) -> None:
    records = load(str(DATA / "knowedit-recent.json"), shuffle=False)
    assert scores(observe(Evaluator(*shipped), records, 1, 0, probabilities=True), records) == [{}, {}]


@pytest.mark.parametrize(
    ("score", "of"),
    [
        ("counterfact.score", ("counterfact.efficacy", "counterfact.paraphrase", "counterfact.neighborhood")),
        ("harmonic_mean", ("rewrite_acc", "rephrase_acc", "locality_acc")),
    ],
)
def test_scores_are_harmonic_means_of_means_over_edits(score: str, of: tuple[str, str, str]) -> None:
    told = dict(zip(of, ((1.0, 0.5), (0.5, 0.5), (0.25, 0.75)), strict=True))
    measured = [
        (edit, 2, "checkpoint", name, value) for name, values in told.items() for edit, value in enumerate(values)
    ]
    frame = pd.DataFrame(measured, columns=["edit", "checkpoint", "when", "metric", "value"])
    means = cell_means(frame).set_index("metric")
    assert means.loc[score, "mean"] == pytest.approx(harmonic_mean([0.75, 0.5, 0.5]))
    assert means.loc[score, "edits"] == 2
    lost = cell_means(frame.assign(value=frame["value"].where(frame["metric"] != of[1], 0.0)))
    assert lost.set_index("metric").loc[score, "mean"] == 0
    partly = cell_means(frame[frame["metric"] != of[1]])
    assert score not in set(partly["metric"])
