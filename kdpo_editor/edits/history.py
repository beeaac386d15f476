"""Which edits there are, which came after which, and which stand: what the records of a ledger say, in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DamagedFileError, LedgerError
from .manifest import EditInfo, Value, values_from
from .storage import field


@dataclass(frozen=True)
class LedgerEdit:
    """One edit of a ledger.

    ``number``: counted from 1. ``parent``: the edit it was made after, 0 for none. ``state``: every matrix that the
    ledger knows, after this edit. ``base``: these matrices before any edit. ``merged``: how many edits
    :meth:`EditLedger.compact` made this one of.
    """

    number: int
    parent: int
    state: dict[str, Value]
    base: dict[str, Value]
    info: EditInfo
    merged: int = 1

    def to_json(self) -> dict[str, Any]:
        """As a line of the journal, without its checksum."""
        return {
            "kind": "edit",
            "number": self.number,
            "parent": self.parent,
            "state": {name: value.to_json() for name, value in self.state.items()},
            "base": {name: value.to_json() for name, value in self.base.items()},
            "info": self.info.to_json(),
            "merged": self.merged,
        }

    @classmethod
    def from_json(cls, record: Any, what: str) -> LedgerEdit:
        """Of its JSON form; raises :class:`~kdpo_editor.DamagedFileError`, beginning with ``what``."""
        found = cls(
            number=field(record, "number", int, what),
            parent=field(record, "parent", int, what),
            state=values_from(field(record, "state", dict, what), f"{what}: state"),
            base=values_from(field(record, "base", dict, what), f"{what}: base"),
            info=EditInfo.from_json(field(record, "info", dict, what), f"{what}: info"),
            merged=field(record, "merged", int, what),
        )
        if not 0 <= found.parent < found.number:
            raise DamagedFileError(f"{what}: edit {found.number} cannot follow edit {found.parent}")
        if {n: v.spec for n, v in found.state.items()} != {n: v.spec for n, v in found.base.items()}:
            raise DamagedFileError(f"{what}: 'state' and 'base' are not of the same matrices")
        return found


class History:
    """What a ledger's records say.

    Args:
        folder: of the ledger, for messages.
        skip_damaged: let an edit stand whose predecessor is not there.
    """

    def __init__(self, folder: Path, skip_damaged: bool) -> None:
        self.folder, self._skip = folder, skip_damaged
        self.edits: dict[int, LedgerEdit] = {}
        self.head = self._tip = 0
        self.damaged: list[str] = []
        self.model_name: str | None = None
        self._config: dict[str, Any] | None = None
        self._base: dict[str, Value] = {}

    @property
    def branch(self) -> list[LedgerEdit]:
        """The edits that stand, in order, up to the head."""
        return [self.edits[number] for number in self._path(self.head) if number]

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The requests of the edits that stand, in order."""
        return [request for one in self.branch for request in one.info.requests]

    def state(self, number: int) -> dict[str, Value]:
        """Every matrix that the ledger knows, as it was after edit ``number`` (0: before any)."""
        return dict(self._base) if number == 0 else self._base | self._edit(number).state

    def _take_record(self, record: dict[str, Any], what: str) -> None:
        kind = field(record, "kind", str, what)
        if kind == "ledger":
            if field(record, "version", int, what) != 1:
                raise DamagedFileError(f"{what}: version {record['version']} is not 1")
            name, config = field(record, "model_name", (str, type(None)), what), field(record, "config", dict, what)
            self.model_name, self._config = name, config
        elif kind == "edit":
            one = LedgerEdit.from_json(record, what)
            if one.number in self.edits:
                raise DamagedFileError(f"{what}: there are two edits {one.number}")
            if any(self._base.get(name, value) != value for name, value in one.base.items()):
                raise DamagedFileError(f"{what}: edit {one.number} began from other weights than those before it")
            if one.parent and one.parent not in self.edits and not self._skip:
                raise DamagedFileError(f"{what}: edit {one.number} follows edit {one.parent}, which is not there")
            self._take(one)
        elif kind == "move":
            to = field(record, "to", int, what)
            if to and to not in self.edits:
                raise DamagedFileError(f"{what}: edit {to} is not there")
            self._take_move(to)
        else:
            raise DamagedFileError(f"{what}: {kind!r:.60} is not a kind of record")

    def _take(self, one: LedgerEdit) -> None:
        self.edits[one.number] = one
        self._base |= one.base
        self.head = self._tip = one.number

    def _take_move(self, to: int) -> None:
        if to not in self._path(self._tip):
            self._tip = to
        self.head = to

    def _edit(self, number: int) -> LedgerEdit:
        if number not in self.edits:
            there = f"1 to {max(self.edits)}" if self.edits else "none"
            raise LedgerError(f"there is no edit {number} in {self.folder}; there is {there}")
        return self.edits[number]

    def _parent(self, one: LedgerEdit) -> int:
        """The number of the edit before; where its line was left out, of the last one before that is there."""
        if one.parent == 0 or one.parent in self.edits:
            return one.parent
        return max((number for number in self.edits if number < one.parent), default=0)

    def _path(self, number: int) -> list[int]:
        """The numbers from 0 to ``number``, each the parent of the next."""
        path = [number]
        while path[-1]:
            path.append(self._parent(self.edits[path[-1]]))
        return path[::-1]

    def _forget(self) -> None:
        self.edits, self._base, self.head, self._tip = {}, {}, 0, 0
        self._config = self.model_name = None
        self.damaged.clear()
