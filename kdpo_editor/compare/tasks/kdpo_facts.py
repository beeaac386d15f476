"""The facts of the task file beside this, for lm-evaluation-harness."""

from __future__ import annotations

from typing import Any

from kdpo_editor.compare.run.datasets import load


def records(**_: Any) -> dict[str, Any]:
    """CounterFact records that no split for edits has, in the order of their file."""
    from datasets import Dataset  # type: ignore[import-not-found]

    facts = load("counterfact-known", shuffle=False)
    rows = [{"prompt": f.prompt, "old": f.ground_truth, "new": f.target_new} for f in facts]
    return {"test": Dataset.from_list(rows)}
