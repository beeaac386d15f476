"""Radar plots of the methods and curves over the number of edits, readable in colour and in grey."""

from __future__ import annotations

import dataclasses
import io
import math
import textwrap
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

from .means import UNEDITED
from .tables import after

RADAR = {
    "rewrite_acc": "Edit success",
    "rephrase_acc": "Rephrase",
    "locality_acc": "Locality",
    "portability_acc": "Portability",
    "fluency.ngram_entropy": "Fluency",
    "rewrite_gen": "Generation",
}
CURVES = ("rewrite_acc", "rewrite_gen", "rephrase_acc", "locality_acc", "portability_acc", "known")
# Okabe and Ito's colours, told apart by most people who see fewer of them; without the yellow, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7B3FA0")
MARKERS = "osD^vPX*<"
LINES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)))
SETTINGS: Any = {
    "text.parse_math": False,  # a "$" in a model's name is a dollar
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "kdpo",  # the same figure is the same file
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure as files: ``name`` says what it is of (not yet fit for a path), ``group`` what it belongs beside."""

    name: tuple[str, ...]
    title: str
    group: tuple[str, str, str, int] | None
    png: bytes
    svg: bytes


def pictures(tidy: pd.DataFrame) -> list[Picture]:
    """Every figure that the frame of :func:`~.means.tidy` has the data for.

    A radar plot per model and data set, radar plots averaged over data sets, curves over the number of edits.
    """
    with mpl.rc_context(SETTINGS):
        drawn = _pictures(tidy[tidy["when"] != "pre"])
        return list(tqdm(drawn, desc="figures", unit="figure", disable=None, leave=False))


def styles_of(tidy: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """One look per label, the same in every figure of a model; colour, marker and line each tell methods apart."""
    edited = tidy[tidy["method"] != UNEDITED]["label"].unique()
    looks = zip(sorted(edited, key=str.casefold), cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False)
    styles = {label: {"color": c, "marker": m, "linestyle": line} for label, c, m, line in looks}
    for label in tidy[tidy["method"] == UNEDITED]["label"].unique():
        styles.setdefault(label, {"color": "#777777", "marker": "", "linestyle": ":"})
    return styles


def _pictures(tidy: pd.DataFrame) -> Iterator[Picture]:
    looks = {model: styles_of(frame) for model, frame in tidy.groupby("model")}
    for (model, protocol, n_edits), frame in tidy.groupby(["model", "protocol", "n_edits"], sort=False):
        scores, styles = {}, looks[model]
        for (dataset, made), part in frame.groupby(["dataset", "T"], sort=False):
            scores[dataset, made] = _radar_scores(part)
            title = f"{model}, {dataset}\n{after(protocol, n_edits, made)}"
            name = ("radar", model, dataset, protocol, str(n_edits), f"T{made}")
            group = (model, dataset, protocol, n_edits)
            yield from picture(name, title, group, _radar(scores[dataset, made], styles))
        for made in sorted(frame["T"].unique()):
            over = {dataset: table for (dataset, t), table in scores.items() if t == made}
            if len(over) > 1:
                # A method that lacks a data set would be averaged over easier or harder ones than the others.
                everywhere = set.intersection(*(set(table.index) for table in over.values()))
                average = pd.concat(over).groupby(level=1, sort=False).mean()
                average = average[average.index.isin(everywhere)]
                title = f"{model}, mean of {', '.join(over)}\n{after(protocol, n_edits, made)}"
                mean = ("radar", model, "mean", protocol, str(n_edits), f"T{made}")
                yield from picture(mean, title, None, _radar(average, styles))
        if protocol == "sequence":
            for dataset, part in frame.groupby("dataset", sort=False):
                title = f"{model}, {dataset}\nover {n_edits} edits"
                curves = ("curves", model, dataset, str(n_edits))
                yield from picture(curves, title, (model, dataset, protocol, n_edits), _curves(part, styles))


def picture(
    name: tuple[str, ...], title: str, group: tuple[str, str, str, int] | None, figure: Figure | None
) -> Iterator[Picture]:
    """``figure`` under its title, as files; nothing where there is no figure."""
    if figure is None:
        return
    by_hand = figure.get_layout_engine() is None  # nothing else keeps the title in its place, then
    place = {"y": 1 - 0.1 / figure.get_figheight(), "va": "top"} if by_hand else {}
    figure.suptitle(wrapped_title(title, figure.get_figwidth()), fontsize=11, **place)
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    figure.set_layout_engine("none")  # it has done its work, which takes as long as drawing
    figure.savefig(svg, format="svg", metadata={"Date": None})
    yield Picture(name, title.replace("\n", ", "), group, png.getvalue(), svg.getvalue())


def wrapped_title(title: str, inches: float) -> str:
    """``title`` in lines that fit into a figure ``inches`` wide."""
    return "\n".join(textwrap.fill(line, int(inches * 10)) for line in title.splitlines())


def _radar_scores(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows by label, columns of ``RADAR``, all from 0 to 1: fluency is divided by the unedited model's, or, where that
    is not known, by the best method's."""
    frame = frame[(frame["when"] == "checkpoint") & frame["metric"].isin(RADAR)]
    scores = frame.pivot(index="label", columns="metric", values="mean")
    scores = scores.reindex(list(dict.fromkeys(frame["label"])))
    unedited = list(frame[frame["method"] == UNEDITED]["label"].unique())
    if "fluency.ngram_entropy" in scores:
        fluency = scores["fluency.ngram_entropy"]
        known = fluency[unedited].max() if unedited else math.nan
        full = known if known > 0 else fluency.max()
        scores["fluency.ngram_entropy"] = (fluency / full).clip(upper=1) if full > 0 else math.nan
    scores = scores.drop(index=unedited)
    return scores[[metric for metric in RADAR if metric in scores and scores[metric].notna().any()]]


def _radar(scores: pd.DataFrame, styles: dict[str, dict[str, Any]]) -> Figure | None:
    scores = scores.dropna(how="all").dropna(axis="columns", how="all")
    if len(scores.columns) < 3:
        return None
    angles = [2 * math.pi * i / len(scores.columns) for i in range(len(scores.columns))]
    labels = list(scores.index)
    figure = Figure(figsize=(5, 4.8), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1], labels=[""] * 4)
    for value in (0.5, 1):  # not the axis's own labels, which lines would run through
        axes.text(
            angles[1] / 2, value, f"{value:g}", color="#555555", fontsize=8, ha="center", va="center", zorder=5,
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "linewidth": 0},
        )  # fmt: skip
    axes.set_xticks(angles, labels=[RADAR[metric] for metric in scores.columns])
    for tick, angle in zip(axes.get_xticklabels(), angles, strict=True):
        side = math.sin(angle)
        tick.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    axes.spines["polar"].set_color("#bbbbbb")
    axes.grid(color="#dddddd")
    # Hollow, so that markers in the same place are seen through each other.
    hollow = {label: styles[label] | {"markerfacecolor": "none", "markeredgewidth": 1.3} for label in labels}
    for label in labels:
        values = list(scores.loc[label])
        axes.plot(
            [*angles, angles[0]], [*values, values[0]], linewidth=1.6, markersize=7, clip_on=False, **hollow[label]
        )
    draw_legend(figure, labels, hollow)
    return figure


