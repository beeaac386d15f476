"""What tuning maximises; the same for every method.

kdpo-compare experiment=tune_ft_m
"""

from __future__ import annotations

from pathlib import Path
from statistics import harmonic_mean


def figures(folder: Path) -> dict[str, float]:
    """Rewrite, rephrase and locality at a cell's last checkpoint, those of them that its records ask."""
    import pandas as pd

    from ..report.means import cell_means

    means = cell_means(pd.read_parquet(folder / "rows.parquet"))
    last = means[(means["when"] == "checkpoint") & (means["T"] == means["T"].max())].set_index("metric")["mean"]
    return {kind: float(last[f"{kind}_acc"]) for kind in ("locality", "rephrase", "rewrite") if f"{kind}_acc" in last}


def objective(folder: Path) -> float:
    """The harmonic mean of a cell's :func:`figures`: none of them makes up for another that is lost."""
    return harmonic_mean(list(figures(folder).values()))
