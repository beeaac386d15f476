"""The comparison's tables, one per model, data set, protocol and number of edits made; as text, Markdown and LaTeX."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd

from ...edits.measures import less_is_better
from .means import COST, GROUP, MEMORY, UNEDITED

# EasyEdit's names, in the order of the main table; whatever else was measured stands in the second one.
MAIN = [
    ("rewrite_acc", "checkpoint"),
    ("rephrase_acc", "checkpoint"),
    ("locality_acc", "checkpoint"),
    ("harmonic_mean", "checkpoint"),
    ("portability_acc", "checkpoint"),
    ("fluency.ngram_entropy", "checkpoint"),
    ("counterfact.score", "checkpoint"),
    ("counterfact.efficacy", "checkpoint"),
    ("counterfact.paraphrase", "checkpoint"),
    ("counterfact.neighborhood", "checkpoint"),
    ("rewrite_gen", "checkpoint"),
    ("rephrase_gen", "checkpoint"),
    ("portability_gen", "checkpoint"),
    ("rewrite_gen_stop", "checkpoint"),
    ("rephrase_gen_stop", "checkpoint"),
    ("portability_gen_stop", "checkpoint"),
    ("rewrite_acc", "right_after"),
    ("known", "checkpoint"),
    ("overreach", "checkpoint"),
    ("agreement", "checkpoint"),
    ("perplexity", "checkpoint"),
    ("seconds", "checkpoint"),
    ("setup_seconds", "checkpoint"),
    ("peak_memory", "checkpoint"),
    ("total_memory", "checkpoint"),
]
TRIED = "settings tried"
HIGHER_IS_BETTER = re.compile(
    r".+_acc|.+_gen|.+_gen_stop|.+\.ngram_entropy|counterfact\..+|wild\..+|tasks\..+|known|agreement|harmonic_mean"
)
LEGEND = (
    "*_acc: EasyEdit's teacher-forced accuracy. harmonic_mean: of rewrite_acc, rephrase_acc and locality_acc. *_gen: "
    "the greedy answer begins with the wanted one; *_gen_stop: it is that and no more. counterfact.*: ROME's scores, "
    "by which of two answers is likelier. right after: each edit as soon as it was made. known: facts about other "
    "subjects that were answered right before and still are. overreach: other questions about edited subjects that get "
    "the new answer. perplexity: of held-out text; agreement: its next tokens that are the unedited model's. seconds: "
    "per edit; setup_seconds: before the first; peak_memory: the highest of a call above what was held before it; "
    "total_memory: with that. settings tried: for the method, before these were chosen. "
    "Mean, and ± the standard deviation over seeds where there are several; the best value of a column is marked, the "
    "unedited model aside."
)


class Entry(NamedTuple):
    """One cell of a table: what it says, whether it is the best of its column, and what is behind the number."""

    text: str = "-"
    best: bool = False
    behind: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """One table: the methods are its rows, named by ``labels``.

    ``n_edits``: edits of the run. ``columns``: the metrics, as printed.
    """

    model: str
    dataset: str
    protocol: str
    n_edits: int
    made: int
    """Number of edits made when it was measured, T."""
    detail: bool
    """Whether it is the second table, of locality and portability by key and of each edit right after it was made."""
    columns: list[str]
    labels: list[str]
    rows: list[list[Entry]]

    @property
    def caption(self) -> str:
        """What it is of, in words."""
        return f"{self.model}, {self.dataset}, {self.when}" + (": by key and right after each edit" * self.detail)

    @property
    def when(self) -> str:
        """When its figures were taken, in words."""
        return after(self.protocol, self.n_edits, self.made)


def after(protocol: str, n_edits: int, made: int) -> str:
    """In words, when a group's figures were taken."""
    if protocol == "single":
        return f"each of {n_edits} edits alone"
    return f"after {made} of {n_edits} edits" if protocol == "sequence" else f"{protocol}, T = {made} of {n_edits}"


def tables(tidy: pd.DataFrame) -> list[Table]:
    """Of the frame that :func:`~.means.tidy` makes; the second table of a group where needed."""
    made = []
    for group, frame in tidy.groupby(GROUP, sort=False):
        found = set(zip(frame["metric"], frame["when"], strict=True))
        rest = sorted(column for column in found - set(MAIN) if column[1] != "pre")
        for detail, columns in ((False, [c for c in MAIN if c in found]), (True, rest)):
            if columns:
                made.append(_table(group, frame, columns, detail))
    return made


