"""A file of JSON records, a line each with its own checksum, that only ever grows; and who may write to it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ..errors import DamagedFileError, KDPOError, LedgerError, LedgerLocked
from ..whole_files import storage_error, sync, write_file
from .storage import (
    MAX_JSON,
    dump_json,
    field,
    hash_from,
    open_regular,
    parse_json,
)

MAX_JOURNAL = 1 << 28
"""Bytes of a journal (256 MiB)."""
OWNER = ".pid"
"""Ending of the file beside a lock that names the process holding it."""


class Journal:
    """A file of records, read as far as it was there when :meth:`read` was last called.

    A last line that is cut short, by a crash or because it is being written now, is as if it were not there.

    Attributes:
        path: where it is.
        end: bytes read or written so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rewind()

    def _rewind(self) -> None:
        # How far it was read: lines, bytes, and the last of the lines.
        self._lines, self.end, self._last = 0, 0, b""

    def read(
        self, take: Callable[[dict[str, Any], str], None], forget: Callable[[], None], damaged: list[str] | None
    ) -> None:
        """Read what the file has beyond what was read before; all of it if it is another one by now.

        Args:
            take: is given each record and where it stands; raises :class:`~kdpo_editor.DamagedFileError` if it makes
                no sense there.
            forget: is called where all that was taken before is void: the file is another one, or an error is raised.
            damaged: is added to, a text for each line that is left out; ``None`` where such a line shall raise.
        """
        if not self.path.exists():
            self._rewind()
            forget()
            return
        with open_regular(self.path) as file:
            if os.fstat(file.fileno()).st_size > MAX_JOURNAL:
                raise DamagedFileError(f"{self.path} is longer than {MAX_JOURNAL} bytes")
            file.seek(self.end - len(self._last))
            if not self._last or file.read(len(self._last)) != self._last:
                self._rewind()
                forget()
                file.seek(0)
            try:
                self._read_lines(file, take, damaged)
            except BaseException:
                self._rewind()
                forget()
                raise

    def _read_lines(
        self, file: BinaryIO, take: Callable[[dict[str, Any], str], None], damaged: list[str] | None
    ) -> None:
        while line := file.readline(MAX_JSON + 2):
            what = f"{self.path}, line {self._lines + 1}"
            whole = line
            if not line.endswith(b"\n") and len(line) <= MAX_JSON:
                return
            try:
                take(_record_of(line, what), what)
            except DamagedFileError as error:
                if damaged is None:
                    raise
                damaged.append(str(error))
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_JSON)
                if not line:
                    return
            self._lines, self.end, self._last = self._lines + 1, file.tell(), whole if line is whole else b""

    def append(self, record: dict[str, Any]) -> None:
        """Add a line, on the disk when this returns; on an error the file is as before.

        Raises:
            LedgerError: it would become too long.
            StorageError: it cannot be written.
        """
        data = line_of(record)
        if len(data) > MAX_JSON or self.end + len(data) > MAX_JOURNAL:
            raise LedgerError(f"{self.path} would become too long: compact it, or edit fewer requests in one call")
        try:
            new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                os.ftruncate(descriptor, self.end)
                try:
                    done = 0
                    while done < len(data):
                        done += os.pwrite(descriptor, data[done:], self.end + done)
                    os.fsync(descriptor)
                    if new:
                        sync(self.path.parent)
                except BaseException:
                    with suppress(OSError):
                        os.ftruncate(descriptor, self.end)
                    raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_error("write", self.path, error) from error
        self._lines, self.end, self._last = self._lines + 1, self.end + len(data), data

    def replace(self, records: Iterable[dict[str, Any]]) -> int:
        """Put ``records`` in the place of all there are, whole or not at all; returns how many bytes shorter it is."""
        data = b"".join(line_of(record) for record in records)
        write_file(self.path, data)
        return self.end - len(data)


def line_of(record: dict[str, Any]) -> bytes:
    """The line of a record, with its checksum."""
    return dump_json({"record": record, "sha256": _checksum(record)}) + b"\n"


def _record_of(line: bytes, what: str) -> dict[str, Any]:
    entry = parse_json(line.rstrip(b"\n"), what)
    record: dict[str, Any] = field(entry, "record", dict, what)
    if hash_from(entry, "sha256", what) != _checksum(record):
        raise DamagedFileError(f"{what} is damaged: its checksum does not match")
    return record


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(dump_json(record)).hexdigest()


def lock(path: Path, wait: float) -> FileLock:
    """Hold the lock on ``path``, until it is released or the process ends.

    Raises :class:`~kdpo_editor.LedgerLocked`, naming the process that holds it, after ``wait`` seconds.
    """
    held, owner, process = FileLock(path, timeout=wait, thread_local=False), path.with_suffix(OWNER), "unknown"
    try:
        held.acquire(poll_interval=0.05)
    except Timeout:
        with suppress(KDPOError), open_regular(owner) as file:
            process = file.read(20).decode("ascii", "replace").strip()
        raise LedgerLocked(
            f"process {process} is writing to {path.parent}; try again when it is done, or wait for it"
        ) from None
    except OSError as error:
        raise storage_error("write", path, error) from error
    try:
        write_file(owner, f"{os.getpid()}\n".encode())
    except BaseException:
        held.release()
        raise
    return held
