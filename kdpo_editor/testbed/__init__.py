"""The shipped model: a 4M-parameter Llama that knows the facts of a few hundred KnowEdit ZsRE records.

Tests run on it: it loads at once and knows facts that edits can change. No claim rests on it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..models.packaged import FOLDERS

HERE = Path(__file__).parent
SHIPPED_MODEL = "kdpo-llama-knowedit"
"""The name by which EasyEdit and this package load the shipped model."""
FOLDERS[SHIPPED_MODEL] = HERE / "llama-knowedit"


def load_model(device: Any = "cpu") -> tuple[Any, Any]:
    """The shipped model (fp32, evaluation mode) and its tokenizer. Needs no network."""
    from ..models.loading import load

    return load(SHIPPED_MODEL, device=device)


def load_records() -> list[dict[str, Any]]:
    """The KnowEdit ZsRE records that the shipped model knows, in a fixed shuffled order.

    Each has ``subject``, ``relation``, ``prompt``, ``rephrase_prompt``, ``target_new``, ``ground_truth`` (what the
    model answers now) and ``locality``, a list of ``{"prompt", "ground_truth"}`` about the same subject.
    """
    return list(json.loads((HERE / "records.json").read_text("utf-8")))


def known_texts() -> list[str]:
    """What the shipped model knows, as text: the facts of its records and those of :func:`unedited_texts`."""
    return [f"{record['prompt']} {record['ground_truth']}" for record in load_records()] + unedited_texts()


def unedited_texts() -> list[str]:
    """What it knows and no record changes, as text: the records' locality facts, each prompt with its answer."""
    return [f"{fact['prompt']} {fact['ground_truth']}" for record in load_records() for fact in record["locality"]]
