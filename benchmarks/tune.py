"""Tune methods for SmolLM2, each with the same number of settings, and keep what every one of them gave.

    python benchmarks/tune.py kdpo_l ft_m ... [--out DIR]

For each method: ``kdpo-compare experiment=tune_<method>``, six settings, each twenty edits of the validation split. All
go to ``benchmarks/tuning/<method>-<form>.csv``, the best on top. Those that are in ``DIR`` already are not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from kdpo_editor import easyedit
from kdpo_editor.compare.run.tune import figures, objective

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("results/tuning"))
    args = parser.parse_args()
    easyedit.require()
    form = easyedit.form().lower()
    for method in args.methods:
        command = [sys.executable, "-m", "kdpo_editor.compare.run.app"]
        subprocess.run([*command, f"experiment=tune_{method}", f"out={args.out}"], check=True)
        write(trials(args.out, method, form), HERE / "tuning" / f"{method}-{form}.csv")


def trials(out: Path, method: str, form: str) -> list[dict[str, Any]]:
    """What differs in the settings of a method's complete trials, and their figures; the best first."""
    found = []
    for file in sorted(out.glob("*/manifest.json")):
        manifest = json.loads(file.read_text("utf-8"))
        if (manifest["status"], manifest["method"], manifest["form"]) == ("complete", method, form):
            folder = file.parent
            found.append((manifest["settings"], {**figures(folder), "harmonic_mean": objective(folder)}))
    varied = [key for key in found[0][0] if len({json.dumps(settings[key]) for settings, _ in found}) > 1]
    rows = [{**{key: settings[key] for key in varied}, **measured} for settings, measured in found]
    return sorted(rows, key=lambda row: -row["harmonic_mean"])


def write(rows: list[dict[str, Any]], file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    with open(file, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
