"""Figures about one edit: what each method says before and after it, and KDPO's way to it, cycle by cycle."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ...engine.traces import Cycle
from .figures import COLOURS, MARKERS, wrapped_title

WIDTH, MARGIN = 7.0, 0.15  # inches
LINE, SPACE = 0.17, 0.09
CHARACTER, BOLD = 0.078, 0.09  # width of one, on average
SIZE = 9
SHADE, LOST = "#f0f0f0", "#d8d8d8"


@dataclass(frozen=True)
class Answer:
    """What was generated: by whom, whether it begins with the wanted answer, and whether it stopped."""

    label: str
    text: str
    right: bool
    stopped: bool


@dataclass(frozen=True)
class Question:
    """One of an edit's prompts. ``answers``: the unedited model's, then each method's."""

    kind: str
    prompt: str
    wanted: Sequence[str]
    answers: Sequence[Answer]


@dataclass(frozen=True)
class _Line:
    """Texts beside each other: where they begin (inches), what they say, and how they look."""

    parts: Sequence[tuple[float, str, dict[str, Any]]]
    fill: str | None = None
    above: float = 0.0

    @property
    def height(self) -> float:
        """Inches, without the space above."""
        return LINE * max(text.count("\n") + 1 for _, text, _ in self.parts) + SPACE


def example(title: str, questions: Sequence[Question]) -> Figure:
    """Below ``title``, a table per question: what the model said before the edit, and after it by method.

    Right answers are bold and ticked.
    """
    room = 2.2  # inches for labels
    lines = []
    for question in questions:
        heading = _wrapped(f"{question.kind}: {question.prompt}", WIDTH - 2 * MARGIN, bold=True)
        lines.append(_Line([(MARGIN, heading, {"weight": "bold"})], above=0.1))
        wanted = _wrapped(f"wanted: {' or '.join(question.wanted)}", WIDTH - 2 * MARGIN)
        lines.append(_Line([(MARGIN, wanted, {"color": "#444444"})]))
        for i, answer in enumerate(question.answers):
            text = answer.text + ("" if answer.stopped else " … (did not stop)")
            parts = [
                (MARGIN + 0.1, _wrapped(answer.label, room - 0.2), {}),
                (MARGIN + room, "✓" if answer.right else "✗", {"color": COLOURS[2] if answer.right else COLOURS[1]}),
                (
                    MARGIN + room + 0.25,
                    _wrapped(text, WIDTH - 2 * MARGIN - room - 0.4, bold=answer.right),
                    {"weight": "bold"} if answer.right else {},
                ),
            ]
            lines.append(_Line(parts, fill=SHADE if i % 2 == 0 else None))
    note = "✓: begins with a wanted answer"
    lines.append(_Line([(MARGIN, note, {"color": "#444444", "fontsize": SIZE - 1})], above=0.05))
    return _sheet(title, lines, below=MARGIN)


