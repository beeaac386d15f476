"""The errors this package raises on purpose. Each names the culprit and what is allowed."""

from __future__ import annotations


class KDPOError(Exception):
    """Base of every error below; catch it to catch them all."""


class HyperParamsError(KDPOError, ValueError):
    """A key or value of :class:`~kdpo_editor.KDPOHyperParams` that is unknown, of the wrong type or out of range."""


class RequestError(KDPOError, ValueError):
    """A request that cannot be edited: a missing or empty prompt or target, or a target without tokens."""


class ModelError(KDPOError, ValueError):
    """A model that cannot be edited as asked: no such layer or matrix, quantised weights, weights on "meta"."""


class EditDiverged(KDPOError, ArithmeticError):
    """The loss or the weights of an edit became NaN or infinite. The model is as it was before the call."""


class DataError(KDPOError, ValueError):
    """A benchmark file that cannot be read, a record in it that is malformed, or more records asked for than exist."""


class ResultsError(KDPOError, ValueError):
    """A folder of results that is missing, empty or damaged; names it and says what to do."""


class CellBusy(KDPOError, RuntimeError):
    """Another process computes the same cell of a comparison."""
