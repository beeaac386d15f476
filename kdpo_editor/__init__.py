"""KDPO as an editor for EasyEdit: change a fact in a language model by preference optimisation."""

from .contexts import edited, original
from .delta import EditDelta
from .earlier import EarlierEdits
from .easyedit import install as _install
from .errors import (
    CompressionError,
    DamagedFileError,
    EditDiverged,
    FingerprintError,
    HyperParamsError,
    KDPOError,
    LedgerError,
    LedgerLocked,
    ModelError,
    RequestError,
    StorageError,
)
from .hparams import KDPOHyperParams
from .kdpo import EditTrace, apply_kdpo_to_model, edit
from .ledger import EditLedger
from .testbed import SHIPPED_MODEL

__version__ = "0.1.0"
__all__ = [
    "SHIPPED_MODEL",
    "CompressionError",
    "DamagedFileError",
    "EarlierEdits",
    "EditDelta",
    "EditDiverged",
    "EditLedger",
    "EditTrace",
    "FingerprintError",
    "HyperParamsError",
    "KDPOError",
    "KDPOHyperParams",
    "LedgerError",
    "LedgerLocked",
    "ModelError",
    "RequestError",
    "StorageError",
    "apply_kdpo_to_model",
    "edit",
    "edited",
    "original",
]

_install()
