"""KDPO as an editor for EasyEdit: change a fact in a language model by preference optimisation."""

from .earlier import EarlierEdits
from .easyedit import install as _install
from .errors import EditDiverged, HyperParamsError, KDPOError, ModelError, RequestError
from .hparams import KDPOHyperParams
from .kdpo import EditTrace, apply_kdpo_to_model, edit
from .testbed import SHIPPED_MODEL

__version__ = "0.1.0"
__all__ = [
    "SHIPPED_MODEL",
    "EarlierEdits",
    "EditDiverged",
    "EditTrace",
    "HyperParamsError",
    "KDPOError",
    "KDPOHyperParams",
    "ModelError",
    "RequestError",
    "apply_kdpo_to_model",
    "edit",
]

_install()
