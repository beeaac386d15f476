"""Settings that were left out, found from the model's own structure; ready-made ones go before them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import nn

from .engine.structure import editable_layers, structure_of
from .engine.weights import find_blocks
from .errors import HyperParamsError
from .hparams import KDPOHyperParams, ready_made
from .lifelong.located import layers_of

LOG = logging.getLogger(__name__)
# The place of the edited block in the model's depth. The paper edits block 21 of 32 in four of its models, and one
# between 0.65 and 0.875 of the depth in all of them.
PUBLISHED = 21 / 32
# Through the subject's tokens alone: blocks at these places, every second one of SmolLM2's thirty up to its ninth. Four
# that are spread keep as many neighbours as eight in a row, in half the time; five in a row at the upper end carry
# further and harm more.
FOR_SUBJECT = 2 / 30, 4 / 30, 6 / 30, 8 / 30
# What was said of a model already.
_SAID: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def complete(hparams: KDPOHyperParams, model: nn.Module) -> KDPOHyperParams:
    """Fill in ``layers`` and ``rewrite_module_tmp`` where they are ``None``, and leave everything else as it is.

    The matrix is the one that a block writes with into the residual stream last, by the structure of ``model``. The
    layers are those of the ready-made settings for a model of this name or, through a subject's tokens, those that were
    located (:mod:`kdpo_editor.lifelong.located`). Without such, they go by the model's depth and ``fact_token``. Blocks
    of a hybrid model without the matrix are passed over. What was derived is logged at level INFO, once.

    Raises:
        HyperParamsError: ``hparams`` are no settings.
        ModelError: the model is an encoder-decoder or quantised, its structure cannot be found, or
            ``rewrite_module_tmp`` names no list of blocks.
    """
    if not isinstance(hparams, KDPOHyperParams):
        makes = "KDPOHyperParams.from_hparams reads them from a file, from_config makes them of a dict"
        raise HyperParamsError(f"the settings are a {type(hparams).__name__}; {makes}")
    if hparams.layers is not None and hparams.rewrite_module_tmp is not None:
        return hparams
    derived = {}
    template = hparams.rewrite_module_tmp
    if template is None:
        template = derived["rewrite_module_tmp"] = structure_of(model).matrix
    layers = hparams.layers
    if layers is None:
        depth = len(find_blocks(model, replace(hparams, rewrite_module_tmp=template)))
        whole = hparams.fact_token == "all"
        known = (_published_layers if whole else _located_layers)(hparams.model_name, template, depth)
        layers = known or default_layers(depth, editable_layers(model, template) or range(depth), whole)
        derived["layers"] = str(layers)
    said = f"{hparams.model_name}: derived {', '.join(f'{key}: {value}' for key, value in sorted(derived.items()))}"
    if said not in _SAID.setdefault(model, set()):
        _SAID[model].add(said)
        LOG.info(said)
    return replace(hparams, layers=list(layers), rewrite_module_tmp=template)


def default_layers(depth: int, editable: Sequence[int], all_tokens: bool = True) -> list[int]:
    """The layers that are edited by default in a model of ``depth`` blocks.

    Args:
        depth: how many blocks there are.
        editable: the indices of those that have the matrix; the nearest of them are taken.
        all_tokens: whether matrices are trained through all tokens, and not the subject's alone.
    """
    if all_tokens:
        wanted = [round(PUBLISHED * depth)]
    else:
        # Never the last: a subject's tokens there reach no answer.
        wanted = [min(round(place * depth), max(0, depth - 2)) for place in FOR_SUBJECT]
    return sorted({min(editable, key=lambda layer: abs(layer - one)) for one in wanted})


def _located_layers(model_name: str, template: str, depth: int) -> list[int] | None:
    """The layers that were located for a model of this name, if it is deep enough for them."""
    layers = layers_of(model_name, template)
    return layers if layers and max(layers) < depth else None


def _published_layers(model_name: str, template: str, depth: int) -> list[int] | None:
    """The layers of the ready-made settings, if their matrix is ``template`` and the model is deep enough for them."""
    file = ready_made(model_name)
    if file is None:
        return None
    published = KDPOHyperParams.from_hparams(file)
    fits = published.rewrite_module_tmp == template and max(published.layers or [depth]) < depth
    return published.layers if fits else None
