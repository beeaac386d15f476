"""Tune methods for SmolLM2, each with the same number of settings, and keep what every one of them gave.

    python benchmarks/tune.py kdpo_l ft_m ... [--out DIR]

For each method: ``kdpo-compare experiment=tune_<method>``, six settings, each twenty edits of the validation split. All
go to ``benchmarks/tuning/<method>-<form>.csv``, the best on top. Those that are in ``DIR`` already are not run again.
``docs/images/frontier.png`` shows all methods that have such a file. Without methods it is drawn again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import yaml
from comparison_figure import AXES
from matplotlib.figure import Figure

from kdpo_editor import easyedit
from kdpo_editor.compare import conf
from kdpo_editor.compare.report.figures import SETTINGS, styles_of
from kdpo_editor.compare.run.tune import figures, objective

TUNING = Path(__file__).parent / "tuning"
PICTURE = Path(__file__).parents[1] / "docs/images/frontier.png"
HOLDS = 0.9  # the rewrite from which a setting's point is filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("results/tuning"))
    args = parser.parse_args()
    easyedit.require()
    form = easyedit.form().lower()
    for method in args.methods:
        command = [sys.executable, "-m", "kdpo_editor.compare.run.app"]
        subprocess.run([*command, f"experiment=tune_{method}", f"out={args.out}"], check=True)
        if rows := trials(args.out, method, form):
            write(rows, TUNING / f"{method}-{form}.csv")
        else:
            sys.stderr.write(f"{method}: EasyEdit's {form} form does not have it\n")
    with mpl.rc_context(SETTINGS):
        picture(sorted(TUNING.glob(f"*-{form}.csv"))).savefig(PICTURE, dpi=150)


def trials(out: Path, method: str, form: str) -> list[dict[str, Any]]:
    """What differs in the settings of a method's complete trials, and their figures; the best first."""
    found = []
    for file in sorted(out.glob("*/manifest.json")):
        manifest = json.loads(file.read_text("utf-8"))
        if (manifest["status"], manifest["method"], manifest["form"]) == ("complete", method, form):
            folder = file.parent
            found.append((manifest["settings"], {**figures(folder), "harmonic_mean": objective(folder)}))
    if not found:
        return []
    varied = [key for key in found[0][0] if len({json.dumps(settings[key]) for settings, _ in found}) > 1]
    rows = [{**{key: settings[key] for key in varied}, **measured} for settings, measured in found]
    return sorted(rows, key=lambda row: -row["harmonic_mean"])


def write(rows: list[dict[str, Any]], file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    with open(file, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def picture(files: Sequence[Path]) -> Figure:
    """What each setting of each method keeps and how far it carries; hollow where a tenth of the edits is lost."""
    methods = {file: file.stem.rpartition("-")[0] for file in files}
    tried = pd.concat(pd.read_csv(file).assign(method=method, label=label(method)) for file, method in methods.items())
    styles = styles_of(tried)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, settings in tried.groupby("label"):
        look = styles[str(name)] | {"linestyle": ""}
        axes.plot([], [], label=name, **look)
        for held, some in settings.groupby(settings["rewrite"] >= HOLDS):
            axes.plot(some["locality"], some["rephrase"], fillstyle="full" if held else "none", **look)
    axes.set(xlim=(0, 1.04), ylim=(-0.02, 1), **AXES)
    axes.grid(alpha=0.25)
    axes.legend(loc=(0.14, 0.43))
    return figure


def label(method: str) -> str:
    """What the comparison calls ``method``."""
    (folder,) = conf.__path__
    return str(yaml.safe_load((Path(folder) / "method" / f"{method}.yaml").read_text("utf-8"))["label"])


if __name__ == "__main__":
    main()
