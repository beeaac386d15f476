"""The tuned variants of methods have the best of the settings that were tried."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import yaml

from kdpo_editor.compare import conf
from kdpo_editor.compare.run.derived_settings import run_at_same_depth
from kdpo_editor.derived import default_layers
from kdpo_editor.hparams import settings_folder

TUNING = Path(__file__).parents[1] / "benchmarks/tuning"
(CONF,) = map(Path, conf.__path__)
MODEL = "smollm2-135m"
DEPTH = 30
MEASURED = ("rewrite", "rephrase", "locality", "harmonic_mean")
# By method, the folder of its settings in hparams.
FOLDERS = {
    "kdpo": "KDPO",
    "ft_bf": "FT-BF",
    "ft_m": "FT-M",
    "memit": "MEMIT",
    "ultraedit": "UltraEdit",
    "alphaedit": "AlphaEdit",
    "lora": "LoRA",
    "rome": "ROME",
}
# Its settings are not the best of six, but were chosen on more records.
OURS = {"kdpo_l"}


def test_every_tuned_method_is_looked_at() -> None:
    assert {file.stem.removesuffix("_tuned") for file in (CONF / "method").glob("*_tuned.yaml")} <= FOLDERS.keys()
    assert {file.name.partition("-")[0] for file in TUNING.glob("*.csv")} == FOLDERS.keys() | OURS


@pytest.mark.parametrize("method", FOLDERS)
def test_a_tuned_method_has_the_best_settings(method: str) -> None:
    with open(TUNING / f"{method}-upstream.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert float(rows[0]["harmonic_mean"]) == max(float(row["harmonic_mean"]) for row in rows)
    tuned = CONF / "method" / f"{method}_tuned.yaml"
    settings = yaml.safe_load(tuned.read_text("utf-8"))["hparams"] if tuned.exists() else {}
    for name in (f"{MODEL}.yaml", "auto.yaml"):
        file = settings_folder() / FOLDERS[method] / name
        settings = {**(yaml.safe_load(file.read_text("utf-8")) if file.exists() else {}), **settings}
    if settings.get("layers") is None:
        settings["layers"] = default_layers(DEPTH, range(DEPTH))
    elif isinstance(settings["layers"], str):
        first, last, of = map(int, re.findall(r"\d+", settings["layers"]))
        settings["layers"] = run_at_same_depth(first, last, of, DEPTH)
    best = [row for row in rows if row["harmonic_mean"] == rows[0]["harmonic_mean"]]
    tried = [{key: yaml.safe_load(value) for key, value in row.items() if key not in MEASURED} for row in best]
    assert {key: settings[key] for key in tried[0]} in tried
