"""What a run writes into a result folder and a report reads there."""

from __future__ import annotations

SCHEMA = 1
"""Of ``manifest.json``; a folder of another is left out."""
IDENTITY = ("method", "label", "model", "dataset", "protocol", "seed", "n_edits")
"""What tells a folder's cell from others, in its manifest and in each row of ``rows.parquet``."""
