"""Files that appear whole or not at all: written beside their place, and renamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from .errors import StorageError


def write_file(path: Path, data: bytes, synced: bool = True) -> None:
    """Write ``data`` to ``path``, as :func:`appearing` does."""
    with appearing(path, synced) as part:
        part.write_bytes(data)


@contextmanager
def appearing(path: Path, synced: bool = True) -> Iterator[Path]:
    """Give a place to write to; the file there becomes ``path`` at the end.

    Whatever happens, ``path`` is as before or holds all of it. Only a killed process leaves the other file behind,
    whose name ends in ``.part``.

    Args:
        path: the file; its folder is there.
        synced: all of it is on the disk at the end. Without, a machine that loses its power may lose some of it, which
            is for whoever reads it to find out.

    Raises:
        StorageError: it cannot be written; names the file and why.
    """
    part = path.with_name(f"{path.name}.{token_hex(8)}.part")  # no two writers, of whatever machine, have the same
    try:
        try:
            yield part
            if synced:
                sync(part)
            os.replace(part, path)
            if synced:
                sync(path.parent)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
    except OSError as error:
        raise storage_error("write", path, error) from error


def sync(path: Path) -> None:
    """Force a file, or the renames in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make ``folder`` where there is none; raises :class:`~kdpo_editor.StorageError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("make", folder, error) from error


def storage_error(verb: str, path: Path, error: OSError) -> StorageError:
    """Make the error to raise for ``error``, with its ``errno``."""
    return StorageError(error.errno or errno.EIO, f"cannot {verb} {path}: {error.strerror or error}")
