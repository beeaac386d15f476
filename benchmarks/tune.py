"""Tune methods for the shipped model, each with the same budget, and keep what was found.

    python benchmarks/tune.py kdpo ft_m ... [--out DIR]

Runs ``kdpo-compare experiment=tune_<method>`` (18 trials on the validation split, see
``kdpo_editor/compare/conf/tuning.yaml``) for each method, then writes every trial in ``DIR``, best first, to
``benchmarks/tuning/<method>-<form>.csv``. Trials that are there already are not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from kdpo_editor.compare.tune import objective

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("results/tuning"))
    args = parser.parse_args()
    for method in args.methods:
        command = [sys.executable, "-m", "kdpo_editor.compare.app", f"experiment=tune_{method}", f"out={args.out}"]
        subprocess.run(command, check=True)
    trials: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in sorted(args.out.glob("*/manifest.json")):
        manifest = json.loads(file.read_text("utf-8"))
        if manifest["status"] == "complete":
            trials.setdefault((manifest["method"], manifest["form"]), []).append(trial(file.parent))
    (HERE / "tuning").mkdir(exist_ok=True)
    for (method, form), rows in trials.items():
        searched = [k for k in rows[0] if k in FIGURES or len({str(row[k]) for row in rows}) > 1]
        rows.sort(key=lambda row: -row["mean"])
        with open(HERE / "tuning" / f"{method}-{form}.csv", "w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, searched, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


FIGURES = ("rewrite", "rephrase", "locality", "mean")


def trial(cell: Path) -> dict[str, Any]:
    """Settings and figures of one trial."""
    hparams = yaml.safe_load((cell / "config.yaml").read_text("utf-8"))["method"]["hparams"]
    frame = pd.read_parquet(cell / "rows.parquet")
    frame = frame[frame["when"] == "checkpoint"]
    kinds = frame["metric"].str.extract(r"^(rewrite|rephrase|locality)(?:\..*)?_acc$")[0]
    return {**hparams, **frame.groupby(kinds)["value"].mean().to_dict(), "mean": objective(cell)}


if __name__ == "__main__":
    main()
