"""The benchmark measures what it says and leaves the model as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench import TOY, Model, calls, distance, edits, floor, in_a_row, plot, report

from kdpo_editor.compare.run.datasets import Record, load


@pytest.fixture(scope="module")
def toy() -> Model:
    return Model.named(TOY)


@pytest.fixture
def records() -> list[Record]:
    return load("shipped", n_edits=3)


def test_a_model_is_made_what_it_was_after_each_method(toy: Model, records: list[Record]) -> None:
    toy.method("KDPO")(records[:1])
    changes = toy.undo()
    assert [*changes] == ["model.layers.4.mlp.down_proj.weight"]
    assert all(torch.equal(p, toy.kept[name]) for name, p in toy.model.named_parameters())


def test_the_cached_forward_does_what_the_plain_forms_do(toy: Model, records: list[Record]) -> None:
    found = edits(toy, ["KDPO", "KDPO, plain", "KDPO-L", "KDPO-L, plain"], records)
    assert [*found["rows"]] == ["KDPO", "KDPO, plain", "KDPO-L", "KDPO-L, plain"]
    assert 0 < max(found["apart"].values()) < 1e-4


def test_the_distance_of_two_changes_is_a_share_of_the_second() -> None:
    change, other = {"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([3.0, 0.0])}
    assert distance(change, change) == 0
    assert distance(other, change) == pytest.approx(0.8)


def test_edits_in_a_row_are_all_held_at_the_end(toy: Model, records: list[Record]) -> None:
    """They are undone together, after the last."""
    assert [*in_a_row(toy, records)] == ["3"]
    assert not toy.undo()


def test_a_report_has_every_part(toy: Model, records: list[Record], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = {
        "machine": "a machine",
        "versions": {"torch": "0"},
        "models": {
            "toy": {
                "weights": "trained",
                "edits": edits(toy, ["KDPO"], records),
                "calls": calls(toy, {"KDPO-L": [2]}, records),
                "floor": {"KDPO": floor(toy, "KDPO", records[0])},
                "in a row": {"10": 1.0},
            }
        },
    }
    text = report(results)
    assert "| KDPO | " in text
    assert "| KDPO-L | 2 | " in text
    assert "KDPO on one fact: " in text
    assert "10th 1.000" in text
    plot(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
