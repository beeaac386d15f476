"""Tensors in the cache folder, written whole or not at all and computed again where they are damaged."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..whole_files import appearing, make_folder

LOG = logging.getLogger(__name__)


def load(file: Path, names: Collection[str]) -> dict[str, Tensor] | None:
    """The tensors ``names`` of ``file``; ``None`` where there is no such file, or a damaged one, which is logged."""
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in names}
            if (stored.metadata() or {}).get("checksum") == _checksum(file, tensors):
                return tensors
        LOG.warning("%s is damaged and is computed again: its bytes do not match its checksum", file)
    except (OSError, SafetensorError) as error:
        LOG.warning("%s is damaged and is computed again: %s", file, error)
    return None


def save(file: Path, tensors: dict[str, Tensor]) -> None:
    """Keep ``tensors``. Where the cache cannot be written to, which is logged, they are computed again next time."""
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    try:
        make_folder(file.parent)
        with appearing(file) as part:
            save_file(tensors, part, metadata={"checksum": _checksum(file, tensors)})
    except (OSError, SafetensorError) as error:  # the latter for a full disk
        LOG.warning("%s cannot be kept in %s: %s", file.parent.name.replace("_", " "), file.parent, error)


def _checksum(file: Path, tensors: dict[str, Tensor]) -> str:
    """Of a file's tensors and its name, so that one is not taken for another."""
    digest = hashlib.blake2b(file.name.encode(), digest_size=16)
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
