"""Settings of a rival for any model: its template, filled from the model's own structure.

A template is an ordinary settings file, ``hparams/<METHOD>/auto.yaml``. What depends on the model stands in it in angle
brackets:

================================  ======================================================================================
``<model>``                       the model's name
``<layer 21 of 32>``              the block as deep, relatively, as block 21 of a model of 32
``<layers 4 to 8 of 30>``         as many blocks in a row, about the one as deep as their middle
``<last layer>``                  the last block
``<block>``, ``<mlp>``,           module names with ``{}`` for the layer
``<attention>``, ``<matrix>``
``<final norm>``, ``<head>``      module names; the head is the embeddings where it is tied to them
``<matrix in layer 27 of 32>``    the matrix's name in that block, as GRACE and WISE write it: ``model.layers[27]...``
``<matrices in layers 29 to 30    as many such matrices in a row, as UltraEdit writes them: ``model.layers.29...``
of 32>``
``<attention inputs>``            what LoRA adapts: the projections to queries and values, by their last names
================================  ======================================================================================

Settings without angle brackets come out as they went in.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import yaml
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...engine.structure import Structure, editable_layers, structure_of
from ...errors import HyperParamsError, ModelError
from ...hparams import settings_folder

LOG = logging.getLogger(__name__)
TEMPLATE = "auto"
"""Name of the templates among the settings files."""
_MARK = re.compile(r"<([^<>]+)>")
_LAYER = re.compile(r"layer (\d+) of (\d+)")
_LAYERS = re.compile(r"layers (\d+) to (\d+) of (\d+)")
_MATRICES = re.compile(r"matrices in (layers \d+ to \d+ of \d+)")
_MATRIX = re.compile(r"matrix in layer (\d+) of (\d+)")


def derive(method_folder: str, model: nn.Module, model_name: str) -> dict[str, Any]:
    """Read a method's template and fill it for ``model``.

    Args:
        method_folder: the method's folder in ``hparams/``, such as "FT-M".
        model: the model, or its :func:`~kdpo_editor.models.loading.outline`.
        model_name: what the settings call it.

    Raises:
        HyperParamsError: the method has no template.
        ModelError: the model lacks a part that the method needs.
    """
    file = settings_folder() / method_folder / f"{TEMPLATE}.yaml"
    try:
        template = yaml.safe_load(file.read_text("utf-8"))
    except FileNotFoundError:
        raise HyperParamsError(f"{method_folder}: there is no {file} to derive settings from") from None
    return fill(template, model, model_name)


def is_template(settings: Mapping[str, Any]) -> bool:
    """Tell whether anything in ``settings`` is still to be filled in."""
    return bool(_marked(settings))


def fill(settings: Mapping[str, Any], model: nn.Module, model_name: str) -> dict[str, Any]:
    """Replace what stands in angle brackets in ``settings``; what was derived is logged in one line.

    Raises:
        HyperParamsError: unknown words in angle brackets.
        ModelError: the model lacks a part that the method needs.
    """
    meanings = _Meanings(model, model_name)

    def filled(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [filled(key, entry) for entry in value]
        if not isinstance(value, str):
            return value
        whole = _MARK.fullmatch(value)
        if whole:
            return meanings.of(key, whole[1])
        return _MARK.sub(lambda mark: str(meanings.of(key, mark[1])), value)

    derived = {key: filled(key, settings[key]) for key in _marked(settings)}
    said = ", ".join(f"{key}={value}" for key, value in derived.items() if key != "model_name")
    LOG.info("%s for %s, derived from its structure: %s", settings.get("alg_name"), model_name, said)
    return {key: derived.get(key, value) for key, value in settings.items()}


def same_depth(layer: int, of: int, depth: int) -> int:
    """Find the block of ``depth`` that is as deep as block ``layer`` of ``of``; all count from 0."""
    return min(round(layer / of * depth), depth - 1)


def run_at_same_depth(first: int, last: int, of: int, depth: int) -> list[int]:
    """Find as many blocks in a row as there are from ``first`` to ``last``, about the one as deep as their middle.

    The last block of a model is not among them, since no later one reads what is written there. In a model that has no
    more blocks they are fewer.
    """
    count, most = last - first + 1, max(1, depth - 1)
    start = same_depth((first + last) // 2, of, depth) - count // 2
    start = max(0, min(start, most - count))
    return list(range(start, min(start + count, most)))


class _Meanings:
    """What words in angle brackets mean for one model."""

    def __init__(self, model: nn.Module, model_name: str) -> None:
        self.model, self.model_name = model, model_name
        self.structure: Structure = structure_of(model)
        # In hybrid models not every block has the matrix.
        self.editable = editable_layers(model, self.structure.matrix)

    def of(self, key: str, words: str) -> Any:
        """What ``words`` mean; ``key`` is what an error names."""
        if match := _MATRICES.fullmatch(words):
            self._check_whole(key)
            return [self.structure.matrix.format(layer) for layer in self.of(key, match[1])]
        if match := _LAYERS.fullmatch(words):
            layers = run_at_same_depth(int(match[1]), int(match[2]), int(match[3]), self.structure.depth)
            return sorted({self._nearest(layer) for layer in layers})
        if match := _LAYER.fullmatch(words):
            return self._layer(match)
        if words == "mlp" or "matrix" in words:
            self._check_whole(key)
        if match := _MATRIX.fullmatch(words):
            return self.structure.matrix.replace(".{}", f"[{self._layer(match)}]")
        parts = {
            "model": self.model_name,
            "last layer": self.structure.depth - 1,
            "block": f"{self.structure.blocks}.{{}}",
            "mlp": self.structure.mlp,
            "matrix": self.structure.matrix,
            # The classes ask for it and no method looks at it.
            "attention": self.structure.attention or self.structure.mlp,
            "attention inputs": _attention_inputs(self.structure, self.model),
            "final norm": self.structure.final_norm,
            "head": self.structure.head,
        }
        if words not in parts:
            raise HyperParamsError(
                f"{key}: <{words}> is not allowed; it must be one of {', '.join(f'<{known}>' for known in parts)}, "
                "<layer N of M>, <layers N to N of M>, <matrix in layer N of M>, <matrices in layers N to N of M>"
            )
        if parts[words] is None:
            raise ModelError(f"{key}: {self.model_name} has no {words}, which the method needs")
        return parts[words]

    def _check_whole(self, key: str) -> None:
        """The methods compared with know no matrix that holds several experts'."""
        if self.structure.is_stack:
            raise ModelError(
                f"{key}: {self.model_name} is a mixture of experts without a shared expert; the method edits one matrix"
            )

    def _layer(self, match: re.Match[str]) -> int:
        return self._nearest(same_depth(int(match[1]), int(match[2]), self.structure.depth))

    def _nearest(self, layer: int) -> int:
        return min(self.editable, key=lambda other: abs(other - layer))


def _attention_inputs(structure: Structure, model: nn.Module) -> list[str]:
    """The last names of the projections that read an attention's input to make queries and values of it.

    Where one matrix makes all three it is that one; where no block has an attention, the matrix that edits change.
    """
    names: dict[str, None] = {}
    if structure.attention is not None:
        prefix, _, suffix = structure.attention.partition("{}")
        inside = re.compile(rf"{re.escape(prefix)}\d+{re.escape(suffix)}\.(?:.*\.)?([^.]+)")
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and (match := inside.fullmatch(name)):
                names[match[1]] = None
    fitting = [name for name in names if name.startswith(("q", "v"))]
    return fitting or list(names)[:1] or [structure.matrix.rpartition(".")[2]]


def _marked(settings: Mapping[str, Any]) -> list[str]:
    """The keys whose values have angle brackets in them."""

    def has(value: Any) -> bool:
        return any(map(has, value)) if isinstance(value, list) else isinstance(value, str) and bool(_MARK.search(value))

    return [key for key, value in settings.items() if has(value)]
