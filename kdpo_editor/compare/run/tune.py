"""What tuning maximises; the same for every method.

kdpo-compare experiment=tune_ft_m
"""

from __future__ import annotations

from pathlib import Path
from statistics import harmonic_mean


def figures(folder: Path) -> dict[str, float]:
    """Rewrite, rephrase and locality at a cell's last checkpoint: those of an edit averaged, then the edits'. What its
    records do not ask is left out."""
    import pandas as pd

    frame = pd.read_parquet(folder / "rows.parquet")
    frame = frame[(frame["when"] == "checkpoint") & (frame["checkpoint"] == frame["checkpoint"].max())]
    kinds = frame["metric"].str.extract(r"^(rewrite|rephrase|locality)(?:\..*)?_acc$")[0]
    of_edits = frame.groupby([kinds, "edit"])["value"].mean()
    return {str(kind): float(value) for kind, value in of_edits.groupby(level=0).mean().items()}


def objective(folder: Path) -> float:
    """The harmonic mean of a cell's :func:`figures`: none of them makes up for another that is lost."""
    return harmonic_mean(list(figures(folder).values()))
