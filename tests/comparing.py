"""What tests of the comparison share: small settings, cells in this process, and the command in one of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from kdpo_editor.easyedit.import_hook import VARIABLE

CHECKOUT = os.environ.get(VARIABLE)
HAS_PYPI = importlib.util.find_spec("easyeditor") is not None
FORM = "pypi" if HAS_PYPI else "upstream"
APP = [sys.executable, "-m", "kdpo_editor.compare.run.app"]
# In a single process on a small model: enough to be a comparison.
SMALL = ["n_edits=4", "protocol.eval_at=[2]", "protocol.known=5", "protocol.perplexity=false", "report=false"]


def environment(form: str = FORM) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != VARIABLE}
    if form == "upstream":
        kept[VARIABLE] = str(CHECKOUT)
    return {**kept, "OMP_NUM_THREADS": "1"}


def command(folder: Path, *arguments: str) -> list[str]:
    return [*APP, *arguments, f"out={folder}", f"cache={folder}/cache"]


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *arguments), capture_output=True, text=True, env=environment(), check=False)


def cells(folder: Path) -> dict[str, Path]:
    return {json.loads(f.read_text("utf-8"))["method"]: f.parent for f in folder.glob("*/manifest.json")}


def manifest(cell: Path) -> dict[str, Any]:
    return dict(json.loads((cell / "manifest.json").read_text("utf-8")))


def figures(cell: Path) -> pd.DataFrame:
    """All rows but those that measure the machine."""
    rows = pd.read_parquet(cell / "rows.parquet")
    return rows[~rows["metric"].isin(["seconds", "setup_seconds", "peak_memory", "total_memory"])].reset_index(
        drop=True
    )


def composed(folder: Path, *overrides: str) -> Any:
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    import kdpo_editor.compare.run.app  # noqa: F401  (registers the schema)

    with initialize_config_module("kdpo_editor.compare.conf", version_base="1.3"):
        config = compose("config", [f"out={folder}", f"cache={folder}/cache", *SMALL, *overrides])
    return OmegaConf.to_object(config)
