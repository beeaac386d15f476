"""The comparison as one HTML page that needs nothing beside itself: tables, figures, samples, settings, versions."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from .figures import Picture
from .means import UNEDITED
from .reading import read_texts
from .result_folder import ResultFolder
from .tables import LEGEND, Table

SAMPLED_EDITS = 3
LONGEST_TEXT = 200


def page(
    title: str,
    cells: Sequence[ResultFolder],
    left_out: Sequence[tuple[str, str]],
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    notes: Sequence[str],
) -> str:
    """The page's HTML. Whatever comes from the data is escaped, and the page forbids its browser to load anything."""
    sections = []
    for group in sorted({cell.group for cell in cells}):
        model, dataset, protocol, n_edits = group
        within = [cell for cell in cells if cell.group == group]
        sections.append(
            {
                "model": model,
                "dataset": dataset,
                "protocol": f"{n_edits} edits, each alone"
                if protocol == "single"
                else f"{protocol} of {n_edits} edits",
                "tables": [_numbers(t) for t in tables if (t.model, t.dataset, t.protocol, t.n_edits) == group],
                "pictures": [p for p in pictures if p.group == group],
                "samples": _samples(within),
            }
        )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["embedded"] = lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    environment.filters["breakable"] = _breakable
    template = environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        sections=sections,
        averages=[p for p in pictures if p.group is None],
        cells=cells,
        left_out=left_out,
        notes=notes,
        legend=LEGEND,
        versions=_versions(cells),
    )


def _breakable(name: str) -> Markup:
    """``name`` with places where a line may end."""
    return Markup(re.sub(r"([_.])", r"\1<wbr>", str(escape(name))))


def _numbers(table: Table) -> dict[str, Any]:
    """What the page shows of a table; ``seeds`` and ``edits``, where all methods have as many, above it instead."""
    same = {
        i: f"{table.rows[0][i].text} {name if table.rows[0][i].text != '1' else name.removesuffix('s')}"
        for i, name in enumerate(table.columns)
        if name in ("seeds", "edits") and len({row[i].text for row in table.rows}) == 1
    }
    kept = [i for i in range(len(table.columns)) if i not in same]
    return {
        "when": table.when,
        "detail": table.detail,
        "labels": table.labels,
        "constant": ", ".join(same.values()),
        "columns": [table.columns[i] for i in kept],
        "rows": [[row[i] for i in kept] for row in table.rows],
    }


def _versions(cells: Sequence[ResultFolder]) -> list[tuple[str, str]]:
    """Each program or library with its version, or its versions where cells differ."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        for name, version in cell.manifest["versions"].items():
            found.setdefault(name, {})[version] = None
    return [(name, ", ".join(versions)) for name, versions in sorted(found.items())]


def _samples(cells: Sequence[ResultFolder]) -> list[dict[str, Any]]:
    """What the methods wrote for the same prompts: of the first, a middle and the last edit after the last checkpoint.

    Each method is represented by the cell of its lowest seed. Texts are cut after ``LONGEST_TEXT`` characters.
    """
    chosen: dict[str, ResultFolder] = {}
    for cell in sorted(cells, key=lambda c: (c.manifest["method"] != UNEDITED, c.label.casefold(), c.manifest["seed"])):
        chosen.setdefault(cell.label, cell)
    prompts: dict[tuple[int, str, str], dict[str, Any]] = {}
    for cell in chosen.values():
        texts = _texts(cell)
        edits = sorted({text["edit"] for text in texts})
        picked = (
            {edits[round(i * (len(edits) - 1) / (SAMPLED_EDITS - 1))] for i in range(SAMPLED_EDITS)} if edits else ()
        )
        kinds = set()
        for text in texts:
            place = (text["edit"], text["kind"])
            if text["edit"] not in picked or place in kinds:
                continue
            kinds.add(place)
            sample = {key: text[key] for key in ("edit", "kind", "prompt", "wanted")}
            short = text["text"][:LONGEST_TEXT] + (" …" if len(text["text"]) > LONGEST_TEXT else "")
            by_prompt = prompts.setdefault((*place, text["prompt"]), {**sample, "texts": []})
            by_prompt["texts"].append({"label": cell.label, "text": short, "stopped": bool(text["stopped"])})
    return [prompts[key] for key in sorted(prompts, key=lambda key: key[0])]


def _texts(cell: ResultFolder) -> list[dict[str, Any]]:
    """The cell's raw generations about its edits at its last shown checkpoint."""
    last = int(cell.means["T"].max())
    return [text for text in read_texts(cell) if (text["when"], text["checkpoint"]) == ("checkpoint", last)]
