"""Edits as a command is given them, a ledger or a saved delta, and the model that they are edits of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LedgerError
from .loading import open_ledger, unedited_model

if TYPE_CHECKING:
    from ..edits.delta import EditDelta


@dataclass(frozen=True)
class Edits:
    """The edits that stand in a ledger or are in a saved delta, as one change of the unedited model.

    ``number``: of the ledger's last edit among them, ``None`` for a delta. ``model_name``: of the model that they were
    made on, ``None`` where it is not known.
    """

    source: Path
    delta: EditDelta
    number: int | None
    model_name: str | None

    def load(self, name: str | None, device: str | int | None, trust: bool) -> tuple[Any, Any]:
        """The model as it was before the edits, and its tokenizer; see :func:`~.loading.unedited_model`."""
        from ..edits.manifest import dtype_of

        return unedited_model(self.source, self.model_name, dtype_of(self.delta.changes), name, device, trust)


def read_edits(source: Path, *, edit: int | None = None, skip_damaged: bool = False) -> Edits:
    """Read the edits of a ledger, up to number ``edit`` (its head, if that is ``None``), or of a saved delta.

    Raises:
        LedgerError: no edit stands, or a number is given with a delta.
        DamagedFileError: a line of the ledger or the delta is damaged, or the folder is neither.
        StorageError: it cannot be read.
    """
    from ..edits.delta import EditDelta
    from ..edits.delta_file import MANIFEST
    from ..edits.ledger import JOURNAL

    if (source / MANIFEST).exists() and not (source / JOURNAL).exists():
        if edit is not None:
            raise LedgerError(f"{source} is a saved delta, which has no numbered edits; a ledger has")
        delta = EditDelta.load(source)
        return Edits(source, delta, None, (delta.info.hparams or {}).get("model_name"))
    ledger = open_ledger(source, skip_damaged)
    number = ledger.head if edit is None else edit
    if number == 0:
        raise LedgerError(f"no edit stands in {source}")
    return Edits(source, ledger.delta(number, since=0), number, ledger.model_name)
