"""The shipped model: a 4M-parameter Llama that knows the facts of a few hundred KnowEdit ZsRE records.

It stands in for a large model wherever editing is tried, tested or compared without a network or a GPU. Beside it
there is a second model, of 20M parameters, which one command makes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import ModelError

HERE = Path(__file__).parent
SHIPPED_MODEL = "kdpo-llama-knowedit"
"""The name by which EasyEdit and this package load the shipped model."""


SECOND_MODEL = "kdpo-llama-pararel"
"""Likewise of the second model: larger, and not shipped but made by ``make second-model``."""


def second_folder() -> Path:
    """Where the second model lies: what ``KDPO_PARAREL_MODEL`` names, or a folder of the cache (``KDPO_CACHE``)."""
    cache = os.environ.get("KDPO_CACHE") or Path(os.environ.get("HOME", ".")) / ".cache" / "kdpo_editor"
    return Path(os.environ.get("KDPO_PARAREL_MODEL") or Path(cache) / SECOND_MODEL)


def resolve(name: str) -> str:
    """The folder of the shipped or second model if ``name`` is its name, else ``name``.

    Raises :class:`~kdpo_editor.errors.ModelError` where the second model is meant and was not made yet.
    """
    if name == SECOND_MODEL:
        folder = second_folder()
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{name} is not in {folder}: `make second-model` trains it, KDPO_PARAREL_MODEL names a folder"
            )
        return str(folder)
    return str(HERE / "llama-knowedit") if name == SHIPPED_MODEL else name


def load_model(device: Any = "cpu") -> tuple[Any, Any]:
    """The shipped model (fp32, evaluation mode) and its tokenizer. Needs no network."""
    from ..models import load

    return load(SHIPPED_MODEL, device=device)


def load_records() -> list[dict[str, Any]]:
    """The KnowEdit ZsRE records that the shipped model knows, in a fixed shuffled order.

    Each has ``subject``, ``relation``, ``prompt``, ``rephrase_prompt``, ``target_new``, ``ground_truth`` (what the
    model answers now) and ``locality``, a list of ``{"prompt", "ground_truth"}`` about the same subject.
    """
    return list(json.loads((HERE / "records.json").read_text("utf-8")))


def taught_texts(source: str | None = None) -> list[str]:
    """What the shipped model was taught, as text: every fact in each phrasing of its training.

    ``source``: of one source only: "zsre" (the records' and their locality facts), "recent" or "invented".
    """
    facts = json.loads((HERE / "facts.json").read_text("utf-8"))
    return [f"{p} {fact['answer']}" for fact in facts if source in (None, fact["source"]) for p in fact["trained"]]
