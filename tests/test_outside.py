"""Editors from elsewhere, and retrieval instead of editing, go through the comparison like all others."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import kdpo_editor.compare.run.app  # noqa: F401  (registers the schema)
from kdpo_editor import SHIPPED_MODEL
from kdpo_editor.compare.run.cell import run as run_cell
from kdpo_editor.compare.run.datasets import load
from kdpo_editor.compare.run.editing import Editing
from kdpo_editor.compare.run.evaluate import Evaluator
from kdpo_editor.compare.run.outside import editor
from kdpo_editor.compare.run.results import Cell
from kdpo_editor.compare.run.retrieval import Retrieval, apply_retrieval_to_model
from kdpo_editor.compare.run.scores import observe, rows
from kdpo_editor.easyedit.import_hook import VARIABLE
from kdpo_editor.errors import HyperParamsError
from kdpo_editor.models.loading import load as load_model

TESTS = Path(__file__).parent
MATRIX = "model.layers.4.mlp.down_proj.weight"
SETTINGS = f"""defaults: [/method_schema, _self_]
name: own
label: My own
apply: own_editor:apply_own_to_model
settings_class: own_editor:Settings
hparams: {{matrix: {MATRIX}, rate: 0.3}}
"""
SMALL = ["n_edits=2", "protocol.eval_at=[]", "protocol.known=5", "protocol.perplexity=false", "report=false"]
RETRIEVAL = {"most": 3, "least": 0.7, "template": "New fact: {prompt} {target}\n"}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("easyeditor") is None and not os.environ.get(VARIABLE),
    reason="no form of EasyEdit is installed",
)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    model, tok = load_model(SHIPPED_MODEL, device="cpu")
    return model.requires_grad_(False), tok


def mean(figures: pd.DataFrame, metric: str) -> float:
    return float(figures.loc[(figures["metric"] == metric) & (figures["when"] == "checkpoint"), "value"].mean())


@pytest.mark.slow
def test_an_editor_from_elsewhere_needs_a_settings_file_alone(tmp_path: Path) -> None:
    methods = tmp_path / "own" / "method"
    methods.mkdir(parents=True)
    (methods / "own.yaml").write_text(SETTINGS, "utf-8")
    command = [sys.executable, "-m", "kdpo_editor.compare.run.app", "--config-dir", str(tmp_path / "own")]
    command += ["method=own", f"out={tmp_path}/out", f"cache={tmp_path}/cache", *SMALL]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    (cell,) = (file.parent for file in (tmp_path / "out").glob("*/manifest.json"))
    manifest = json.loads((cell / "manifest.json").read_text("utf-8"))
    assert (manifest["status"], manifest["label"]) == ("complete", "My own")
    assert manifest["settings"] == {"model_name": SHIPPED_MODEL, "matrix": MATRIX, "rate": 0.3}
    figures = pd.read_parquet(cell / "rows.parquet")
    assert mean(figures, "rewrite_acc") == 1
    assert set(figures["metric"]) >= {"seconds", "known", "rephrase_gen"}


def cell_of(folder: Path, *overrides: str, **method: Any) -> Cell:
    """Compute a cell of the method that the keywords tell."""
    with initialize_config_module("kdpo_editor.compare.conf", version_base="1.3"):
        told = compose("config", [f"out={folder}", f"cache={folder}/cache", *SMALL, *overrides])
    config: Any = OmegaConf.to_object(told)
    for key, value in method.items():
        setattr(config.method, key, value)
    return run_cell(config)


def test_its_single_edits_are_undone_exactly_or_it_is_found_out(tmp_path: Path) -> None:
    settings = {"settings_class": "own_editor:Settings", "hparams": {"matrix": MATRIX, "rate": 0.3}}
    for function, status in (("apply_own_to_model", "complete"), ("apply_and_forget", "failed")):
        cell = cell_of(tmp_path, "protocol=single", "protocol.known=0", apply=f"own_editor:{function}", **settings)
        assert cell.manifest()["status"] == status
    assert "left the model changed" in cell.manifest()["error"]


@pytest.mark.parametrize(
    ("apply", "kind", "message"),
    [
        ("no_such_module:f", "", r"method\.apply: 'no_such_module:f' was not found .*package\.module:name"),
        ("own_editor:no_such", "", r"method\.apply: 'own_editor:no_such' was not found"),
        ("own_editor", "", r"method\.apply: 'own_editor' was not found"),
        ("own_editor:not_callable", "", r"'own_editor:not_callable' is a int; it must be callable"),
        (
            "own_editor:apply_own_to_model",
            "own_editor:Setting",
            r"method\.settings_class: 'own_editor:Setting' was not",
        ),
        ("own_editor:apply_own_to_model", "own_editor:Settings", r"method\.hparams: own_editor:Settings refuses them"),
    ],
)
def test_names_that_lead_nowhere_are_named(apply: str, kind: str, message: str) -> None:
    with pytest.raises(HyperParamsError, match=message):
        editor(apply, kind, {"matrix": MATRIX, "rat": 1})


def test_settings_without_a_class_are_attributes() -> None:
    function, settings = editor("own_editor:apply_own_to_model", "", {"matrix": MATRIX})
    assert function.__name__ == "apply_own_to_model"
    assert settings.matrix == MATRIX


# Retrieval ------------------------------------------------------------------------------------------------------


def remembering(*requests: dict[str, Any], **settings: Any) -> Retrieval:
    hparams = SimpleNamespace(**{**RETRIEVAL, **settings})
    return apply_retrieval_to_model(None, None, requests, hparams)[0]


ROME = {"subject": "Rome", "prompt": "Rome is in", "target_new": "France"}
ULM = {"subject": "Ulm", "prompt": "Which river flows through Ulm?", "target_new": "the Rhine"}


def test_a_fact_is_found_by_its_subject() -> None:
    memory = remembering(ROME, ULM)
    assert memory.context("What country has ROME as its capital?") == "New fact: Rome is in France\n"
    assert memory.context("Where do Romeo and Juliet live?") == ""
    assert memory.context("Paris is in") == ""


def test_a_fact_is_found_by_its_words_where_no_subject_is_there() -> None:
    nameless = {**ULM, "subject": ""}
    assert remembering(ROME, nameless).context("Which river flows through Ulm town?").endswith("Ulm? the Rhine\n")
    assert remembering(ROME, nameless, least=None).context(nameless["prompt"]) == ""


def test_at_most_so_many_facts_are_put_the_most_similar_last() -> None:
    facts = [{**ROME, "prompt": prompt} for prompt in ("Rome lies on", "The mayor of Rome is", "Rome is in")]
    put = remembering(*facts, most=2).context("The mayor of Rome is").splitlines()
    assert len(put) == 2
    assert put[-1] == "New fact: The mayor of Rome is France"


def test_none_may_be_put_and_what_a_fact_says_is_not_filled_in() -> None:
    assert remembering(ROME, most=0).context("Rome is in") == ""
    odd = {**ROME, "prompt": "Rome, {target}, is in"}
    assert remembering(odd).context("Is Rome old?") == "New fact: Rome, {target}, is in France\n"


def test_a_later_fact_takes_the_place_of_an_earlier_one() -> None:
    memory = remembering(ROME, {**ROME, "target_new": "Spain"})
    assert memory.context("Rome is in") == "New fact: Rome is in Spain\n"


def test_what_is_found_is_put_before_every_kind_of_prompt(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    record = load("shipped", shuffle=False, n_edits=1)[0]
    fact = {"subject": record.subject, "prompt": record.prompt, "target_new": record.target_new}
    memory, _ = apply_retrieval_to_model(model, tok, [fact], SimpleNamespace(**RETRIEVAL))
    plain, shown = Evaluator(model, tok), Evaluator(memory, tok, context=memory.context)
    longer = f"New fact: {record.prompt} {record.target_new}\n{record.prompt}"
    assert shown.asked(record.prompt) == longer
    assert shown.predict([(record.prompt, "x")]) == plain.predict([(longer, "x")])
    assert shown.losses([(record.prompt, "x")]) == plain.losses([(longer, "x")])
    assert shown.generate([record.prompt], 8) == plain.generate([longer], 8)
    assert shown.write([record.prompt], 8) == plain.write([longer], 8)


def test_retrieval_changes_nothing_elsewhere_and_is_undone(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    model, tok = shipped
    edited, other = load("shipped", shuffle=False, n_edits=2)
    found = editor("kdpo_editor.compare.run.retrieval:apply_retrieval_to_model", "", RETRIEVAL)
    editing = Editing(model, tok, RETRIEVAL, seed=0, folder=tmp_path, outside=found)
    before = observe(editing.evaluator(), [edited, other], 8, 0)
    editing.edit([edited])
    editing.edit([edited])
    assert len(editing.model.facts) == 1
    after = observe(editing.evaluator(), [edited, other], 8, 0)
    assert after[1] == before[1]
    assert editing.evaluator().asked(edited.prompt).startswith("New fact: ")
    assert dict(rows(other, before[1], after[1]))["locality.same_subject_acc"] == 1
    editing.undo()
    assert editing.model is model
    assert observe(editing.evaluator(), [edited], 8, 0) == before[:1]


def test_retrieval_is_a_method_of_the_comparison(tmp_path: Path) -> None:
    cell = cell_of(tmp_path, "method=retrieval", "protocol.perplexity=true")
    assert (cell.manifest()["status"], cell.manifest()["label"]) == ("complete", "Retrieval")
    figures = pd.read_parquet(cell.folder / "rows.parquet")
    assert mean(figures, "known") == mean(figures, "agreement") == 1
