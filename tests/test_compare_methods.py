"""Methods of the comparison: each leaves nothing behind, keeps its edits, and is measured as EasyEdit measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from comparing import CHECKOUT, HAS_PYPI, VARIABLE, environment

from kdpo_editor import SHIPPED_MODEL
from kdpo_editor.errors import HyperParamsError
from kdpo_editor.hparams import settings_folder

SCENARIOS = Path(__file__).parent / "compare_scenarios.py"
METHODS = [
    "KDPO",
    "KDPO-DPO",
    "KDPO-L",
    "FT-L",
    "FT-M",
    "LoRA",
    "AdaLoRA",
    "ROME",
    "MEMIT",
    "DPO",
    "AlphaEdit",
    "WISE",
    "GRACE",
]
UPSTREAM_ONLY = {"FT-M", "LoRA", "DPO", "AlphaEdit", "WISE", "GRACE"}

pytestmark = pytest.mark.skipif(not HAS_PYPI and not CHECKOUT, reason="no form of EasyEdit is installed")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("pypi", marks=pytest.mark.skipif(not HAS_PYPI, reason="the PyPI form is not installed")),
        pytest.param("upstream", marks=pytest.mark.skipif(not CHECKOUT, reason=f"{VARIABLE} names no checkout")),
    ],
)
def scenarios(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("scenarios")
    run = subprocess.run(
        [sys.executable, str(SCENARIOS), str(folder), *METHODS],
        capture_output=True,
        text=True,
        env=environment(request.param),
        cwd=folder,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return {"form": request.param, **json.loads(run.stdout.splitlines()[-1])}


@pytest.mark.slow
def test_figures_agree_with_the_frameworks(scenarios: dict[str, Any]) -> None:
    pairs = [pair for record in scenarios["framework"] for pair in record.values()]
    assert any(0 < ours < 1 for ours, _ in pairs)
    for ours, theirs in pairs:
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_nothing_behind_and_keeps_its_edits(scenarios: dict[str, Any], method: str) -> None:
    found = scenarios[method]
    if scenarios["form"] == "pypi" and method in UPSTREAM_ONLY:
        assert found is None
        return
    assert found["acts"], "no edit changed how likely its answer is"
    assert found["restored"]
    assert found["evaluation_mode"]
    assert found["use_cache"]
    assert found["trainable"] == found["hooks"] == 0
    assert not found["checkpointing"]
    if found["resumed"] is not None:
        assert found["resumed"], "a resumed sequence ended with other weights"
    # The first edit is there after the second: no adapter was dropped.
    assert found["kept"][0] >= min(found["kept_after_first"], 0.5)


@pytest.mark.slow
def test_wise_is_refused_without_a_spare_record(scenarios: dict[str, Any]) -> None:
    if scenarios["WISE"] is None:
        pytest.skip("this form of EasyEdit has no WISE")
    assert scenarios["alone"].startswith("n_edits: WISE needs a record that is never edited")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["KDPO", "ROME", "MEMIT"])
def test_a_method_works_on_the_shipped_model(scenarios: dict[str, Any], method: str) -> None:
    assert fmean(scenarios[method]["rewrite"]) >= 0.9


@pytest.mark.parametrize(
    "file",
    sorted(file for file in settings_folder().glob("*/*.yaml") if file.stem != "auto"),
    ids=lambda file: f"{file.parent.name}-{file.stem}",
)
def test_settings_fit_the_frameworks_classes(file: Path) -> None:
    from kdpo_editor import easyedit
    from kdpo_editor.compare.run.editing import available

    config = {**yaml.safe_load(file.read_text("utf-8")), "device": 0}
    if config["alg_name"] not in easyedit.methods():
        pytest.skip(f"this form of EasyEdit has no {config['alg_name']}")
    hparams, ignored = easyedit.settings(config)
    assert hparams.model_name == config["model_name"]
    assert available(config) or {"objective_optimization", "lora_type"} & set(ignored)


def test_an_unknown_setting_of_a_rival_is_refused() -> None:
    from kdpo_editor import easyedit

    config = yaml.safe_load((settings_folder() / "ROME" / f"{SHIPPED_MODEL}.yaml").read_text("utf-8"))
    with pytest.raises(HyperParamsError, match="v_lrr"):
        easyedit.settings({**config, "v_lrr": 1})
    del config["v_lr"]
    with pytest.raises(HyperParamsError, match="v_lr"):
        easyedit.settings(config)
