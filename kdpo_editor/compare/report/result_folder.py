"""What a report knows of one method on one model and data set: a result folder, read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd


@dataclasses.dataclass(frozen=True)
class ResultFolder:
    """One result folder. ``name`` is its path below the folder searched, ``label`` its row's name in every table."""

    folder: Path
    name: str
    label: str
    manifest: dict[str, Any]
    config: str
    settings: dict[str, str]
    means: pd.DataFrame
    """Of its edits, see :func:`~kdpo_editor.compare.report.means.cell_means`."""
    partial: bool

    @property
    def group(self) -> tuple[str, str, str, int]:
        """Model, data set, protocol and number of edits: cells that differ here are never compared."""
        return tuple(self.manifest[key] for key in ("model", "dataset", "protocol", "n_edits"))  # type: ignore[return-value]
