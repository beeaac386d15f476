"""KDPO through both forms of EasyEdit, as a user would use them; the scenarios run in a process of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kdpo_editor.easyedit.import_hook import VARIABLE
from kdpo_editor.easyedit.placeholders import GONE, lent

SCENARIOS = Path(__file__).parent / "framework_scenarios.py"
MATRIX = "model.layers.{}.mlp.down_proj.weight"
CHECKOUT = os.environ.get(VARIABLE)


def python(code: str | list[str], form: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    if form == "upstream":
        environment[VARIABLE] = str(CHECKOUT)
    arguments = ["-c", code] if isinstance(code, str) else code
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            "pypi",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("easyeditor") is None and not CHECKOUT,
                reason="the PyPI form is not installed: pip install --no-deps easyeditor==0.0.1.dev0",
            ),
        ),
        pytest.param(
            "upstream",
            marks=pytest.mark.skipif(not CHECKOUT, reason=f"{VARIABLE} does not name an upstream EasyEdit checkout"),
        ),
    ],
)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def results(form: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp(form)
    run = python([str(SCENARIOS), "out.json"], form, folder, KDPO_CACHE=str(folder / "cache"))
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(json.loads((folder / "out.json").read_text("utf-8")))


def scenario(results: dict[str, Any], name: str) -> dict[str, Any]:
    result = results[name]
    assert "traceback" not in result, result["traceback"]
    return dict(result)


@pytest.mark.slow
def test_importing_registers_kdpo_and_leaves_nothing_behind(form: str, results: dict[str, Any]) -> None:
    found = scenario(results, "importing")
    assert found["upstream"] is (form == "upstream")
    assert found["lazy"], "importing kdpo_editor imported easyeditor"
    assert found["registered"]
    assert found["import_restored"]
    assert found["stand_ins_left"] == found["lent_names_left"] == []
    assert found["watchers_left"] == 0


@pytest.mark.slow
def test_single_edits_succeed_and_restore_exactly(results: dict[str, Any]) -> None:
    found = scenario(results, "single")
    assert found["restored"]
    assert found["same_model"]
    assert found["originals"]
    assert found["device"] == "cpu"
    assert found["model_name"] == ["kdpo-llama-knowedit"] * 2
    assert min(found["rewrite"]) == 1.0
    assert max(found["pre"]) < 1.0


@pytest.mark.slow
def test_sequential_edits_stay_and_equal_edits_by_hand(results: dict[str, Any]) -> None:
    found = scenario(results, "sequential")
    assert found["changed"]
    assert found["as_by_hand"]
    assert min(found["rewrite"]) == 1.0


@pytest.mark.slow
def test_earlier_edits_are_replayed_in_a_sequence_and_forgotten_when_restored(results: dict[str, Any]) -> None:
    found = scenario(results, "replayed")
    assert len(found["in a row"]) == 4
    assert min(found["in a row"]) >= 1.0
    assert found["restored"] == []


@pytest.mark.slow
def test_batch_edit(results: dict[str, Any]) -> None:
    found = scenario(results, "batch_edit")
    assert found["metrics"] == 3
    assert found["restored"]
    assert sum(found["rewrite"]) / 3 >= 0.9


@pytest.mark.slow
def test_edit_requests(form: str, results: dict[str, Any]) -> None:
    found = scenario(results, "edit_requests")
    assert found["restored"]
    assert min(found["rewrite"]) == 1.0
    assert len(found["locality"]) == 2


@pytest.mark.slow
def test_generate_edit(form: str, results: dict[str, Any]) -> None:
    found = scenario(results, "generate_edit")
    if form == "pypi":
        assert found == {"absent": True}
        return
    assert found["restored"]
    from kdpo_editor.testbed import load_records

    records = load_records()[:2]
    assert found["pre"] == [r["ground_truth"] for r in records]
    assert all(got.startswith(r["target_new"]) for got, r in zip(found["post"], records, strict=True))


@pytest.mark.slow
def test_a_sequence_is_journaled_and_resumed_by_the_next_editor(results: dict[str, Any]) -> None:
    found = scenario(results, "ledger_of_a_sequence")
    assert found["resumed"]
    assert found["as_undisturbed"], "a resumed sequence ends as one in one go, bit for bit"
    assert found["parents"] == [0, 1, 2]
    assert len(found["prompts"]) == 3


@pytest.mark.slow
def test_single_edits_are_journaled_as_taken_back(results: dict[str, Any]) -> None:
    found = scenario(results, "ledger_of_single_edits")
    assert found["restored"]
    assert found["originals"]
    assert found["parents"] == [0, 0, 0], "each began at the unedited model"
    assert found["head"] == 0
    assert found["fresh_editor_is_unedited"]


@pytest.mark.slow
def test_ft_and_rome_run_beside_it(results: dict[str, Any]) -> None:
    found = scenario(results, "rivals")
    assert all(found[method]["restored"] for method in ("FT", "ROME"))
    for method, scores in found.items():
        changed = [pre < 1 and post == 1 for pre, post in zip(scores["pre"], scores["rewrite"], strict=True)]
        assert sum(changed) >= 2, (method, scores)
    assert sum(found["KDPO"]["rewrite"]) / 4 >= 0.95


@pytest.mark.slow
def test_mistakes_reach_the_user_by_name_through_the_framework(results: dict[str, Any]) -> None:
    found = scenario(results, "user_mistakes")
    assert "layers: 40 is outside the model, which has 6 layers" in found["layer"]["error"]
    assert "matches no matrix" in found["module"]["error"]
    assert all(result["unchanged"] for result in found.values())


@pytest.mark.slow
def test_registers_too_when_easyeditor_is_imported_first(form: str, tmp_path: Path) -> None:
    code = (
        "import kdpo_editor.easyedit as e, sys\n"  # lends what the framework lacks; then undo all else it did
        "import easyeditor\n"
        "methods = easyeditor.util.alg_dict.ALG_DICT if hasattr(easyeditor.util, 'alg_dict') else None\n"
        "from easyeditor.util.alg_dict import ALG_DICT\n"
        "del ALG_DICT['KDPO']\n"
        "[sys.modules.pop(m) for m in list(sys.modules) if m.split('.')[0] == 'kdpo_editor']\n"
        "import kdpo_editor\n"
        "assert 'KDPO' in ALG_DICT\n"
    )
    run = python(code, form, tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]


def test_a_module_that_transformers_dropped_is_stood_in_for_and_using_it_is_an_error() -> None:
    framework: dict[str, Any] = {"__name__": "easyeditor.models.unke.unke_main"}
    with lent():
        exec(f"from {GONE} import _prepare_4d_causal_attention_mask as mask", framework)
    if importlib.util.find_spec(GONE) is None:
        with pytest.raises(ModuleNotFoundError, match="installed transformers no longer has it"):
            framework["mask"](None, (1, 2), None, 0)
    with pytest.raises(ModuleNotFoundError), lent():
        exec("import transformers.never_there", framework)


@pytest.mark.slow
def test_a_checkout_without_easyeditor_is_named(tmp_path: Path) -> None:
    run = python("import kdpo_editor, easyeditor", "pypi", tmp_path, **{VARIABLE: str(tmp_path)})
    assert run.returncode != 0
    assert f"{VARIABLE}={tmp_path}: there is no folder easyeditor/ in it" in run.stderr


@pytest.mark.slow
def test_a_missing_framework_is_explained(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.abc, kdpo_editor\n"
        "from kdpo_editor import easyedit\n"
        "sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        "easyedit.require()\n"
    )
    run = python(code, "pypi", tmp_path)
    assert "pip install --no-deps easyeditor==0.0.1.dev0" in run.stderr
    assert VARIABLE in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("checkout", ["nowhere", "."])
def test_importing_kdpo_editor_looks_for_nothing_and_changes_no_path(tmp_path: Path, checkout: str) -> None:
    code = "import sys; before = list(sys.path); import kdpo_editor; sys.exit(sys.path != before)"
    run = python(code, "pypi", tmp_path, **{VARIABLE: str(tmp_path / checkout)})
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_importing_kdpo_editor_does_not_import_easyeditor(tmp_path: Path) -> None:
    run = python("import sys, kdpo_editor; sys.exit('easyeditor' in sys.modules)", "pypi", tmp_path)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_a_model_in_a_gguf_file_is_edited_by_its_path(results: dict[str, Any]) -> None:
    found = scenario(results, "gguf_file")
    assert found["rewrite"] == 1.0
    assert found["edited"]
    assert found["names"] == ["tiny-llama.gguf"] * 3
