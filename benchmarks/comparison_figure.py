"""The picture of a comparison: python benchmarks/comparison_figure.py TABLE.csv OUT.png

``TABLE.csv`` is what `comparison_table.py` wrote. Each method is a point: how many answers about similar subjects it
kept, and how far its edits carry to other wordings. Its size is the share of edits that hold.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from kdpo_editor.compare.report.figures import COLOURS, SETTINGS
from kdpo_editor.compare.report.means import UNEDITED

AXES = {
    "xlabel": "neighbours: answers about similar subjects that stayed",
    "ylabel": "rephrase: the new answer in other wordings",
}
OURS = ("KDPO", "KDPO, tuned", "KDPO-L", "KDPO-L, breadth-first")
GREY = "#6f6f6f"
LARGEST = 160  # square points, of a method whose edits all hold
HOLDS = 0.5  # a method that holds fewer of its edits has no place among the others
# Where a name may stand beside its point, in points: the first that is free.
PLACES = ((9, 5, "left"), (-9, 5, "right"), (9, -13, "left"), (-9, -13, "right"), (0, 12, "center"), (0, -21, "center"))


def frontier(table: pd.DataFrame) -> Figure:
    """Draw the methods of ``table`` that hold half of their edits, without the unedited model."""
    table = table[(table.iloc[:, 0] != UNEDITED) & (table["rewrite"] >= HOLDS)]
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.set(xlim=(table["neighbours"].min() - 0.05, 1.02), ylim=(0, 1), **AXES)
    axes.grid(alpha=0.25)
    figure.canvas.draw()
    taken: list[Bbox] = []
    points = [*table[[table.columns[0], "neighbours", "rephrase", "rewrite"]].itertuples(index=False)]
    for name, x, y, held in points:
        axes.scatter(x, y, s=LARGEST * held, alpha=0.8, linewidths=0, color=COLOURS[0] if name in OURS else GREY)
        middle = axes.transData.transform((x, y))
        taken.append(Bbox.from_bounds(middle[0] - 8, middle[1] - 8, 16, 16))
    for name, x, y, _ in points:
        for dx, dy, side in PLACES:
            label = axes.annotate(
                name, (x, y), (dx, dy), textcoords="offset points", ha=side, weight="bold" if name in OURS else "normal"
            )
            box = label.get_window_extent()
            if axes.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and not any(map(box.overlaps, taken)):
                break
            label.remove()
        else:
            axes.add_artist(label)
        taken.append(box)
    return figure


if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:])
    with plt.rc_context(SETTINGS):
        frontier(pd.read_csv(source)).savefig(out, dpi=150)
