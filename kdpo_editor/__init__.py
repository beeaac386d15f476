"""KDPO as an editor for EasyEdit: change a fact in a language model by preference optimisation."""

import importlib
from typing import TYPE_CHECKING, Any

from .easyedit.import_hook import install as _install
from .errors import (
    CompressionError,
    DamagedFileError,
    EditDiverged,
    FingerprintError,
    HubError,
    HyperParamsError,
    KDPOError,
    LedgerError,
    LedgerLocked,
    ModelError,
    RequestError,
    StorageError,
)
from .hparams import KDPOHyperParams
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .easyedit.applying import apply_kdpo_to_model
    from .editing import edit
    from .edits.delta import EditDelta
    from .edits.ledger import EditLedger
    from .edits.switching import edited, original
    from .engine.traces import EditTrace
    from .lifelong.replay import ReplayBuffer
    from .models.loading import load
    from .testbed import SHIPPED_MODEL

__all__ = [
    "SHIPPED_MODEL",
    "CompressionError",
    "DamagedFileError",
    "EditDelta",
    "EditDiverged",
    "EditLedger",
    "EditTrace",
    "FingerprintError",
    "HubError",
    "HyperParamsError",
    "KDPOError",
    "KDPOHyperParams",
    "LedgerError",
    "LedgerLocked",
    "ModelError",
    "ReplayBuffer",
    "RequestError",
    "StorageError",
    "apply_kdpo_to_model",
    "edit",
    "edited",
    "load",
    "original",
]

# Names whose modules need torch and transformers, which take seconds to import: loaded when they are used.
_LATER = {
    "SHIPPED_MODEL": "testbed",
    "EditDelta": "edits.delta",
    "EditLedger": "edits.ledger",
    "EditTrace": "engine.traces",
    "ReplayBuffer": "lifelong.replay",
    "apply_kdpo_to_model": "easyedit.applying",
    "edit": "editing",
    "edited": "edits.switching",
    "load": "models.loading",
    "original": "edits.switching",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_install()
