"""Figures of edits and of comparisons, sent to a tracker that stands in for each library."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from kdpo_editor import SHIPPED_MODEL, HyperParamsError
from kdpo_editor.cli.main import main
from kdpo_editor.testbed import load_records
from kdpo_editor.tracking import tracking


class Run:
    """What the three libraries give for a run, noting what it is told."""

    def __init__(self, *place: Any, **said: Any) -> None:
        sys.stdout.write("a tracker's greeting\n")
        self.said, self.figures, self.ended = {"place": place, **said}, [], False

    def log(self, figures: dict[str, float], step: int) -> None:
        self.figures.append((step, figures))

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self.log({key: value}, step)

    def add_text(self, *text: str) -> None:
        self.said["text"] = text

    def finish(self) -> None:
        self.ended = True

    close = finish


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that were opened, in modules that stand in for the libraries."""
    found: list[Run] = []

    def opened(*place: Any, **said: Any) -> Run:
        found.append(Run(*place, **said))
        return found[-1]

    for name, function in (("wandb", "init"), ("trackio", "init"), ("torch.utils.tensorboard", "SummaryWriter")):
        module: Any = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)  # which transformers looks at
        setattr(module, function, opened)
        module.finish = lambda: found[-1].finish()
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.mark.parametrize("tracker", ["trackio", "wandb", "tensorboard"])
def test_figures_reach_the_tracker_and_the_run_is_ended(tracker: str, runs: list[Run], capsys: Any) -> None:
    def fail() -> None:
        with tracking(tracker, "mine", {"lr": 0.1}) as track:
            track({"steps": 8.0}, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    (run,) = runs
    assert (run.figures, run.ended) == ([(1, {"steps": 8.0})], True)
    assert "mine" in str(run.said)
    assert "lr" in str(run.said)
    assert capsys.readouterr().out == "", "results alone go to standard output"


def test_tensorboard_itself_reads_what_was_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    with tracking("tensorboard", "mine", {"lr": 0.1}) as track:
        track({"steps": 8.0}, 1)
        track({"steps": 5.0, "known": 0.5}, 3)
    found = events.EventAccumulator(str(tmp_path / "runs" / "mine"))
    found.Reload()
    said = {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert said == {"steps": [(1, 8.0), (3, 5.0)], "known": [(3, 0.5)]}


TRACKED = """
from kdpo_editor.tracking import tracking
with tracking("trackio", "mine", {"lr": 0.1}) as track:
    track({"steps": 8.0}, 1)
    track({"steps": 5.0}, 3)
"""


@pytest.mark.slow
def test_trackio_itself_keeps_what_was_tracked_and_leaves_standard_output_alone(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", TRACKED], env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
    with sqlite3.connect(tmp_path / "kdpo-editor.db") as kept:
        rows = kept.execute("SELECT step, metrics FROM metrics WHERE run_name = 'mine' ORDER BY step").fetchall()
    assert [(step, json.loads(metrics)["steps"]) for step, metrics in rows] == [(1, 8.0), (3, 5.0)]


def test_nothing_is_tracked_unless_asked_for(runs: list[Run]) -> None:
    with tracking(None, "mine", {}) as track:
        track({"steps": 8.0}, 1)
    assert runs == []


def test_a_tracker_that_is_not_known_is_named() -> None:
    with pytest.raises(HyperParamsError, match="'paper' is not one of trackio, wandb, tensorboard"):
        tracking("paper", "mine", {}).__enter__()


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        tracking("wandb", "mine", {}).__enter__()


def test_each_edit_of_the_command_is_a_step(runs: list[Run], tmp_path: Path, capsys: Any) -> None:
    record = load_records()[1]
    fact = ["--prompt", record["prompt"], "--target", record["target_new"]]
    assert main(["edit", "--model", SHIPPED_MODEL, *fact, "--out", str(tmp_path / "e"), "--log-to", "trackio"]) == 0
    (run,) = runs
    ((step, figures),) = run.figures
    assert (step, figures["converged"], run.ended) == (1, 1.0, True)
    assert figures["steps"] > 0
    assert figures["seconds"] > 0
    assert run.said["config"]["model_name"] == SHIPPED_MODEL
    assert "greeting" not in capsys.readouterr().out


def test_each_checkpoint_of_a_comparison_is_a_step_of_means(runs: list[Run], tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("easyeditor")
    hydra = pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    from kdpo_editor.compare.run import app
    from kdpo_editor.compare.run.cell import run

    assert app
    told = ["method=kdpo", "n_edits=2", "logging=trackio", f"out={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}"]
    told += ["protocol.eval_at=[1,2]", "protocol.known=0", "protocol.fluency=0"]
    with hydra.initialize_config_module("kdpo_editor.compare.conf", version_base="1.3"):
        config = hydra.compose("config", told)
    config.model.device = "cpu"
    cell = run(OmegaConf.to_object(config))
    assert cell.manifest()["status"] == "complete", cell.manifest().get("error")
    (tracked,) = runs
    assert [step for step, _ in tracked.figures] == [1, 2]
    assert tracked.figures[-1][1]["rewrite_acc"] == 1.0
    assert tracked.said["name"] == cell.folder.name
