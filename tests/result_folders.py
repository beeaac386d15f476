"""Result folders as a comparison leaves them, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = tuple[int, int, str, str, float]

# Two edits in a row, measured after each: (edit, checkpoint, when, metric, value).
TWO_EDITS: list[Row] = [
    (-1, 0, "checkpoint", "perplexity", 10.0),
    (-1, 0, "checkpoint", "known", 1.0),
    (-1, 0, "right_after", "setup_seconds", 5.0),
    (0, 0, "pre", "rewrite_acc", 0.0),
    (1, 0, "pre", "rewrite_acc", 0.5),
    (0, 1, "right_after", "rewrite_acc", 1.0),
    (1, 2, "right_after", "rewrite_acc", 0.8),
    (0, 1, "right_after", "seconds", 1.0),
    (1, 2, "right_after", "seconds", 3.0),
    (0, 1, "checkpoint", "rewrite_acc", 1.0),
    (0, 1, "checkpoint", "locality.same_acc", 0.5),
    (-1, 1, "checkpoint", "perplexity", 11.0),
    (-1, 1, "checkpoint", "peak_memory", 2.0 * 2**20),
    (0, 2, "checkpoint", "rewrite_acc", 0.5),
    (1, 2, "checkpoint", "rewrite_acc", 1.0),
    # Two keys for the first edit, one for the second: .5 and .8 by edit, not the .6 of all three.
    (0, 2, "checkpoint", "locality.same_acc", 0.75),
    (0, 2, "checkpoint", "locality.other_acc", 0.25),
    (1, 2, "checkpoint", "locality.same_acc", 0.8),
    (-1, 2, "checkpoint", "known", 0.9),
    (-1, 2, "checkpoint", "perplexity", 12.0),
    (-1, 2, "checkpoint", "peak_memory", 1.0 * 2**20),
]
ABOUT = {"edit": 0, "checkpoint": 2, "when": "checkpoint", "kind": "rewrite", "prompt": "Who?", "wanted": "Ada"}


def write_cell(
    results: Path,
    name: str,
    rows: list[Row] = TWO_EDITS,
    config: str = "method:\n  lr: 0.1\n",
    texts: list[dict[str, Any]] | None = None,
    **manifest: Any,
) -> Path:
    """Write one result folder below ``results`` and return it; its last line of text is torn."""
    import pandas as pd

    folder = results / name
    folder.mkdir(parents=True)
    of = {"method": "kdpo", "label": "KDPO", "model": "m", "dataset": "zsre", "protocol": "sequence"}
    of |= {"seed": 0, "n_edits": 2, **manifest}
    record = {"schema": 1, "hash": name, "status": "complete", "form": "pypi", "versions": {"torch": "2"}, **of}
    (folder / "manifest.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(config + f"seed: {of['seed']}\n")
    frame = pd.DataFrame(rows, columns=["edit", "checkpoint", "when", "metric", "value"])
    same = {k: of[k] for k in ("method", "label", "model", "dataset", "protocol", "seed", "n_edits")}
    frame.assign(**same).to_parquet(folder / "rows.parquet")
    if texts is None:
        texts = [{"text": f"{of['label']} says Ada \ud800", "stopped": False}]
    lines = [json.dumps({**ABOUT, **text}) for text in texts]
    (folder / "generations.jsonl").write_text("\n".join(lines) + '\n{"edit": 0, "che')
    return folder
