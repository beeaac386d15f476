"""What tuning maximises; the same for every method.

kdpo-compare experiment=tune_ft_m
"""

from __future__ import annotations

from pathlib import Path
from statistics import harmonic_mean


def figures(folder: Path) -> dict[str, float]:
    """Rewrite, rephrase and locality, each averaged over its edits, at a cell's last checkpoint."""
    import pandas as pd

    frame = pd.read_parquet(folder / "rows.parquet")
    frame = frame[(frame["when"] == "checkpoint") & (frame["checkpoint"] == frame["checkpoint"].max())]
    kinds = frame["metric"].str.extract(r"^(rewrite|rephrase|locality)(?:\..*)?_acc$")[0]
    return {str(kind): float(value) for kind, value in frame.groupby(kinds)["value"].mean().items()}


def objective(folder: Path) -> float:
    """The harmonic mean of a cell's :func:`figures`: none of them makes up for another that is lost."""
    return harmonic_mean(figures(folder).values())
