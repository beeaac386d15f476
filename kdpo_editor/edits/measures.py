"""What ``kdpo check`` measures of edits: how its table and the card on the hub call it and show its figures."""

from __future__ import annotations

LABELS = {
    "prompt": "edits answered",
    "rephrase": "rephrasings answered",
    "chat": "edits answered in a chat",
    "known": "known facts kept",
    "perplexity": "perplexity",
    "agreement": "next tokens alike",
}


def label(name: str) -> str:
    """Say what the measure ``name`` is in words; a task is called by its own name."""
    return LABELS.get(name, name.removeprefix("tasks."))


def less_is_better(name: str) -> bool:
    """Tell whether the measure is a number that is better the less it is, and not a share."""
    return "perplexity" in name or "bits_per_byte" in name


def figure(name: str, value: float | None, unknown: str = "not measured") -> str:
    """Write a figure of the measure ``name``; ``unknown`` where there is none."""
    if value is None:
        return unknown
    return f"{value:.2f}" if less_is_better(name) else f"{value:.1%}"