def _curves(frame: pd.DataFrame, styles: dict[str, dict[str, Any]]) -> Figure | None:
    """One panel per metric. Solid: after the last edit; dashed: right after each edit (rewrites); bars: std."""
    metrics = [metric for metric in CURVES if metric in set(frame["metric"])]
    checkpoints = sorted(int(t) for t in frame["T"].unique())
    if len(checkpoints) < 2 or not metrics:
        return None
    columns = min(3, len(metrics))
    lines = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(3.1 * columns + 0.6, 2.5 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
    dashed = False
    for axes, metric in zip(grid.flat, metrics, strict=False):
        for (label, when), line in frame[frame["metric"] == metric].groupby(["label", "when"], sort=False):
            style = styles[label]
            if when == "right_after":
                if not metric.startswith("rewrite") or not style["marker"]:
                    continue  # the others would hide the curves
                dashed = True
                axes.plot(line["T"], line["mean"], color=style["color"], linestyle="--", linewidth=0.9)
            else:
                _, caps, bars = axes.errorbar(
                    line["T"],
                    line["mean"],
                    yerr=line["std"].fillna(0) if line["std"].notna().any() else None,
                    color=style["color"],
                    marker=style["marker"],
                    linestyle=":" if not style["marker"] else "-",
                    linewidth=1.5,
                    markersize=5,
                    capsize=2,
                    elinewidth=0.8,
                )
                for part in (*caps, *bars):
                    part.set_alpha(0.5)
        axes.set_title(metric, fontsize=10)
        axes.set_xscale("log")
        axes.set_xticks(checkpoints, labels=[str(t) for t in checkpoints])
        axes.minorticks_off()
        axes.set_ylim(-0.03, 1.05)
        axes.grid(color="#eeeeee")
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("edits made", fontsize=9)
    for axes in list(grid.flat)[len(metrics) :]:
        axes.set_visible(False)
    labels = list(dict.fromkeys(frame["label"]))
    solid = {label: styles[label] | ({"linestyle": "-"} if styles[label]["marker"] else {}) for label in labels}
    draw_legend(
        figure,
        labels,
        solid,
        extra={"right after each edit": {"color": "#444444", "linestyle": "--"}} if dashed else {},
    )
    return figure


def draw_legend(
    figure: Figure, labels: list[str], styles: dict[str, dict[str, Any]], extra: dict[str, dict[str, Any]] | None = None
) -> None:
    """Below the axes, in as many columns as the longest name leaves room for."""
    entries = {label: styles[label] for label in labels} | (extra or {})
    characters = int(figure.get_figwidth() * 14)  # that fit beside each other in the legend's size
    names = [textwrap.fill(label, characters - 8) for label in entries]
    longest = max(len(line) for name in names for line in name.splitlines())
    columns = max(1, min(len(names), characters // (longest + 8)))
    handles = [
        Line2D([], [], linewidth=1.6, markersize=5, label=name, **look)
        for name, look in zip(names, entries.values(), strict=True)
    ]
    legend = figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
        frameon=False,
        handlelength=3,
        borderaxespad=1,
    )
    figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)
