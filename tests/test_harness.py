"""General ability by lm-evaluation-harness: the figures of its own command, offline, on the model in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kdpo_editor import SHIPPED_MODEL
from kdpo_editor.compare.run import harness
from kdpo_editor.compare.run.datasets import load
from kdpo_editor.compare.run.evaluate import Evaluator
from kdpo_editor.errors import HyperParamsError
from kdpo_editor.models.loading import load as load_model

OWN = """task: taught
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{[old, new]}}}}"
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load_model(SHIPPED_MODEL, device="cpu")


def test_what_is_missing_is_named(shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"tasks need lm_eval.*: pip install 'kdpo-editor\[harness"):
        harness.measure(Evaluator(*shipped), ["kdpo_facts"], 4, 0)


@pytest.mark.slow
def test_figures_are_those_of_the_harnesss_own_command(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model, tok = shipped
    ours = harness.measure(Evaluator(model, tok), ["kdpo_facts"], 50, 0)
    model.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "kdpo_facts", "--limit", "50"]
    command += ["--model_args", f"pretrained={tmp_path}/model,dtype=float32", "--device", "cpu", "--batch_size", "8"]
    command += ["--include_path", str(harness.TASKS), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text("utf-8"))["results"]["kdpo_facts"]
    assert ours == {
        "tasks.kdpo_facts.acc": pytest.approx(theirs["acc,none"]),
        "tasks.kdpo_facts.acc_norm": pytest.approx(theirs["acc_norm,none"]),
    }
    assert 0 < ours["tasks.kdpo_facts.acc"] < 1


def test_an_edit_shows_and_the_model_is_left_as_it_was(shipped: tuple[Any, Any]) -> None:
    pytest.importorskip("lm_eval")
    model, tok = shipped
    model.train()
    before = harness.measure(Evaluator(model, tok), ["kdpo_facts"], 50, 0)
    weight = model.model.layers[4].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-3)
        damaged = harness.measure(Evaluator(model, tok), ["kdpo_facts"], 50, 0)
        weight.copy_(kept)
    assert damaged != before
    assert harness.measure(Evaluator(model, tok), ["kdpo_facts"], 50, 0) == before
    assert model.training
    model.eval()


def test_a_task_file_of_ones_own_works_offline(
    shipped: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    facts = load("shipped", shuffle=False, n_edits=4)
    # The model was taught the old answers; of one fact the other answer is called right.
    rows = [
        {"prompt": f.prompt, "old": f.ground_truth, "new": f.target_new, "right": int(f is facts[0])} for f in facts
    ]
    (tmp_path / "facts.json").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (tmp_path / "taught.yaml").write_text(OWN.format(file=tmp_path / "facts.json"), "utf-8")
    found = harness.measure(Evaluator(*shipped), [str(tmp_path / "taught.yaml")], None, 0)
    assert found == {"tasks.taught.acc": 0.75}


def test_an_unknown_task_is_named(shipped: tuple[Any, Any]) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(HyperParamsError, match=r"^'no_such_task' is no task .* own are kdpo_facts"):
        harness.measure(Evaluator(*shipped), ["no_such_task"], 1, 0)


def test_a_method_that_acts_at_a_fixed_place_is_left_out(shipped: tuple[Any, Any]) -> None:
    pytest.importorskip("lm_eval")
    assert harness.measure(Evaluator(*shipped, alike=True), ["kdpo_facts"], 1, 0) == {}
