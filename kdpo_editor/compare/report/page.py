"""The comparison as one HTML page that needs nothing beside itself: tables, figures, answers, settings, versions."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from ...requests.answers import begins_with_one
from .figures import Picture
from .means import UNEDITED
from .reading import read_texts
from .result_folder import ResultFolder
from .tables import LEGEND, TRIED, Table

HERE = Path(__file__).parent
# Columns that are shown before a reader chooses; without any of them all are.
SHOWN = (
    "rewrite_acc",
    "rephrase_acc",
    "locality_acc",
    "portability_acc",
    "counterfact.score",
    "rewrite_gen",
    "known",
    "overreach",
    "perplexity",
    "seconds",
    "total_memory (MiB)",
)
COUNTS = ("seeds", "edits", TRIED)
# Beyond these a page opens slowly: answers in one group, and characters of one answer.
MOST_ANSWERS = 20_000
LONGEST_ANSWER = 1000


def page(
    title: str,
    cells: Sequence[ResultFolder],
    left_out: Sequence[tuple[str, str]],
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    notes: Sequence[str],
) -> str:
    """The page's HTML; it opens with the table and picture of the group that has most methods and edits.

    Whatever comes from the data is escaped. The page forbids its browser to load anything, or to run any script but its
    own, which searches the answers.
    """
    columns = list(dict.fromkeys(c for t in tables if not t.detail for c in t.columns if c not in COUNTS))
    shown = [name for name in columns if name in SHOWN] or columns
    sections = []
    for group in _order(cells):
        within = [cell for cell in cells if cell.group == group]
        of_group = [table for table in tables if (table.model, table.dataset, table.protocol, table.n_edits) == group]
        main = sorted((table for table in of_group if not table.detail), key=lambda table: -table.made)
        drawn = [(p, _about(within, p.title, _made(p))) for p in pictures if p.group == group]
        # After most edits first; of those the radar plot.
        drawn.sort(key=lambda one: (-_made(one[0]), one[0].name[0] != "radar"))
        sections.append(
            {
                "name": _name(group),
                "tables": [_numbers(table, columns, within) for table in main],
                "details": [_numbers(table, columns, within) for table in of_group if table.detail],
                "picture": drawn[0] if drawn else None,
                "pictures": [one for one in drawn[1:] if one[0].name[0] == "curves"],
                "earlier": [one for one in drawn[1:] if one[0].name[0] != "curves"],
                "answers": _answers(within),
            }
        )
    script = (HERE / "page.js").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["embedded"] = lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    environment.filters["breakable"] = _breakable
    template = environment.from_string((HERE / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        sections=sections,
        averages=[(p, _about(_averaged(cells, p), p.title, _made(p))) for p in pictures if p.group is None],
        columns=[(name, name in shown) for name in columns],
        cells=cells,
        left_out=left_out,
        notes=notes,
        legend=[part.rstrip(".;").partition(": ")[::2] for part in re.split(r"(?<=[.;]) (?=[\w*. ]+: |Mean)", LEGEND)],
        versions=_versions(cells),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _order(cells: Sequence[ResultFolder]) -> list[tuple[str, str, str, int]]:
    """Each group once: that with most methods and then most edits first, the others by name."""
    groups = sorted({cell.group for cell in cells})
    labels = {group: len({cell.label for cell in cells if cell.group == group}) for group in groups}
    first = max(groups, key=lambda group: (labels[group], group[3]))
    return [first, *(group for group in groups if group != first)]


def _name(group: tuple[str, str, str, int]) -> str:
    model, dataset, protocol, n_edits = group
    edits = f"{n_edits} edits, each alone" if protocol == "single" else f"{protocol} of {n_edits} edits"
    return f"{model}, {dataset}, {edits}"


def _about(cells: Sequence[ResultFolder], what: str, made: int) -> str:
    """What stands below a table or picture: what it is of, how many edits, seeds, split, and settings tried.

    ``made``: edits made when it was measured.
    """
    splits = sorted({cell.settings.get("dataset.split", "not said") for cell in cells})
    seeds = sorted({cell.manifest["seed"] for cell in cells})
    edited = [cell for cell in cells if cell.manifest["method"] != UNEDITED]
    n = cells[0].manifest["n_edits"] if cells[0].manifest["protocol"] == "single" else made
    of = f", seed {seeds[0]}" if len(seeds) == 1 else f" for each of {len(seeds)} seeds ({_listed(seeds)})"
    return f"{what}. N = {n} edit{'s'[: n != 1]}{of}; split: {_listed(splits)}; settings tried: {_tried(edited)}."


def _tried(edited: Sequence[ResultFolder]) -> str:
    """How many settings were tried for the methods: what holds for most of them, and the others by name."""
    each = {cell.label: cell.manifest.get("trials") for cell in edited}
    if not any(each.values()):
        return "not said"
    usual = Counter(each.values()).most_common(1)[0][0]
    but = [f"{label} {'not said' if count is None else count}" for label, count in each.items() if count != usual]
    return f"{'not said' if usual is None else usual} for each method{', but ' * bool(but)}{_listed(but)}"


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _made(picture: Picture) -> int:
    """After how many edits a picture's last figures were taken."""
    return int(picture.name[-1].removeprefix("T"))


