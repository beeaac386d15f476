"""The model card of edits on the hub: what was edited, what was measured, and how the edits are loaded."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..models.loading import is_hub_id
from ..models.packaged import PACKAGED
from ..requests.forms import right_answers
from .manifest import Change, EditInfo, dtype_of
from .measures import figure, label

ROWS = 1000
"""Edits that a card lists; the manifest has them all."""


@dataclass(frozen=True)
class Base:
    """The model that edits were made on: its name, and its revision and licence where they are known."""

    name: str
    revision: str | None = None
    licence: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether the name is that of a repository, and of no folder here."""
        return is_hub_id(self.name)


def card(
    repo_id: str,
    base: Base,
    changes: Mapping[str, Change],
    info: EditInfo,
    *,
    adapter: bool,
    measured: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Write the card of ``repo_id``, in Markdown with the hub's metadata before it.

    ``adapter``: whether a LoRA adapter lies beside the delta. ``measured``: ``name``, ``before``, ``after`` and
    ``count`` of each measure, as ``kdpo check`` reports them.
    """
    metadata: dict[str, Any] = {"library_name": "peft" if adapter else "kdpo_editor"}
    if base.on_hub:
        metadata |= {"base_model": base.name, "base_model_relation": "adapter"}
    metadata |= _licence_fields(base.licence)
    metadata["tags"] = ["knowledge-editing", "kdpo", *(["lora"] if adapter else [])]
    n = len(info.requests)
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {n} {'edit' if n == 1 else 'edits'} of {_plain(base.name)}",
        "What the model was made to say, as the change of its weights, by kdpo_editor.",
        _facts(base, changes, info),
        _edits(info),
        _measured(info, measured),
        _loading(repo_id, base, changes, adapter),
        _licence(base, changes),
    ]
    return "\n\n".join(sections) + "\n"


def _facts(base: Base, changes: Mapping[str, Change], info: EditInfo) -> str:
    package = PACKAGED.get(base.name)
    name = f"{_plain(base.name)}" + (f": {package.source}, quantised in the file {package.file}" if package else "")
    revision = f"`{base.revision}`" if base.revision else "not recorded; the manifest has the SHA-256 of each matrix"
    versions = ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in info.versions.items())
    return "\n".join(
        [
            f"- Base model: {name}",
            f"- Its revision: {revision}",
            f"- Changed: {', '.join(f'`{matrix}`' for matrix in changes) or 'nothing'}",
            f"- Edited: {_plain(info.date) or 'at a time that is not recorded'}, with {versions or 'unknown versions'}",
        ]
    )


def _edits(info: EditInfo) -> str:
    known = len(info.outcomes) == len(info.requests)
    lines = ["## Edits", "", "| Prompt | Answer | Reached when it was made |", "|---|---|---|"]
    for i, request in enumerate(info.requests[:ROWS]):
        won = ("yes" if info.outcomes[i]["converged"] else "no") if known else "not recorded"
        right = " or ".join(_plain(answer) for answer in right_answers(request))
        lines.append(f"| {_plain(request['prompt'])} | {right} | {won} |")
    if len(info.requests) > ROWS:
        lines += ["", f"The other {len(info.requests) - ROWS} are in `manifest.json`."]
    return "\n".join(lines)


def _measured(info: EditInfo, measured: Sequence[Mapping[str, Any]]) -> str:
    if not measured:
        won = sum(outcome["converged"] for outcome in info.outcomes)
        said = f" When they were made, {won} of {len(info.outcomes)} were reached." if info.outcomes else ""
        return f"## Measured\n\nNothing was measured of the edits together.{said}"
    lines = ["## Measured", "", "| | Of | Before | After |", "|---|---|---|---|"]
    for one in measured:
        name = str(one["name"])
        figures = " | ".join(figure(name, one[when]) for when in ("before", "after"))
        lines.append(f"| {_plain(label(name))} | {one['count']} | {figures} |")
    said = (
        "By `kdpo check`: an edit is answered where the greedy answer begins with its target; known facts are about "
        "other subjects, and of those that the unedited model answers; perplexity and next tokens are on held-out text."
    )
    return "\n".join([*lines, "", said])


def _loading(repo_id: str, base: Base, changes: Mapping[str, Change], adapter: bool) -> str:
    dtype = dtype_of(changes) or "float32"
    revision = f', revision="{base.revision}"' if base.revision else ""
    name = json.dumps(base.name, ensure_ascii=False)
    if base.on_hub:
        imports = ["import torch", "from transformers import AutoModelForCausalLM"]
        load = f"model = AutoModelForCausalLM.from_pretrained({name}{revision}, dtype=torch.{dtype})"
    else:  # a folder, or a model that this package alone loads by name
        imports, load = ["from kdpo_editor import load"], f'model, tok = load({name}, dtype="{dtype}")'
    package = PACKAGED.get(base.name)
    found = ["## Loading", "With this package, bit for bit as it was edited:"]
    found.append(
        _code(
            [*imports, "from kdpo_editor import EditDelta"],
            load,
            f'EditDelta.from_pretrained("{repo_id}").apply(model)',
        )
    )
    if package:
        found.append(f"The base model comes with `{package.command}`.")
    if not adapter:
        return "\n\n".join([*found, "There is no adapter here for PEFT and transformers."])
    found.append("With PEFT:")
    found.append(
        _code([*imports, "from peft import PeftModel"], load, f'model = PeftModel.from_pretrained(model, "{repo_id}")')
    )
    if base.on_hub:
        found.append("With transformers, where PEFT is installed:")
        found.append(_code(imports, f'model = AutoModelForCausalLM.from_pretrained("{repo_id}", dtype=torch.{dtype})'))
    return "\n\n".join(found)


def _code(imports: Sequence[str], *lines: str) -> str:
    return "\n".join(["```python", *imports, "", *lines, "```"])


def _licence(base: Base, changes: Mapping[str, Change]) -> str:
    n = len(changes)
    held = f"{n} of its matrices, which" if n != 1 else "one of its matrices, which"
    licence = _plain(base.licence) if base.licence else "not known"
    return f"## Licence\n\nThat of the base model: {licence}. The change is of {held} may be contained whole."


def _licence_fields(licence: str | None) -> dict[str, str]:
    if not licence:
        return {}
    if re.fullmatch(r"[A-Za-z0-9.+-]+", licence):
        return {"license": licence.lower()}
    return {"license": "other", "license_name": licence}


def _plain(text: str) -> str:
    """``text`` in a line or a table's cell of Markdown, where nothing in it has a meaning."""
    escaped = re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"\s*[\r\n]+\s*", "<br>", escaped.strip())
