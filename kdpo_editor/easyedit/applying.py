"""KDPO behind EasyEdit's method interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..editing import edit
from ..edits.ledger import writing
from ..hparams import KDPOHyperParams


def apply_kdpo_to_model(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: KDPOHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Edit ``model`` as :func:`kdpo_editor.edit` does, with its arguments and errors.

    Args:
        hparams: settings. With ``ledger`` set, a call that succeeds is journaled there (:meth:`EditLedger.edit`).
        return_orig_weights: also return the edited matrices as they were.
        keep_original_weight, kwargs: accepted for EasyEdit's sake, without effect.

    Returns:
        The edited model, and ``{parameter name: original tensor}``, empty unless ``return_orig_weights``.
    """
    if hparams.ledger is None:
        model, originals, _ = edit(model, tok, requests, hparams, copy=copy)
    else:
        with writing(hparams.ledger) as ledger:
            model, originals, _ = ledger.edit(model, tok, requests, hparams, copy=copy)
    return model, originals if return_orig_weights else {}
