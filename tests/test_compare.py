"""Cells of the comparison: complete on disk, computed once, and with settings that say what they are."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml
from comparing import CHECKOUT, HAS_PYPI, cells, composed, figures, manifest

import kdpo_editor
from kdpo_editor import SHIPPED_MODEL
from kdpo_editor.errors import CellBusy, DataError, HyperParamsError, ResultsError

CONF = Path(kdpo_editor.__file__).parent / "compare" / "conf"
DATA = Path(__file__).parent / "data"

pytestmark = pytest.mark.skipif(not HAS_PYPI and not CHECKOUT, reason="no form of EasyEdit is installed")


# Cells ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one complete sequence of KDPO."""
    from kdpo_editor.compare.run.cell import run

    folder = tmp_path_factory.mktemp("finished")
    cell = run(composed(folder))
    assert cell.manifest()["status"] == "complete", (cell.folder / "run.log").read_text("utf-8")
    return folder


def test_a_cell_says_what_was_derived_from_the_model(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    left_out = ("~method.hparams.layers", "method.hparams.rewrite_module_tmp=null", "n_edits=1", "protocol.known=0")
    cell = run(composed(tmp_path, *left_out))
    derived = {"layers": [4], "rewrite_module_tmp": "model.layers.{}.mlp.down_proj"}
    assert manifest(cell.folder)["status"] == "complete"
    assert {key: manifest(cell.folder)["settings"][key] for key in derived} == derived
    written = yaml.safe_load((cell.folder / "config.yaml").read_text("utf-8"))["method"]["hparams"]
    assert {key: written[key] for key in derived} == derived


def test_a_cell_holds_its_settings_versions_figures_and_generations(finished: Path) -> None:
    (cell,) = cells(finished).values()
    found = manifest(cell)
    assert found["versions"]["torch"]
    assert len(found["model_fingerprint"]) == 64
    assert yaml.safe_load((cell / "config.yaml").read_text("utf-8"))["method"]["hparams"]["alg_name"] == "KDPO"
    rows = pd.read_parquet(cell / "rows.parquet")
    measured = set(rows["metric"])
    assert {"rewrite_acc", "rephrase_acc", "locality.same_subject_acc", "rewrite_gen", "rewrite_gen_stop"} <= measured
    at_end = rows[(rows["when"] == "checkpoint") & (rows["checkpoint"] == 4) & (rows["metric"] == "rewrite_acc")]
    assert sorted(at_end["edit"]) == [0, 1, 2, 3]
    at_two = rows[(rows["when"] == "checkpoint") & (rows["checkpoint"] == 2) & (rows["metric"] == "rewrite_acc")]
    assert sorted(at_two["edit"]) == [0, 1]
    said = [json.loads(line) for line in (cell / "generations.jsonl").read_text("utf-8").splitlines()]
    assert {entry["kind"] for entry in said} == {"rewrite", "rephrase"}
    before = [entry for entry in said if entry["when"] == "pre"]
    assert {(entry["checkpoint"], entry["edit"]) for entry in before} == {(0, edit) for edit in range(4)}
    assert not list(cell.glob("checkpoint*"))


def test_each_call_is_timed_and_its_memory_measured_and_set_up_apart(finished: Path) -> None:
    (cell,) = cells(finished).values()
    rows = pd.read_parquet(cell / "rows.parquet").set_index("metric")
    assert list(rows.loc["seconds", "edit"]) == [0, 1, 2, 3]
    assert (rows.loc["seconds", "value"] > 0).all()
    assert rows.loc["setup_seconds", "value"] > 0
    if sys.platform == "linux":
        assert list(rows.loc["peak_memory", "checkpoint"]) == [1, 2, 3, 4]
        matrix = 192 * 768 * 4  # the least that an edit holds is a copy of what it changes
        assert rows.loc["peak_memory", "value"].max() > matrix
        weights = 4_000_000 * 4
        assert rows.loc["total_memory", "value"].min() > rows.loc["peak_memory", "value"].max() + weights


def test_known_facts_are_asked_before_and_at_every_checkpoint(finished: Path) -> None:
    (cell,) = cells(finished).values()
    known = figures(cell).query("metric == 'known'")
    assert list(zip(known["when"], known["checkpoint"], strict=True)) == [
        ("pre", 0),
        ("checkpoint", 2),
        ("checkpoint", 4),
    ]
    assert known["value"].iloc[0] == 1
    assert (known["value"] * 5).round(6).isin(range(6)).all()


def test_stops_are_measured_where_they_are_asked_for(finished: Path, tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    cell = run(composed(tmp_path, "protocol.stops=false", "method=unedited", f"cache={finished}/cache"))
    measured = set(figures(cell.folder)["metric"])
    assert "rewrite_gen" in measured
    assert not [metric for metric in measured if metric.endswith("_stop")]


def test_text_is_read_before_and_at_every_checkpoint(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    cell = run(composed(tmp_path, "protocol.perplexity=true", "protocol.known=0", "n_edits=2"))
    rows = figures(cell.folder).set_index(["metric", "checkpoint"])["value"]
    assert rows["agreement", 0] == 1
    assert 0.5 < rows["agreement", 2] < 1
    assert rows["perplexity", 2] != rows["perplexity", 0]
    assert "known" not in rows.index.get_level_values("metric")


def test_users_are_answered_before_and_at_every_checkpoint(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    cell = run(composed(tmp_path, "protocol.wild=true", "protocol.known=0", "n_edits=2"))
    assert cell.manifest()["status"] == "complete", (cell.folder / "run.log").read_text("utf-8")
    rows = figures(cell.folder)
    asked = rows[rows["metric"] == "wild.rewrite.question_em"]
    assert list(zip(asked["when"], asked["checkpoint"], strict=True)) == [("pre", 0)] * 2 + [("checkpoint", 2)] * 2
    assert asked["value"].iloc[:2].sum() == 0 < asked["value"].iloc[2:].sum()
    said = [json.loads(line) for line in (cell.folder / "generations.jsonl").read_text("utf-8").splitlines()]
    assert {"wild.rewrite.question", "wild.rephrase.instruction"} <= {text["kind"] for text in said}


def test_tasks_are_measured_before_and_at_every_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from kdpo_editor.compare.run.cell import run

    tasks = ["protocol.tasks=[kdpo_facts]", "protocol.tasks_limit=20", "protocol.known=0", "n_edits=2"]
    cell = run(composed(tmp_path, *tasks))
    assert cell.manifest()["status"] == "complete", (cell.folder / "run.log").read_text("utf-8")
    rows = figures(cell.folder)
    asked = rows[rows["metric"] == "tasks.kdpo_facts.acc"]
    assert list(zip(asked["when"], asked["checkpoint"], strict=True)) == [("pre", 0), ("checkpoint", 2)]


def test_counterfact_is_edited_and_scored_without_a_network(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    settings = ["dataset=counterfact", "dataset.known=shipped", "method=unedited", "n_edits=2"]
    cell = run(composed(tmp_path, *settings))
    assert cell.manifest()["status"] == "complete", (cell.folder / "run.log").read_text("utf-8")
    measured = set(figures(cell.folder)["metric"])
    assert {"rewrite_acc", "rephrase_gen", "locality.neighborhood_acc", "known"} <= measured
    assert {"counterfact.efficacy", "counterfact.paraphrase", "counterfact.neighborhood_magnitude"} <= measured


def test_a_validation_split_of_its_own_is_read(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import _records
    from kdpo_editor.compare.run.datasets import load

    subjects = {}
    for split in ("test", "validation"):
        edited, spare = _records(composed(tmp_path, "dataset=counterfact", f"dataset.split={split}", "n_edits=200"))
        subjects[split] = {record.subject for record in [*edited, *spare]}
        assert len(subjects[split]) == 250
    assert subjects["validation"] <= {record.subject for record in load("counterfact-validation")}
    assert subjects["test"] <= {record.subject for record in load("counterfact")}


def test_a_complete_cell_is_left_alone(finished: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    (cell,) = cells(finished).values()
    before = (cell / "rows.parquet").stat().st_mtime_ns
    run(composed(finished))
    assert (cell / "rows.parquet").stat().st_mtime_ns == before


def test_how_many_settings_were_tried_is_noted_also_in_a_complete_cell(finished: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    (cell,) = cells(finished).values()
    before = (cell / "rows.parquet").stat().st_mtime_ns
    assert run(composed(finished, "method.trials=6")).folder == cell
    assert manifest(cell)["trials"] == 6
    assert (cell / "rows.parquet").stat().st_mtime_ns == before
    run(composed(finished))  # which does not say
    assert manifest(cell)["trials"] == 6


def test_another_setting_is_another_cell(finished: Path) -> None:
    from kdpo_editor.compare.run.cell import _cell, _records, _settings

    here, there = (composed(finished, *more) for more in ([], ["method.hparams.lr=5e-3"]))
    hashes = [_cell(told, _records(told)[0], *_settings(told)).hash for told in (here, there)]
    assert hashes[0] != hashes[1]


def test_a_half_written_cell_is_named_and_computed_only_when_asked(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    short = ["n_edits=1", "protocol.eval_at=[]", "protocol.known=0"]
    cell = run(composed(tmp_path, *short)).folder
    (cell / "manifest.json").write_text('{"schema": 1, "ha', "utf-8")
    with pytest.raises(ResultsError, match=r"manifest\.json .*overwrite=true"):
        run(composed(tmp_path, *short))
    assert run(composed(tmp_path, *short, "overwrite=true")).manifest()["status"] == "complete"


def test_two_processes_do_not_compute_the_same_cell(finished: Path) -> None:
    from kdpo_editor.compare.run.cell import _cell, _records, _settings, run

    config = composed(finished)
    with (
        _cell(config, _records(config)[0], *_settings(config)).locked(),
        pytest.raises(CellBusy, match=f"process {os.getpid()} is writing to"),
    ):
        run(config)


def test_single_edits_are_undone_exactly(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    cell = run(composed(tmp_path, "protocol=single", "n_edits=2"))
    assert cell.manifest()["status"] == "complete"
    rows = pd.read_parquet(cell.folder / "rows.parquet")
    assert set(rows.loc[rows["when"] == "checkpoint", "checkpoint"]) == {1}
    # Nothing is asked of a model as a whole, whose edits are undone before anything could be asked again.
    assert set(rows.loc[rows["edit"] < 0, "metric"].astype(str)) == {"setup_seconds"}


def test_outputs_before_any_edit_are_computed_once(finished: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    files = {f: f.stat().st_mtime_ns for f in (finished / "cache" / "before").iterdir()}
    assert len(files) == 2, "the records' probes, and a block of facts"
    run(composed(finished, "method=unedited"))
    assert {f: f.stat().st_mtime_ns for f in (finished / "cache" / "before").iterdir()} == files


def test_the_unedited_model_scores_as_before(finished: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    rows = figures(run(composed(finished, "method=unedited")).folder)
    locality = rows[(rows["when"] == "checkpoint") & rows["metric"].str.startswith("locality")]
    assert (locality["value"] == 1).all()
    assert (rows[rows["metric"] == "known"]["value"] == 1).all()
    pre = rows[(rows["when"] == "pre") & (rows["metric"] == "rewrite_acc")].set_index("edit")["value"]
    post = rows[(rows["checkpoint"] == 4) & (rows["when"] == "checkpoint") & (rows["metric"] == "rewrite_acc")]
    assert (post.set_index("edit")["value"] == pre).all()


def test_more_requests_at_a_time_end_at_every_checkpoint() -> None:
    from kdpo_editor.compare.run.cell import _calls

    assert _calls(10, 4, [1, 10]) == [(0, 1), (1, 5), (5, 9), (9, 10)]


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["protocol=single", "protocol.tasks=[kdpo_facts]"], HyperParamsError, "protocol.tasks.*single keeps none"),
        (["protocol.name=parallel"], HyperParamsError, "protocol.name.*sequence, single"),
        (["dataset.split=train"], HyperParamsError, "dataset.split.*test, validation, all"),
        (["n_edits=1000"], DataError, "1000"),
        (["n_edits=0"], HyperParamsError, "n_edits"),
        (["method.trials=0"], HyperParamsError, "method.trials"),
        (["protocol.judge=http://localhost/v1"], HyperParamsError, "protocol.wild=true and protocol.judge_model"),
        (["dataset.source=nowhere.json"], DataError, "nowhere.json"),
    ],
)
def test_what_cannot_be_met_is_named_before_anything_is_written(
    tmp_path: Path, overrides: Sequence[str], error: type[Exception], words: str
) -> None:
    from kdpo_editor.compare.run.cell import run

    with pytest.raises(error, match=words):
        run(composed(tmp_path, *overrides))
    assert not list(tmp_path.iterdir())


def test_a_record_without_a_target_is_named(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    file = tmp_path / "mine.json"
    good = {"subject": "A", "prompt": "A is", "target_new": "b", "ground_truth": "c", "rephrase_prompt": "What is A?"}
    good |= {"locality_prompt": "D is", "locality_ground_truth": "e"}
    file.write_text(json.dumps([good, {**good, "target_new": ""}]), "utf-8")
    with pytest.raises(DataError, match=r"mine\.json.*1.*target_new"):
        run(composed(tmp_path / "out", "dataset=file", f"dataset.source={file}", "dataset.split=all", "n_edits=1"))


def test_repeated_subjects_are_kept_when_asked_for(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import _records

    file = tmp_path / "mine.json"
    told = {"subject": "A", "prompt": "A is", "target_new": "b"}
    file.write_text(json.dumps([told, {**told, "target_new": "c"}]), "utf-8")
    settings = ["dataset=file", f"dataset.source={file}", "dataset.split=all", "n_edits=2"]
    with pytest.raises(DataError, match="1 records of different subjects"):
        _records(composed(tmp_path / "out", *settings))
    edited, _ = _records(composed(tmp_path / "out", *settings, "dataset.unique_subjects=false"))
    assert {record.target_new for record in edited} == {"b", "c"}


def test_edits_of_one_case_are_of_one_split(tmp_path: Path) -> None:
    from benchmark_records import mquake

    from kdpo_editor.compare.run.cell import _records

    file = tmp_path / "mquake.json"
    file.write_text(json.dumps(mquake()), "utf-8")
    settings = ["dataset=file", f"dataset.source={file}", "n_edits=1"]
    splits = []
    for split in ("test", "validation"):
        edited, spare = _records(composed(tmp_path / "out", *settings, f"dataset.split={split}"))
        splits.append({record.index for record in [*edited, *spare]})
    assert splits[0] | splits[1] == set(range(10))
    assert not splits[0] & splits[1]


def test_the_easyedit_that_ran_is_told_by_its_files(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.results import versions
    from kdpo_editor.easyedit.finding import described

    package = tmp_path / "easyeditor"
    (package / "editors").mkdir(parents=True)
    (package / "editors" / "editor.py").write_text("a = 1\n", "utf-8")
    plain = described(package, "upstream")
    assert re.fullmatch(r"upstream, files [0-9a-f]{12}", plain)
    (package / "editors" / "editor.py").write_text("a = 2\n", "utf-8")
    assert described(package, "upstream") != plain
    (package / "editors" / "editor.py").write_text("a = 1\n", "utf-8")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "All"]):
        subprocess.run([*git, *arguments], check=True)
    committed = described(package, "upstream")
    assert re.fullmatch(r"upstream commit [0-9a-f]{12}, files [0-9a-f]{12}", committed)
    assert committed.endswith(plain.removeprefix("upstream"))
    assert re.fullmatch(r"(PyPI [\w.]+|upstream.*), files [0-9a-f]{12}", versions()["easyeditor"])


# What a cell depends on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "least"),
    [
        ("seed=-1", "seed: -1 is not allowed; it must be 0 or more"),
        ("threads=0", "threads: 0 is not allowed; it must be at least 1"),
        ("dataset.offset=-1", "dataset.offset: -1 is not allowed; it must be 0 or more"),
        ("protocol.known=-5", "protocol.known: -5 is not allowed; it must be 0 or more"),
        ("protocol.fluency=-1", "protocol.fluency: -1 is not allowed; it must be 0 or more"),
        ("protocol.longest=-1", "protocol.longest: -1 is not allowed; it must be 0 or more"),
        ("protocol.batch_size=0", "protocol.batch_size: 0 is not allowed; it must be at least 1"),
        ("protocol.tasks_limit=0", "protocol.tasks_limit: 0 is not allowed; it must be at least 1"),
        ("model.tokens_per_input=-1", "model.tokens_per_input: -1 is not allowed; it must be at least 1"),
        ("model.characters=0", "model.characters: 0 is not allowed; it must be at least 1"),
    ],
)
def test_a_number_that_is_too_small_is_named(tmp_path: Path, override: str, least: str) -> None:
    from kdpo_editor.compare.run.cell import run

    with pytest.raises(HyperParamsError, match=re.escape(least)):
        run(composed(tmp_path, override))


@pytest.mark.parametrize(
    ("prompt", "subject", "said"),
    [
        ("The capital of Peru is", "Lima", "ROME needs the subject word for word in the prompt; 'Lima' is not in"),
        ("The capital of Peru is", "", "ROME needs the subject word for word in the prompt; '' is not in"),
        ("In {curly} words, Lima is", "Lima", "ROME takes no braces in a prompt; 'In {curly} words, Lima is' has some"),
    ],
)
def test_a_record_that_a_method_cannot_edit_is_named(tmp_path: Path, prompt: str, subject: str, said: str) -> None:
    from kdpo_editor.compare.run.cell import run

    good = {"prompt": "Rome is in", "target_new": "Peru", "subject": "Rome"}
    records = [good, {"prompt": prompt, "target_new": "big", "subject": subject}]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    data = ["dataset=file", f"dataset.source={tmp_path}/facts.json", "dataset.split=all", "n_edits=2"]
    found = manifest(run(composed(tmp_path, "method=rome", *data)).folder)
    assert found["status"] == "failed"
    assert found["error"].startswith(f"DataError: record 1: {said}")
    assert "model_fingerprint" not in found  # the model was not even loaded


def test_a_cell_goes_by_what_a_text_says_and_not_by_its_name_alone(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import _cell

    text = tmp_path / "text.txt"
    folders = []
    for said in ("One.", "Two.", "One."):
        text.write_text(said)
        folders.append(_cell(composed(tmp_path, f"model.held_out_text={text}"), [], {}, []).folder)
    assert folders[0] == folders[2] != folders[1]


def test_second_moments_of_ones_own_make_another_cell(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import _cell

    own = [f"stats_dir={tmp_path / name}" for name in ("a", "b")]
    assert len({_cell(composed(tmp_path, *some), [], {}, []).folder for some in ([], own[:1], own[1:])}) == 3


def test_a_method_that_names_no_editor_is_said(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    config = composed(tmp_path)
    del config.method.hparams["alg_name"]
    with pytest.raises(HyperParamsError, match="method kdpo: hparams names no alg_name"):
        run(config)


@pytest.mark.parametrize("algorithm", ["GRACE", "WISE"])
def test_before_its_first_edit_a_model_has_no_wrapper_to_ask_around(algorithm: str) -> None:
    """What the unedited model says is kept for all methods."""
    from kdpo_editor.compare.run.editing import Editing

    bare = SimpleNamespace(_reset=None, algorithm=algorithm, outside=None, model=None, tok=None, _ask_at=None)
    evaluator = Editing.evaluator(bare)  # type: ignore[arg-type]
    assert not evaluator.alone
    assert not evaluator.alike


def test_a_sequence_whose_edits_are_made_again_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """KDPO-L keeps more than weights, its earlier edits, so a checkpoint does not hold all that it leaves behind."""
    from kdpo_editor.compare.run import cell as module

    few = ["method=kdpo_l", "n_edits=3", "protocol.eval_at=[2]", "protocol.known=0", "protocol.perplexity=false"]
    whole = module.run(composed(tmp_path / "whole", *few)).folder
    assert manifest(whole)["status"] == "complete", (whole / "run.log").read_text("utf-8")
    save = module.Cell.save_checkpoint

    def stop(self: Any, *args: Any) -> None:
        save(self, *args)
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(module.Cell, "save_checkpoint", stop)
        module.run(composed(tmp_path / "stopped", *few))
    with caplog.at_level(logging.INFO, "kdpo_editor"):
        again = module.run(composed(tmp_path / "stopped", *few)).folder
    assert manifest(again)["status"] == "complete"
    assert "going on after 2 of 3 edits" in caplog.text
    pd.testing.assert_frame_equal(figures(again), figures(whole))


def test_edits_made_on_other_weights_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdpo_editor.compare.run import cell as module

    def stop(self: object, *args: object) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(module.Cell, "drop_checkpoints", stop)
        stopped = module.run(composed(tmp_path, "n_edits=2"))
    assert "stopped" in manifest(stopped.folder)["error"]
    monkeypatch.setattr(module, "fingerprint", lambda model: "other")
    again = manifest(module.run(composed(tmp_path, "n_edits=2")).folder)
    assert "edits were made on other weights; overwrite=true computes it again" in again["error"]


def test_a_checkpoint_holds_texts_of_any_characters(tmp_path: Path) -> None:
    from kdpo_editor.compare.result_format import IDENTITY
    from kdpo_editor.compare.run.results import Cell, Log

    (tmp_path / "cell").mkdir()
    cell = Cell(tmp_path / "cell", "x", dict.fromkeys(IDENTITY, 0))
    texts = [{"text": "one\u2028two\u2029three\x85four"}, {"text": "five\r\nsix\x0b"}]
    cell.save_checkpoint(1, Log([(0, 1, "checkpoint", "rewrite_acc", 1.0)], texts), {})
    assert cell.load_checkpoint()[1].generations == texts


def test_what_is_tuned_is_of_edits_and_of_what_they_ask(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.tune import figures as tuned
    from kdpo_editor.compare.run.tune import objective

    columns = ["edit", "checkpoint", "when", "metric", "value"]
    rows = [(edit, 2, "checkpoint", "rewrite_acc", 0.5) for edit in (0, 1)]
    pd.DataFrame(rows, columns=columns).to_parquet(tmp_path / "rows.parquet")
    assert objective(tmp_path) == 0.5
    rows += [(0, 2, "checkpoint", f"locality.{key}_acc", 1.0) for key in "abc"]
    rows += [(1, 2, "checkpoint", "locality.a_acc", 0.0), (0, 1, "checkpoint", "rewrite_acc", 0.0)]
    pd.DataFrame(rows, columns=columns).to_parquet(tmp_path / "rows.parquet")
    assert tuned(tmp_path) == {"rewrite": 0.5, "locality": 0.5}


# Experiments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "experiment",
    [
        "smoke",
        "paper_100",
        "paper_500",
        "locft_3k",
        "ablation_dpo",
        "layers",
    ],
)
def test_experiments_compose(experiment: str, tmp_path: Path) -> None:
    config = composed(tmp_path, f"experiment={experiment}")
    assert config.model.name == SHIPPED_MODEL
    assert config.method.hparams["model_name"] == config.model.name


def test_locfts_experiment_takes_its_authors_records_repeated_subjects_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdpo_editor.compare.run.cell import _records

    monkeypatch.setenv("LOCFT", str(tmp_path))
    told = yaml.safe_load((CONF / "experiment" / "locft_3k.yaml").read_text("utf-8"))
    assert told["n_edits"] == 3000
    names = told["hydra"]["sweeper"]["params"]["dataset"].split(",")
    assert names == ["locft_zsre", "locft_counterfact", "locft_wikibigedit"]
    for name, excerpt in zip(names, ("mend-zsre", "counterfact-flat", "wikibigedit-flat"), strict=True):
        config = composed(tmp_path, "experiment=locft_3k", f"dataset={name}")
        with pytest.raises(DataError, match=r"_3k\.json' is no file"):
            _records(config)
        records = json.loads((DATA / f"{excerpt}.json").read_text("utf-8")) * 2
        file = tmp_path / "data" / name.removeprefix("locft_") / f"{name.removeprefix('locft_')}_3k.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(records), "utf-8")
        config.n_edits = len(records)
        edited, rest = _records(config)
        assert (sorted(record.index for record in edited), rest) == (list(range(len(records))), [])


TUNED = sorted(file.stem for file in (CONF / "experiment").glob("tune_*.yaml"))


@pytest.mark.parametrize("experiment", TUNED)
def test_every_method_is_tuned_on_six_settings_of_its_own(experiment: str, tmp_path: Path) -> None:
    config = composed(tmp_path, f"experiment={experiment}")
    assert (config.model.name, config.dataset.split) == ("smollm2-135m", "validation")
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text("utf-8")
    params = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    choices = [yaml.safe_load(f"[{values}]") for values in params.values()]
    assert math.prod(map(len, choices)) == 6
    for key in params:
        assert key.rpartition(".")[2] in config.method.hparams or key.startswith("+")


def test_the_real_models_experiment_composes(tmp_path: Path) -> None:
    config = composed(tmp_path, "experiment=smollm2")
    assert (config.model.name, config.dataset.source) == ("smollm2-135m", "counterfact")
    assert config.dataset.known == "counterfact"
    assert not config.protocol.stops


def test_a_rate_is_multiplied_also_where_another_method_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdpo_editor.compare.run import cell

    monkeypatch.setattr(cell, "available", lambda settings: False)
    rates = []
    for factor in (1, 0.5):
        config = composed(tmp_path, "method=lora", f"method.rate_factor={factor}", f"model.name={SHIPPED_MODEL}")
        settings, (note,) = cell._settings(config)
        assert "knows AdaLoRA instead" in note
        assert settings is not None
        rates.append(settings["lr"])
    assert rates[1] == pytest.approx(rates[0] / 2)


def test_a_method_without_a_rate_has_none_to_multiply(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import _settings

    config = composed(tmp_path, "method=retrieval", "method.rate_factor=0.5", f"model.name={SHIPPED_MODEL}")
    with pytest.raises(HyperParamsError, match=r"method\.rate_factor: retrieval has none of lr"):
        _settings(config)


def test_make_compare_has_ten_methods_in_either_form_of_easyedit(tmp_path: Path) -> None:
    """The form decides that alone, so the shipped model, which need not be converted, stands in for the real one."""
    from kdpo_editor.compare.run.cell import _settings

    makefile = Path(__file__).parents[1] / "Makefile"
    if makefile.exists():
        assert "EXPERIMENT ?= smollm2\n" in makefile.read_text("utf-8")
    text = (CONF / "experiment" / "smollm2.yaml").read_text("utf-8")
    names = yaml.safe_load(text)["hydra"]["sweeper"]["params"]["method"].split(",")
    skipped = []
    for name in names:
        config = composed(tmp_path, f"method={name}", "experiment=smollm2", f"model.name={SHIPPED_MODEL}")
        settings, notes = _settings(config)
        skipped += [name] if notes and settings is None else []
    assert len({*names} - {"unedited", *skipped}) >= 10
