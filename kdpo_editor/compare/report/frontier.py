"""Two metrics against each other, a curve for each method over its learning rates: what success costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from ...errors import ResultsError
from .figures import SETTINGS, Picture, draw_legend, picture, styles_of
from .means import UNEDITED
from .tables import after

if TYPE_CHECKING:
    from .result_folder import ResultFolder

RATE = "method.rate_factor"


def points(cells: Sequence[ResultFolder], x: str, y: str, made: int) -> pd.DataFrame:
    """One row per method and rate: ``label``, ``method``, ``rate`` (times the one in its settings), ``x`` and ``y``
    (means over seeds of the two metrics after ``made`` edits).

    Raises :class:`~kdpo_editor.errors.ResultsError` naming a metric that was not measured then, or a method of which
    cells differ in more than rate and seed.
    """
    rows = []
    for cell in cells:
        means = cell.means[(cell.means["T"] == made) & (cell.means["when"] == "checkpoint")]
        found = means.set_index("metric")["mean"]
        if cell.manifest["method"] != UNEDITED and x in found and y in found:
            rate = float(cell.settings.get(RATE, "1"))
            label, seed = cell.manifest["label"], cell.manifest["seed"]
            rows.append({"label": label, "method": label, "rate": rate, "seed": seed, "x": found[x], "y": found[y]})
    if not rows:
        measured = sorted({m for c in cells for m in c.means[c.means["when"] == "checkpoint"]["metric"]})
        raise ResultsError(f"{x} and {y} were not both measured after {made} edits; measured is {', '.join(measured)}")
    frame = pd.DataFrame(rows)
    several = frame[frame.duplicated(["label", "rate", "seed"])]
    if not several.empty:
        label, rate, seed = several.iloc[0][["label", "rate", "seed"]]
        raise ResultsError(
            f"{label}: several cells have {rate:g} times its rate and seed {seed}, so they differ in other settings; "
            "move those of one setting into a folder of their own"
        )
    return frame.drop(columns="seed").groupby(["label", "method", "rate"], as_index=False).mean()


def pictures(cells: Sequence[ResultFolder], x: str, y: str, made: int) -> Iterator[Picture]:
    """The plot, for cells of one model, data set, protocol and number of edits; errors as those of :func:`points`."""
    model, dataset, protocol, n_edits = cells[0].group
    frame = points(cells, x, y, made)
    with mpl.rc_context(SETTINGS):
        title = f"{model}, {dataset}\n{after(protocol, n_edits, made)}, over learning rates"
        name = ("frontier", model, dataset, protocol, str(n_edits), f"T{made}", x, y)
        yield from picture(name, title, cells[0].group, _figure(frame, x, y))


def _figure(frame: pd.DataFrame, x: str, y: str) -> Figure:
    styles = styles_of(frame)
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes: Any = figure.add_subplot()
    for label, curve in frame.sort_values("rate").groupby("label", sort=False):
        look = styles[label] | {"markerfacecolor": "white"}
        axes.plot(curve["x"], curve["y"], linewidth=1.4, markersize=5, **look)
        # The end with the highest rate, so that the curve has a direction.
        axes.plot(
            curve["x"].iloc[-1:], curve["y"].iloc[-1:], **(look | {"markerfacecolor": look["color"]}), markersize=6
        )
    axes.set_xlabel(f"{x} (filled: the highest rate)")
    axes.set_ylabel(y)
    if frame["x"].max() <= 1:  # shares
        axes.set_xlim(-0.02, 1.02)
    if frame["y"].max() <= 1:
        axes.set_ylim(min(0.5, frame["y"].min() - 0.02), 1.02)
    axes.grid(color="#eeeeee")
    draw_legend(figure, list(styles), styles)
    return figure
