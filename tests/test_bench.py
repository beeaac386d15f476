"""The benchmark measures what it says and leaves the model as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench import Model, calls, distance, edits, floor, in_a_row, plot, report, requests

from kdpo_editor import SHIPPED_MODEL
from kdpo_editor.compare.run.datasets import Record, load
from kdpo_editor.engine.generation import says_target


@pytest.fixture(scope="module")
def small() -> Model:
    return Model.named(SHIPPED_MODEL)


@pytest.fixture
def records() -> list[Record]:
    return load("shipped", n_edits=3)


def test_a_model_is_made_what_it_was_after_each_method(small: Model, records: list[Record]) -> None:
    small.method("KDPO")(records[:1])
    changes = small.undo()
    assert [*changes] == ["model.layers.4.mlp.down_proj.weight"]
    assert all(torch.equal(p, small.kept[name]) for name, p in small.model.named_parameters())


def test_the_cached_forward_does_what_the_plain_forms_do(small: Model, records: list[Record]) -> None:
    found = edits(small, ["KDPO", "KDPO, plain", "KDPO-L", "KDPO-L, plain"], records)
    assert [*found["rows"]] == ["KDPO", "KDPO, plain", "KDPO-L", "KDPO-L, plain"]
    assert 0 < max(found["apart"].values()) < 1e-4


def test_the_distance_of_two_changes_is_a_share_of_the_second() -> None:
    change, other = {"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([3.0, 0.0])}
    assert distance(change, change) == 0
    assert distance(other, change) == pytest.approx(0.8)


def test_edits_in_a_row_are_all_held_at_the_end(
    small: Model, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are undone together, after the last."""
    held, undo = [], small.undo

    def undone() -> bool:
        held.append(says_target(small.model, small.tok, requests(records)))
        return undo()

    monkeypatch.setattr(small, "undo", undone)
    assert [*in_a_row(small, records)] == ["3"]
    assert held == [[True] * 3]
    assert not undo()


def test_a_report_has_every_part(small: Model, records: list[Record], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = {
        "machine": "a machine",
        "versions": {"torch": "0"},
        "models": {
            "small": {
                "weights": "trained",
                "edits": edits(small, ["KDPO"], records),
                "calls": calls(small, {"KDPO-L": [2]}, records),
                "floor": {"KDPO": floor(small, "KDPO", records[0])},
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
