"""EasyEdit's editor begins at the head of the ledger that KDPO's settings name, and tells it what became of edits."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from ..hparams import KDPOHyperParams

LOG = logging.getLogger(__name__)


def resumed(init: Callable[..., None]) -> Callable[..., None]:
    """``BaseEditor.__init__``, after which the model is where the ledger's head is."""

    @functools.wraps(init)
    def wrapped(self: Any, hparams: Any) -> None:
        init(self, hparams)
        folder = _ledger_of(hparams)
        if folder is not None:
            from ..edits.ledger import writing

            with writing(folder) as ledger:
                head = ledger.restore(self.model)
            if head:
                LOG.warning("resumed from %s: the model has its edits up to %d", folder, head)

    return wrapped


def followed(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of ``BaseEditor`` after which the ledger's head is where the model is, edited or put back."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        folder = _ledger_of(self.hparams)
        if folder is not None:
            from ..edits.ledger import writing

            with writing(folder) as ledger:
                ledger.follow(self.model)
        return result

    return wrapped


def _ledger_of(hparams: Any) -> str | None:
    return hparams.ledger if isinstance(hparams, KDPOHyperParams) else None