def _averaged(cells: Sequence[ResultFolder], picture: Picture) -> list[ResultFolder]:
    """The cells that a picture averages over data sets."""
    model, protocol, n_edits = picture.name[1], picture.name[3], picture.name[4]
    return [c for c in cells if (c.group[0], c.group[2], str(c.group[3])) == (model, protocol, n_edits)]


def _breakable(name: str) -> Markup:
    """``name`` with places where a line may end."""
    return Markup(re.sub(r"([_.])", r"\1<wbr>", str(escape(name))))


def _numbers(table: Table, columns: Sequence[str], cells: Sequence[ResultFolder]) -> dict[str, Any]:
    """What the page shows of a table; counts that are the same for all methods stand below it instead."""
    differing = [len({row[i].text for row in table.rows}) > 1 for i in range(len(table.columns))]
    kept = [i for i, name in enumerate(table.columns) if name not in COUNTS or differing[i]]
    places = {name: i for i, name in enumerate(columns)}
    return {
        "when": table.when,
        "about": _about(cells, table.caption, table.made),
        "labels": table.labels,
        "columns": [(table.columns[i], places.get(table.columns[i])) for i in kept],
        "rows": [[(row[i], places.get(table.columns[i])) for i in kept] for row in table.rows],
    }


def _versions(cells: Sequence[ResultFolder]) -> list[tuple[str, str]]:
    """Each program or library with its version, or its versions where cells differ."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        for name, version in cell.manifest["versions"].items():
            found.setdefault(name, {})[version] = None
    return [(name, ", ".join(versions)) for name, versions in sorted(found.items())]


def _answers(cells: Sequence[ResultFolder]) -> dict[str, Any]:
    """Every prompt with what each method wrote after its last checkpoint, a method's lowest seed standing for it.

    Where the unedited model has no run of its own, what a method's run asked before its first edit stands for it.
    Where there are more than ``MOST_ANSWERS`` answers, they are of edits evenly taken from all.
    """
    chosen: dict[str, ResultFolder] = {}
    for cell in sorted(cells, key=lambda c: (c.manifest["method"] != UNEDITED, c.label.casefold(), c.manifest["seed"])):
        chosen.setdefault(cell.label, cell)
    said = [(label, text) for label, cell in chosen.items() for text in _texts(cell, "checkpoint")]
    if chosen and all(cell.manifest["method"] != UNEDITED for cell in chosen.values()):
        said = [("before editing", text) for text in _texts(next(iter(chosen.values())), "pre")] + said
    edits = sorted({text["edit"] for _, text in said})
    step = max(1, -(-len(said) // MOST_ANSWERS))
    kept = set(edits[::step])
    prompts: dict[tuple[int, str, str], dict[str, Any]] = {}
    for label, text in said:
        if text["edit"] not in kept:
            continue
        asked = {key: text[key] for key in ("edit", "kind", "prompt", "wanted")}
        place = prompts.setdefault((text["edit"], text["kind"], text["prompt"]), {**asked, "texts": []})
        short = text["text"][:LONGEST_ANSWER] + (" …" if len(text["text"]) > LONGEST_ANSWER else "")
        right = begins_with_one(text["text"], text["wanted"])
        place["texts"].append({"label": label, "text": short, "stopped": bool(text["stopped"]), "right": right})
    asked_of = sorted(prompts.values(), key=lambda asked: asked["edit"])
    return {"prompts": asked_of, "edits": len(kept), "of": len(edits)}


def _texts(cell: ResultFolder, when: str) -> list[dict[str, Any]]:
    """The cell's raw generations about its edits: at its last shown checkpoint, or before any edit."""
    last = int(cell.means["T"].max()) if when == "checkpoint" else 0
    return [text for text in read_texts(cell) if (text["when"], text["checkpoint"]) == (when, last)]
