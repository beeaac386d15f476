"""The layers that causal tracing found for a model, kept on disk for its next edits (``kdpo locate``)."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from ..cache import cache_folder
from ..models.loading import whole_name
from ..whole_files import make_folder, write_file

LOG = logging.getLogger(__name__)


def keep(model_name: str, matrix: str, layers: list[int]) -> Path:
    """Keep ``layers`` for the model of this name and ``matrix``, a ``rewrite_module_tmp``.

    A folder goes by its whole path. Returns the file, in the package's cache. Raises
    :class:`~kdpo_editor.StorageError`; what was kept before stays.
    """
    file = _file(model_name, matrix)
    make_folder(file.parent)
    write_file(file, json.dumps({"layers": layers}).encode())
    return file


def layers_of(model_name: str, matrix: str) -> list[int] | None:
    """The layers kept for the model of this name and ``matrix``; ``None`` where there are none."""
    file = _file(model_name, matrix)
    try:
        layers = json.loads(file.read_text("utf-8"))["layers"]
        return [int(layer) for layer in layers]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.warning("%s is damaged and is not read: %s", file, error)
        return None


def _file(model_name: str, matrix: str) -> Path:
    key = hashlib.blake2b(f"{whole_name(model_name)} {matrix}".encode(), digest_size=16)
    return cache_folder() / "located" / f"{key.hexdigest()}.json"
