"""The table that the pages show of a comparison: python benchmarks/comparison_table.py results/smollm2 OUT.csv

Of the table after the last edit, which `kdpo-report` wrote beside the results, the columns that all pages share. Means
over seeds, in the digits shown; methods by the harmonic mean of rewrite, rephrase and neighbours, the best first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import harmonic_mean

import pandas as pd

from kdpo_editor.compare.report.means import UNEDITED

# Our heading, theirs, decimals.
COLUMNS = (
    ("rewrite", "rewrite_acc", 3),
    ("generated", "rewrite_gen", 2),
    ("rephrase", "rephrase_acc", 3),
    ("neighbours", "locality_acc", 3),
    ("known", "known", 3),
    ("overreach", "overreach", 3),
    ("perplexity", "perplexity", 2),
    ("s/edit", "seconds", 1),
    ("MB", "peak_memory", 0),
)
RANKED_BY = ["rewrite", "rephrase", "neighbours"]


def shared_columns(wide: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``wide`` after its last edit, with the columns of the pages, as text."""
    last = wide[wide["T"] == wide["T"].max()]
    columns = [column for column in COLUMNS if column[1] != "overreach" or "overreach.mean" in last]
    found = pd.DataFrame({name: last.get(f"{metric}.mean", pd.Series(dtype=float)) for name, metric, _ in columns})
    found["MB"] /= 1e6
    shown = pd.DataFrame({"": last["label"]})
    for name, _, digits in columns:
        shown[name] = ["" if pd.isna(value) else _number(value, digits) for value in found[name]]
    unedited = last["method"] == UNEDITED
    shown.loc[unedited, "s/edit"] = ""
    rank = pd.DataFrame({"edited": ~unedited, "loss": -found[RANKED_BY].apply(harmonic_mean, axis=1)})
    return shown.loc[rank.sort_values(["edited", "loss"], kind="stable").index]


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value < 1e5 else f"{value:.0e}"


if __name__ == "__main__":
    results, out = map(Path, sys.argv[1:])
    shared_columns(pd.read_csv(results / "report" / "wide.csv")).to_csv(out, index=False)
