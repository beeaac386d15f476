"""What an unedited model says, kept on disk: it is the same for every method and for every later process."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...cache import cache_folder
from ...whole_files import make_folder, write_file
from .cell_locks import one_at_a_time
from .evaluate import fingerprint
from .results import versions

LOG = logging.getLogger(__name__)
Kept = Callable[[Mapping[str, Any], Callable[[], Any]], Any]


def kept_for(model: nn.Module, of: str | None = None, cache: Path | None = None) -> Kept:
    """Make ``kept(key, compute)``: what ``compute()`` gives for ``model`` and ``key``, from disk where it is there.

    ``key`` and what is computed are plain values of JSON. ``of``: the model's
    :func:`~kdpo_editor.compare.run.evaluate.fingerprint`, where it is known. ``cache``: a folder, the package's own
    without it. Where nothing can be written there, it is computed each time. Of processes that want the same at
    once, one computes it.
    """
    own = {"model": of or fingerprint(model), "name": getattr(model, "name_or_path", ""), "versions": versions()}
    folder = (cache or cache_folder()) / "before"

    def kept(key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        name = hashlib.sha256(json.dumps({**own, **key}, sort_keys=True).encode()).hexdigest()[:24]
        file = folder / f"{name}.json"
        with one_at_a_time(folder.parent, name):
            try:
                return json.loads(file.read_text("utf-8"))
            except (OSError, ValueError):
                found = compute()
                try:
                    make_folder(folder)
                    write_file(file, json.dumps(found, ensure_ascii=False).encode())
                except OSError as error:
                    LOG.warning("what the unedited model says cannot be kept in %s: %s", folder, error)
                return found

    return kept