def _table(group: tuple[Any, ...], frame: pd.DataFrame, columns: list[tuple[str, str]], detail: bool) -> Table:
    labels = list(dict.fromkeys(frame["label"]))
    unedited = set(frame[frame["method"] == UNEDITED]["label"])
    cells = {(row.label, row.metric, row.when): row for row in frame.itertuples()}
    by_column = []
    for metric, when in columns:
        column = [cells.get((label, metric, when)) for label in labels]
        shown = [_number(metric, row.mean) if row else "" for row in column]
        rivals = [
            (row.mean, text)
            for row, text in zip(column, shown, strict=True)
            if row and math.isfinite(row.mean) and row.label not in unedited
        ]
        best = ""
        if len(rivals) > 1 and (_lower_is_better(metric) or HIGHER_IS_BETTER.fullmatch(metric)):
            best = (min if _lower_is_better(metric) else max)(rivals)[1]
        by_column.append(
            [
                _entry(metric, row, text, best=text == best and row.label not in unedited) if row else Entry()
                for row, text in zip(column, shown, strict=True)
            ]
        )
    counts = frame[frame["when"] == "checkpoint"].groupby("label")[["seeds", "edits"]].max()
    for name in ("seeds", "edits"):
        by_column.append([Entry(str(counts[name].get(label, "-"))) for label in labels])
    headers = [_header(*column) for column in columns] + ["seeds", "edits"]
    trials = frame.groupby("label")["trials"].max()
    if trials.notna().any():
        tried = [trials[label] for label in labels]
        by_column.append([Entry() if math.isnan(number) else Entry(f"{number:.0f}") for number in tried])
        headers.append(TRIED)
    rows = [list(row) for row in zip(*by_column, strict=True)]
    model, dataset, protocol, n_edits, checkpoint = group
    return Table(model, dataset, protocol, int(n_edits), int(checkpoint), detail, headers, labels, rows)


def _header(metric: str, when: str) -> str:
    unit = " (MiB)" if metric in MEMORY else ""
    return metric + unit + ("" if when == "checkpoint" else f" ({when.replace('_', ' ')})")


def _lower_is_better(metric: str) -> bool:
    return metric in COST or less_is_better(metric)


def _number(metric: str, value: float, like: float | None = None) -> str:
    """``value`` with as many decimals as suit the metric and, for a cost, the size of ``like`` (default: itself)."""
    like = value if like is None else like
    if metric in MEMORY:
        value, like = value / 2**20, like / 2**20
    if not _lower_is_better(metric):
        return f"{value:.{2 if 'entropy' in metric else 3}f}"
    if like >= 1e5:
        return f"{value:.2e}"
    return f"{value:.{0 if like >= 100 else 1 if like >= 10 else 2 if like >= 1 else 3}f}"


def _entry(metric: str, row: Any, text: str, best: bool) -> Entry:
    if row.seeds > 1 and math.isfinite(row.std):
        text += f" ± {_number(metric, row.std, like=row.mean)}"
    edits = f"mean of {row.edits} edit{'s'[: row.edits != 1]}" if row.edits else "of the whole model"
    return Entry(text, best, f"{edits}, {row.seeds} seed{'s'[: row.seeds != 1]}")


def as_text(table: Table, width: int) -> str:
    """For a terminal ``width`` characters wide; columns that do not fit follow below. The best values carry a star."""
    cells = [[entry.text + ("*" if entry.best else " ") for entry in row] for row in table.rows]
    frame = pd.DataFrame(cells, index=table.labels, columns=[f"{c} " for c in table.columns])
    with pd.option_context("display.unicode.east_asian_width", True, "display.max_colwidth", None):
        return f"{table.caption}\n{frame.to_string(line_width=width)}"


def as_markdown(all_tables: Iterable[Table], notes: Iterable[str] = ()) -> str:
    """GitHub tables under their captions, then ``notes`` as a list; the best values are bold."""
    parts = []
    for table in all_tables:
        lines = [f"**{_markdown(table.caption)}**", "", f"| {' | '.join(['method', *map(_markdown, table.columns)])} |"]
        lines.append("|---|" + "---:|" * len(table.columns))
        for label, row in zip(table.labels, table.rows, strict=True):
            entries = [f"**{entry.text}**" if entry.best else entry.text for entry in row]
            lines.append(f"| {' | '.join([_markdown(label), *entries])} |")
        parts.append("\n".join(lines))
    parts += [_markdown(LEGEND), "\n".join(f"- {_markdown(note)}" for note in notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#&~$!])", r"\\\1", text)


def as_latex(all_tables: Iterable[Table]) -> str:
    """``table`` environments with booktabs rules to be \\input into a paper; the best values are bold."""
    parts = ["% Needs \\usepackage{booktabs} and \\usepackage{graphicx}."]
    for table in all_tables:
        lines = [_latex_row("method", table.columns), r"\midrule"]
        for label, row in zip(table.labels, table.rows, strict=True):
            entries = [(rf"\textbf{{{number}}}" if best else number, best) for number, best, _ in row]
            lines.append(_latex_row(label, [text for text, _ in entries], escaped=True))
        body = "\n".join(lines)
        parts.append(
            "\\begin{table}\n\\centering\n"
            f"\\caption{{{_latex(table.caption)}}}\n"
            "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
            f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}\n\\toprule\n{body}\n\\bottomrule\n"
            "\\end{tabular}}\n\\end{table}"
        )
    return "\n\n".join(parts) + "\n"


def _latex_row(label: str, entries: list[str], escaped: bool = False) -> str:
    texts = [text.replace("±", r"$\pm$") if escaped else _latex(text) for text in entries]
    return " & ".join([_latex(label), *texts]) + r" \\"


_LATEX = {character: rf"\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
