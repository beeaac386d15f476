"""Models and ledgers as the commands open them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LedgerError
from .terminal import complain

if TYPE_CHECKING:
    from ..edits.ledger import EditLedger


def load_model(name: str, dtype: str, device: str | int | None, trust: bool) -> tuple[Any, Any]:
    """Model and tokenizer; only safetensors are read."""
    from transformers.utils import logging

    from ..models.loading import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load(name, dtype=dtype, device=device, trust_remote_code=trust, safetensors_only=True)


def unedited_model(
    source: Path, known: str | None, dtype: str | None, name: str | None, device: str | int | None, trust: bool
) -> tuple[Any, Any]:
    """Load the model that the edits of ``source`` are edits of, as it was before them, and its tokenizer.

    Args:
        source: a ledger or saved delta, for messages.
        known: the name of the model that it was made on; ``None`` where it is not known.
        dtype: of its matrices; ``None`` is fp32.
        name: of the model, where it is another.
        device: where it goes.
        trust: run code that comes with it.

    Raises:
        LedgerError: no model is named, or its own code is to be run and it is not named by the caller.
        ModelError: it cannot be loaded.
    """
    if trust and not name:
        raise LedgerError("with --trust-remote-code name the model yourself, with --model")
    name = name or known
    if name is None:
        raise LedgerError(f"{source} does not name its model; give --model")
    return load_model(name, dtype or "float32", device, trust)


def model_of(ledger: EditLedger, name: str | None, device: str | None, trust: bool) -> tuple[Any, Any]:
    """The unedited model of a ledger, and its tokenizer; see :func:`unedited_model`."""
    return unedited_model(ledger.folder, ledger.model_name, stored_dtype(ledger), name, device, trust)


def stored_dtype(ledger: EditLedger) -> str | None:
    """The dtype of the matrices that a ledger changes."""
    return next((value.spec.torch_name for value in ledger.state(0).values()), None)


def open_ledger(path: Path, skip_damaged: bool) -> EditLedger:
    """A ledger that is there, to be read."""
    from ..edits.ledger import EditLedger

    ledger = EditLedger(path, skip_damaged=skip_damaged)
    _warn_of_damage(ledger)
    return ledger


def writable_ledger(path: Path, wait: float, skip_damaged: bool, made: bool = False) -> EditLedger:
    """A ledger to be written to, which is ``made`` if it is not there, if that is asked for; a context manager."""
    from ..edits.ledger import EditLedger

    if not made:
        EditLedger(path, skip_damaged=skip_damaged)  # raises where there is none
    ledger = EditLedger(path, write=True, wait=wait, skip_damaged=skip_damaged)
    _warn_of_damage(ledger)
    return ledger


def _warn_of_damage(ledger: EditLedger) -> None:
    for line in ledger.damaged:
        complain(f"skipped: {line}")
