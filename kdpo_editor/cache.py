"""Where the package keeps what it can make again: converted models, statistics, answers before any edit."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Name the folder: what ``KDPO_CACHE`` says, else ``.cache/kdpo_editor`` in the home folder. It need not exist."""
    home = Path(os.environ.get("HOME") or ".")
    return Path(os.environ.get("KDPO_CACHE") or home / ".cache" / "kdpo_editor").absolute()
