"""From one row per edit and metric to means over edits, then mean and standard deviation over seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from statistics import harmonic_mean

import pandas as pd

from .result_folder import ResultFolder

GROUP = ["model", "dataset", "protocol", "n_edits", "T"]
UNEDITED = "unedited"
MEMORY = ("peak_memory", "total_memory")
COST = ("seconds", "setup_seconds", *MEMORY)
# Metrics measured under several keys, and the name of their average over an edit's keys.
KEYED = {
    r"locality\..+_acc": "locality_acc",
    r"portability\..+_acc": "portability_acc",
    r"portability\..+_gen": "portability_gen",
    r"portability\..+_gen_stop": "portability_gen_stop",
}

# Harmonic means of means: CounterFact's score, and what methods are tuned for.
HARMONIC = {
    "counterfact.score": ("counterfact.efficacy", "counterfact.paraphrase", "counterfact.neighborhood"),
    "harmonic_mean": ("rewrite_acc", "rephrase_acc", "locality_acc"),
}


def complete_checkpoints(rows: pd.DataFrame, single: bool) -> list[int]:
    """Checkpoints at which every edit made so far has been measured."""
    counted = rows[(rows["when"] == "checkpoint") & (rows["edit"] >= 0)].groupby("checkpoint")["edit"].nunique()
    return [int(t) for t, edits in counted.items() if t > 0 and (single or edits >= t)]


def cell_means(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over the edits of one cell.

    ``rows`` has the columns edit, checkpoint, when, metric and value. Returned are T (number of edits made), when,
    metric, mean and edits (how many edits are behind the mean; 0 for a metric of the whole model):

    - when = "checkpoint": measured after T edits on all of them. ``seconds`` is the mean over the T edits,
      memory the highest of their calls, ``setup_seconds`` what was spent before the first.
    - when = "right_after": each of the T edits right after it was made.
    - when = "pre": the same edits before any was made.

    Each of :data:`HARMONIC` is the harmonic mean of three of these means, 0 where one of them is.
    Locality and portability are there by key and averaged over an edit's keys, ``locality_acc`` for example.
    Values that are not a number are left out.
    """
    rows = rows[rows["value"].notna()].astype({"when": str, "metric": str})
    cost = rows["metric"].isin(COST)
    rows.loc[(rows["checkpoint"] == 0) & ~cost, "when"] = "pre"
    costs, rows = rows[cost & (rows["when"] != "pre")].assign(when="checkpoint"), rows[~cost]

    found, place = rows["metric"].unique(), ["edit", "checkpoint", "when"]
    averages = []
    for pattern, name in KEYED.items():
        keyed = rows[rows["metric"].isin([metric for metric in found if re.fullmatch(pattern, metric)])]
        averages.append(keyed.groupby(place, as_index=False)["value"].mean().assign(metric=name))
    rows = pd.concat([rows, *averages], ignore_index=True)
    now = rows[rows["when"] == "checkpoint"].rename(columns={"checkpoint": "T"})
    measured = now[["T", "edit"]].drop_duplicates()
    before = rows[rows["when"] == "pre"].drop(columns="checkpoint").merge(measured, on="edit")
    so_far = pd.concat([rows[rows["when"] == "right_after"], costs]).merge(measured[["T"]].drop_duplicates(), "cross")
    so_far = so_far[so_far["checkpoint"] <= so_far["T"]]

    rows = pd.concat([now, before, so_far], ignore_index=True).assign(edits=lambda r: r["edit"] >= 0)
    keys = ["T", "when", "metric"]
    means = rows.groupby(keys, as_index=False).agg(
        mean=("value", "mean"), highest=("value", "max"), edits=("edits", "sum")
    )
    means["mean"] = means["mean"].where(~means["metric"].isin(MEMORY), means["highest"])
    return _with_harmonic_means(means.drop(columns="highest"))


def _with_harmonic_means(means: pd.DataFrame) -> pd.DataFrame:
    found = [
        {"T": made, "when": when, "metric": name, "mean": harmonic_mean(of["mean"]), "edits": of["edits"].max()}
        for name, metrics in HARMONIC.items()
        for (made, when), of in means[means["metric"].isin(metrics)].groupby(["T", "when"])
        if len(of) == len(metrics)
    ]
    return pd.concat([means, pd.DataFrame(found)], ignore_index=True) if found else means


def tidy(cells: Iterable[ResultFolder]) -> pd.DataFrame:
    """One row per group, method, metric and ``when``: mean and std (sample, NaN for one seed) over seeds.

    Columns: ``GROUP``, method, label, when, metric, mean, std, seeds, edits (summed over seeds), trials (how many
    settings were tried for the method, where that is said). The unedited model
    comes first in its group, the others by label. Where no cell measured it, what the methods' cells measured before
    their first edit serves, labelled "before editing".
    """
    frames = [
        cell.means.assign(
            **dict(zip(GROUP, cell.group, strict=False)),
            method=cell.manifest["method"],
            label=cell.label,
            seed=cell.manifest["seed"],
            trials=None if cell.manifest["method"] == UNEDITED else cell.manifest.get("trials"),
        )
        for cell in cells
    ]
    means = pd.concat(frames, ignore_index=True).astype({"trials": "float64"})
    means = pd.concat([means, _before_editing(means)], ignore_index=True)
    by = [*GROUP, "method", "label", "when", "metric"]
    result = means.groupby(by, as_index=False).agg(
        mean=("mean", "mean"),
        std=("mean", "std"),
        seeds=("seed", "nunique"),
        edits=("edits", "sum"),
        trials=("trials", "max"),
    )
    order = {"edited": result["method"] != UNEDITED, "name": result["label"].str.casefold()}
    result = result.assign(**order).sort_values([*GROUP, "edited", "name", "label", "when", "metric"], kind="stable")
    return result[[*by, "mean", "std", "seeds", "edits", "trials"]].reset_index(drop=True)


def _before_editing(means: pd.DataFrame) -> pd.DataFrame:
    has_own = means[means["method"] == UNEDITED][GROUP].drop_duplicates().assign(own=True)
    before = means[means["when"] == "pre"].merge(has_own, on=GROUP, how="left")
    before = before[before["own"].isna()].drop_duplicates([*GROUP, "seed", "metric"])
    return before.drop(columns="own").assign(
        method=UNEDITED, label="before editing", when="checkpoint", trials=math.nan
    )


def wide(tidy: pd.DataFrame) -> pd.DataFrame:
    """One row per group and method; columns ``<metric>[.<when>].mean``, ``.std`` and ``.edits`` beside each other."""
    name = tidy["metric"].where(tidy["when"] == "checkpoint", tidy["metric"] + "." + tidy["when"])
    index = [*GROUP, "method", "label"]
    figures = tidy.assign(name=name).set_index([*index, "name"])[["mean", "std", "edits"]].unstack("name")
    figures = figures.reindex(pd.MultiIndex.from_frame(tidy[index].drop_duplicates()))
    names = [(kind, name) for name in sorted(set(name)) for kind in ("mean", "std", "edits")]
    figures = figures[names]
    figures.columns = [f"{name}.{kind}" for kind, name in names]
    seeds = tidy.groupby(index)["seeds"].max()
    return figures.assign(seeds=seeds).reset_index()
