"""The layers that causal tracing found for a model, kept on disk for its next edits (``kdpo locate``)."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from torch import nn

from ..cache import cache_folder
from ..whole_files import make_folder, write_file
from .second_moments import remember

LOG = logging.getLogger(__name__)


def keep(model: nn.Module, matrix: str, layers: list[int]) -> Path:
    """Keep ``layers`` for ``model``, as it was before any edit, and ``matrix``, a ``rewrite_module_tmp``.

    Returns the file, in the package's cache. Raises :class:`~kdpo_editor.StorageError`; what was kept before stays.
    """
    file = _file(model, matrix)
    make_folder(file.parent)
    write_file(file, json.dumps({"layers": layers}).encode())
    return file


def layers_of(model: nn.Module, matrix: str) -> list[int] | None:
    """The layers kept for ``model`` and ``matrix``; ``None`` where there are none."""
    if not _folder().is_dir():  # most have never located anything, and a fingerprint takes a pass over the weights
        return None
    file = _file(model, matrix)
    try:
        layers = json.loads(file.read_text("utf-8"))["layers"]
        return [int(layer) for layer in layers]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.warning("%s is damaged and is not read: %s", file, error)
        return None


def _folder() -> Path:
    return cache_folder() / "located"


def _file(model: nn.Module, matrix: str) -> Path:
    key = hashlib.blake2b(f"{remember(model)[0]} {matrix}".encode(), digest_size=16)
    return _folder() / f"{key.hexdigest()}.json"