def optimisation(
    title: str, prompt: str, chosen: Sequence[str], cycles: Sequence[tuple[Sequence[str], Cycle]], stop_loss: float
) -> Figure:
    """Below ``title``, the tokens of ``y_w``, ``chosen``, and of each cycle's ``y_l``, above the loss before each step.

    ``cycles``: the tokens of each ``y_l`` as text, and its cycle of an :class:`~kdpo_editor.EditTrace`. Tokens by which
    a ``y_l`` differs are framed; where a new one is taken there is a dotted line.
    """
    rows = [("y_w, the new answer", chosen)]
    for rejected, same in groupby(enumerate(cycles, 1), key=lambda numbered: list(numbered[1][0])):
        numbers = [number for number, _ in same]
        of = f"cycle {numbers[0]}" if len(numbers) == 1 else f"cycles {numbers[0]} to {numbers[-1]}"
        rows.append((f"y_l of {of}", rejected))
    lines = [_Line([(MARGIN, _wrapped(prompt, WIDTH - 2 * MARGIN, bold=True), {"weight": "bold"})])]
    lines += _token_lines(rows)
    note = "framed: where it is not y_w. ␣: a space"
    lines.append(_Line([(MARGIN, note, {"color": "#444444", "fontsize": SIZE - 1})]))
    left, above, plot, below = 0.75, 0.35, 2.6, 0.55
    figure = _sheet(title, lines, above + plot + below)
    height = figure.get_figheight()
    axes: Any = figure.add_axes((left / WIDTH, below / height, (WIDTH - left - MARGIN) / WIDTH, plot / height))
    total = sum(cycle.steps for _, cycle in cycles)
    first, named = 0, -total
    for number, (_, cycle) in enumerate(cycles, 1):
        steps = range(first, first + len(cycle.losses))
        axes.semilogy(steps, cycle.losses, color=COLOURS[0], marker=MARKERS[0], linewidth=1.5, markersize=4)
        axes.axvline(first, color="#666666", linestyle=":", linewidth=1, zorder=0)
        if first - named > total / 25:  # names would overlap otherwise
            axes.annotate(
                f"y_l {number}" if len(cycles) <= 8 else str(number), (first, 1), xycoords=axes.get_xaxis_transform(),
                xytext=(2, 3), textcoords="offset points", fontsize=SIZE - 1,
            )  # fmt: skip
            named = first
        first += cycle.steps
    axes.axhline(stop_loss, color="#666666", linestyle="--", linewidth=1)
    axes.set_xlabel("optimiser steps taken; dotted: a new y_l is read off the model", fontsize=SIZE)
    axes.set_ylabel("loss (nats); dashed: a cycle ends", fontsize=SIZE)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=SIZE)
    axes.grid(axis="y", color="#eeeeee")
    return figure


def _token_lines(rows: Sequence[tuple[str, Sequence[str]]]) -> list[_Line]:
    """The rows' tokens below each other; positions that do not fit beside each other follow below."""
    chosen = rows[0][1]
    room = 1.6
    widths = [max(len(tokens[t]) for _, tokens in rows) * BOLD + 0.2 for t in range(len(chosen))]
    pieces: list[list[int]] = [[]]
    for t, width in enumerate(widths):
        if pieces[-1] and room + sum(widths[k] for k in pieces[-1]) + width > WIDTH - 2 * MARGIN:
            pieces.append([])
        pieces[-1].append(t)
    lines = []
    for piece in pieces:
        for i, (label, tokens) in enumerate(rows):
            parts: list[tuple[float, str, dict[str, Any]]] = [(MARGIN, label, {})]
            x = MARGIN + room
            for t in piece:
                look: dict[str, Any] = {"weight": "bold"} if i == 0 else {}
                if tokens[t] != chosen[t]:
                    look["bbox"] = {"boxstyle": "square,pad=0.25", "facecolor": LOST, "edgecolor": "black", "lw": 0.7}
                parts.append((x, tokens[t], look))
                x += widths[t]
            lines.append(_Line(parts, above=0.12 if i == 0 else 0.02))
    return lines


def _sheet(title: str, lines: Sequence[_Line], below: float) -> Figure:
    """A figure with ``lines`` between the room for ``title`` and as many inches as are wanted ``below``."""
    top = 0.25 + 0.2 * (wrapped_title(title, WIDTH).count("\n") + 1)
    height = sum(line.above + line.height for line in lines)
    whole = top + height + below
    figure = Figure(figsize=(WIDTH, whole))
    axes = figure.add_axes((0, below / whole, 1, height / whole))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    y = 0.0
    for line in lines:
        y += line.above
        if line.fill:
            axes.add_patch(Rectangle((MARGIN, y), WIDTH - 2 * MARGIN, line.height, facecolor=line.fill, linewidth=0))
        for x, text, look in line.parts:
            for number, single in enumerate(text.split("\n"), 1):
                axes.text(x, y + number * LINE, single, **{"fontsize": SIZE, **look})
        y += line.height
    return figure


def _wrapped(text: str, inches: float, bold: bool = False) -> str:
    return textwrap.fill(text, int(inches / (BOLD if bold else CHARACTER)))
