"""A delta on disk: a folder with a manifest and a file of tensors."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DamagedFileError, StorageError
from ..whole_files import make_folder, write_file
from .low_rank import largest_rank
from .manifest import Change, EditInfo, Value, config_hash, full_form, values_from
from .storage import (
    MAX_JSON,
    Spec,
    check_tensors,
    dump_json,
    field,
    read_json,
    read_tensors,
    write_tensors,
)

MANIFEST = "manifest.json"
Parts = tuple[dict[str, Any], dict[str, Change], EditInfo, dict[str, Value], Callable[[], dict[str, Tensor]]]
"""What a delta is made of: config, changes, info, what is stored, and how to read it."""


def save_delta(parts: Parts, folder: Path) -> int:
    """See :meth:`EditDelta.save`."""
    config, changes, info, stored, read = parts
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).is_file())):
        raise StorageError(errno.EEXIST, f"{folder} exists and is not a saved delta")
    make_folder(folder)
    old = {f for f in folder.glob("change-*.safetensors") if f.is_file()}
    joined = "".join(stored[key].sha256 for key in sorted(stored))
    file = folder / f"change-{config_hash({'all': joined})[:16]}.safetensors"
    manifest = {
        "format": "kdpo-delta",
        "version": 1,
        "config": config,
        "config_sha256": config_hash(config),
        "changes": {n: {"before": c.before.to_json(), "after": c.after.to_json()} for n, c in changes.items()},
        "stored": {key: value.to_json() for key, value in stored.items()},
        "file": file.name,
        "info": info.to_json(),
    }
    data = dump_json(manifest)
    if len(data) > MAX_JSON:
        raise StorageError(errno.EFBIG, f"cannot write {folder / MANIFEST}: it would have over {MAX_JSON} bytes")
    write_tensors(file, read())
    try:
        write_file(folder / MANIFEST, data)
    except BaseException:
        if file not in old:
            file.unlink(missing_ok=True)
        raise
    for leftover in old - {file}:
        with suppress(OSError):
            leftover.unlink()
    return len(data) + file.stat().st_size


def load_delta(folder: Path, *, follow_links: bool = False) -> Parts:
    """See :meth:`EditDelta.load`. ``follow_links``: the files may be links, as they are in the hub's own cache."""

    def file(name: str) -> Path:
        return (folder / name).resolve() if follow_links else folder / name

    where = str(folder / MANIFEST)
    manifest = read_json(file(MANIFEST))
    if field(manifest, "format", str, where) != "kdpo-delta" or field(manifest, "version", int, where) != 1:
        raise DamagedFileError(f"{where} is not a delta of version 1")
    config = field(manifest, "config", dict, where)
    if field(manifest, "config_sha256", str, where) != config_hash(config):
        raise DamagedFileError(f"{where} is damaged: config does not match config_sha256")
    changes = {}
    for name, record in field(manifest, "changes", dict, where).items():
        what = f"{where}: changes: {name:.200}"
        before = Value.from_json(field(record, "before", dict, what), what)
        after = Value.from_json(field(record, "after", dict, what), what)
        if before.spec != after.spec or len(before.spec.shape) < 2:
            raise DamagedFileError(f"{what} is {before.spec} before and {after.spec} after")
        changes[name] = Change(before, after)
    stored = values_from(field(manifest, "stored", dict, where), f"{where}: stored")
    _check_stored(changes, stored, where)
    name = field(manifest, "file", str, where)
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}\.safetensors", name):
        raise DamagedFileError(f"{where}: 'file' is {name!r:.200}; it must name a safetensors file in that folder")
    info = EditInfo.from_json(field(manifest, "info", dict, where), f"{where}: info")
    specs = {key: value.spec for key, value in stored.items()}
    check_tensors(file(name), specs)
    return config, changes, info, stored, lambda: read_tensors(file(name), specs)


def _check_stored(changes: dict[str, Change], stored: dict[str, Value], where: str) -> None:
    """Raise :class:`DamagedFileError` unless ``stored`` is a full or a low-rank form of ``changes``."""
    if stored == full_form(changes):
        return
    keys = {f"{half}:{name}" for name in changes for half in ("up", "down")}
    fits = stored.keys() == keys and all(
        _fits(change.before.spec, stored[f"up:{name}"].spec, stored[f"down:{name}"].spec)
        for name, change in changes.items()
    )
    if not fits:
        raise DamagedFileError(f"{where}: 'stored' does not go with 'changes'")


def _fits(matrix: Spec, up: Spec, down: Spec) -> bool:
    if not len(up.shape) == len(down.shape) == len(matrix.shape) or not up.dtype == down.dtype in ("F32", "F64"):
        return False
    *stack, rows, columns = matrix.shape
    rank = up.shape[-1]
    pair = (*stack, rows, rank), (*stack, rank, columns)
    return (up.shape, down.shape) == pair and rank <= largest_rank(rows, columns)
