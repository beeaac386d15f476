"""The errors this package raises on purpose. Each names the culprit and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

PAGE = "docs/how-to/troubleshooting.md"
"""The page that has cause and remedy of each message."""

SLIP = 0.8
"""From this share of letters in common on, a name is taken for a slip and not for another name."""


class KDPOError(Exception):
    """Base of every error below; catch it to catch them all."""

    section: ClassVar[str] = "Comparisons"
    """The section of :data:`PAGE` that its messages are in."""


class HyperParamsError(KDPOError, ValueError):
    """A key or value of :class:`~kdpo_editor.KDPOHyperParams` that is unknown, of the wrong type or out of range."""

    section = "Settings"


class RequestError(KDPOError, ValueError):
    """A request that cannot be edited: a missing or empty prompt or target, or a target without tokens."""

    section = "Requests"


class ModelError(KDPOError, ValueError):
    """A model that cannot be edited as asked: no such layer or matrix, quantised weights, weights on "meta"."""

    section = "Models"


class EditDiverged(KDPOError, ArithmeticError):
    """The loss or the weights of an edit became NaN, infinite or absurdly large. The model is as before the call."""

    section = "Divergence"


class DataError(KDPOError, ValueError):
    """A benchmark file that cannot be read, a record in it that is malformed, or more records asked for than exist."""

    section = "Data sets"


class ResultsError(KDPOError, ValueError):
    """A folder of results that is missing, empty or damaged; names it and says what to do."""


class CellBusy(KDPOError, RuntimeError):
    """Another process computes the same cell of a comparison."""


class StorageError(KDPOError, OSError):
    """A file of a saved edit or a ledger that could not be written or read: disk full, read-only, not there."""

    section = "Files"


class DamagedFileError(KDPOError, ValueError):
    """A saved edit, ledger or list of requests that is not what it should be; names the file, and the line if any."""

    section = "Files"


class FingerprintError(KDPOError, ValueError):
    """A saved edit or ledger that was made on another model, or on this one in another state; says what differs."""

    section = "Fingerprints"


class LedgerError(KDPOError, ValueError):
    """Something a ledger cannot do: undo more edits than there are, go to an edit it does not have."""

    section = "Ledgers"


class LedgerLocked(LedgerError):
    """Another process is writing to the ledger; names its process id."""


class CompressionError(KDPOError, ValueError):
    """A low-rank form that would not hold its edit: a request whose answer it changes is named."""

    section = "Compression"


class HubError(KDPOError, RuntimeError):
    """A repository of the hub that cannot be written to or read: not there, not yours, public, or of something else."""

    section = "The hub"


def nearest(word: str, known: Iterable[str], alike: float = 0.6) -> str | None:
    """Find the one of ``known`` that ``word`` was meant to be; ``None`` where none shares ``alike`` of its letters."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=alike)), None)


def explained(error: BaseException) -> str:
    """The message of ``error`` and, in a line below it, where :data:`PAGE` has its cause and remedy."""
    message = str(error.strerror if isinstance(error, StorageError) else error)
    if isinstance(error, KDPOError):
        section = error.section
    elif isinstance(error, ModuleNotFoundError):
        section = "Missing packages"
    else:
        return message
    return f'{message}\nCause and remedy: {PAGE}, "{section}"'
