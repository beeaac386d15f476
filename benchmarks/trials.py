"""Every trial of a search as a line of a CSV file, the best of each method on top.

kdpo-compare experiment=frontier out=results/frontier
python benchmarks/trials.py results/frontier frontier.csv
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import yaml

from kdpo_editor.compare.run.cell import RATES
from kdpo_editor.compare.run.tune import figures

SETTINGS = (
    *("layers", "fact_token", "objective", "optimizer", "num_steps", "margin", "mom2_weight", "mom2_n_samples"),
    *("context_templates", "mom2_update_weight", "v_weight_decay"),
)
FIGURES = ("rewrite", "rephrase", "locality", "known", "generated", "mean")


def trials(results: Path) -> list[dict[str, Any]]:
    """Settings and figures of each complete cell below ``results``, method by method, the best first."""
    found = []
    for file in results.glob("*/manifest.json"):
        manifest = json.loads(file.read_text("utf-8"))
        if manifest["status"] != "complete":
            continue
        method = yaml.safe_load((file.parent / "config.yaml").read_text("utf-8"))["method"]
        rows = pd.read_parquet(file.parent / "rows.parquet")
        last = rows[(rows["when"] == "checkpoint") & (rows["checkpoint"] == rows["checkpoint"].max())]
        here = figures(file.parent)
        here["known"] = last[last.metric == "known"].value.mean()
        line = {key: method["hparams"].get(key) for key in SETTINGS} | here
        line |= {"method": manifest["method"], "seed": manifest["seed"], "mean": fmean(here.values())}
        line["edits"] = manifest["n_edits"]
        line["generated"] = last[last.metric == "rewrite_gen"].value.mean()
        line["rate"] = next(method["hparams"][k] for k in RATES if k in method["hparams"]) * method["rate_factor"]
        found.append(line)
    return sorted(found, key=lambda line: (line["method"], -line["mean"]))


def main(results: str, out: str) -> None:
    with open(out, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["method", "edits", "seed", "rate", *SETTINGS, *FIGURES], lineterminator="\n")
        writer.writeheader()
        for line in trials(Path(results)):
            writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
