"""Tune methods for the shipped model, each with the same budget, and keep what was found.

    python benchmarks/tune.py kdpo ft_m ... [--out DIR]

For each method: ``kdpo-compare experiment=tune_<method>``, 18 trials of 15 edits in a row on the validation split;
then, with the best of these, ``experiment=tune_rates``: its rate, a half, a quarter and an eighth of it, 50 edits in
a row. Every trial goes to ``benchmarks/tuning/<method>-<form>.csv``, those of 50 edits first, the best on top. Trials
that are in ``DIR`` already are not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from kdpo_editor import easyedit
from kdpo_editor.compare.run.cell import RATES
from kdpo_editor.compare.run.tune import figures

HERE = Path(__file__).parent
FIGURES = ("edits", "rewrite", "rephrase", "locality", "mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("results/tuning"))
    args = parser.parse_args()
    easyedit.require()
    form = easyedit.form().lower()
    for method in args.methods:
        compare(f"experiment=tune_{method}", f"out={args.out}")
        short = [t for t in trials(args.out, method, form) if t["edits"] == 15]
        best = max(short, key=lambda t: t["mean"])
        keys = [k for k in best if k not in FIGURES and len({str(t[k]) for t in short}) > 1]
        chosen = [f"method.hparams.{k}={json.dumps(best[k])}" for k in keys]
        compare("experiment=tune_rates", f"method={method}", f"out={args.out}", *chosen)
        write(trials(args.out, method, form), keys, HERE / "tuning" / f"{method}-{form}.csv")


def compare(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "kdpo_editor.compare.run.app", *arguments], check=True)


def trials(out: Path, method: str, form: str) -> list[dict[str, Any]]:
    """Settings and figures of each complete trial of a method."""
    found = []
    for file in sorted(out.glob("*/manifest.json")):
        manifest = json.loads(file.read_text("utf-8"))
        if (manifest["status"], manifest["method"], manifest["form"]) == ("complete", method, form):
            config = yaml.safe_load((file.parent / "config.yaml").read_text("utf-8"))["method"]
            found_here = figures(file.parent)
            factor = config.get("rate_factor", 1.0)
            settings = {k: v * factor if k in RATES else v for k, v in config["hparams"].items()}
            mean = fmean(found_here.values())
            found.append({**settings, "edits": manifest["n_edits"], **found_here, "mean": mean})
    return found


def write(rows: list[dict[str, Any]], keys: list[str], file: Path) -> None:
    rows.sort(key=lambda row: (-row["edits"], -row["mean"]))
    file.parent.mkdir(exist_ok=True)
    with open(file, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*keys, *FIGURES], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
