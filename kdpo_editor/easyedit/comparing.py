"""What a comparison of methods needs: their settings, what they remember of a model, and quiet."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import HyperParamsError
from ..hparams import KDPOHyperParams
from ..whole_files import appearing, make_folder
from .finding import form, require
from .ultraedit import forget_statistics, lifelong_ultraedit

# Where methods keep what they remember of a model's earlier edits.
MODULES = {"AlphaEdit": "alphaedit.AlphaEdit_main", "SPHERE": "SPHERE.SPHERE_main", "WISE": "wise.WISE"}
# Those that project on a null space, and remember the keys of earlier edits.
NULL_SPACE = ("AlphaEdit", "SPHERE")
# Keys of settings files that one form's classes have and the other's lack.
OTHER_FORM = ("objective_optimization", "lora_type", "model_parallel", "fp16", "batch_size", "max_length")


def methods() -> dict[str, Callable[..., Any]]:
    """The framework's methods by name, KDPO among them."""
    require()
    found: dict[str, Callable[..., Any]] = importlib.import_module("easyeditor.util.alg_dict").ALG_DICT
    return {**found, "ULTRAEDIT": lifelong_ultraedit} if "ULTRAEDIT" in found else found


def settings(config: dict[str, Any]) -> tuple[Any, list[str]]:
    """``config`` (with its ``alg_name``) as the installed form's class reads it, and the keys that it has no use for.

    Raises :class:`~kdpo_editor.HyperParamsError` naming a key that neither form has, or those that are missing.
    """
    name = config["alg_name"]
    if name == "KDPO":
        return KDPOHyperParams.from_config(config), []
    package = require()
    wanted = f"{name}HyperParams".lower().replace("-", "_")
    kind = next((getattr(package, n) for n in dir(package) if n.lower() == wanted), None)
    if kind is None:
        raise HyperParamsError(f"alg_name: EasyEdit's {form()} form has no settings for {name!r}")
    if "act_margin" in config:  # WISE: three fields in the class, one list in the files
        margins = dict(zip(("alpha", "beta", "gamma"), config["act_margin"], strict=True))
        config = {**{k: v for k, v in config.items() if k != "act_margin"}, **margins}
    if name == "SimIE":
        return _with_base(kind, config)
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [key for key in config if key not in known and key not in OTHER_FORM]
    if unknown:
        raise HyperParamsError(f"{name}: unknown key {unknown[0]!r}. Known keys: {', '.join(known)}")
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in config]
    if missing:
        raise HyperParamsError(f"{name}: missing key{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
    return kind(**{k: v for k, v in config.items() if k in known}), sorted(set(config) - set(known))


def _with_base(kind: Any, config: dict[str, Any]) -> tuple[Any, list[str]]:
    """SimIE's settings and those of the method that it works on, which stand in one file here; see :func:`settings`.

    A key that both have is for both.
    """
    own = {f.name for f in dataclasses.fields(kind) if f.init}
    base = {key: value for key, value in config.items() if key not in own - {"model_name", "device", *OTHER_FORM}}
    base_hparams, ignored = settings({**base, "alg_name": config["base_method"]})
    hparams = kind(**{key: value for key, value in config.items() if key in own})
    hparams._base_hparams = base_hparams
    return hparams, ignored


def forget(templates: dict[str, list[str]] | None = None) -> None:
    """Clear what the framework's methods keep in their modules about the last model.

    ``templates``: contexts to use instead of those that ROME, its successors and WISE would draw from the model at
    their first edit, by ``"dot"`` (behind a sentence) and ``"plain"``; each holds ``{}`` once.
    """
    dot, plain = (["{}", *templates[k]] if templates else None for k in ("dot", "plain"))
    state: dict[str, dict[str, Any]] = {
        "rome.rome_main": {"CONTEXT_TEMPLATES_CACHE": dot},
        "r_rome.r_rome_main": {"CONTEXT_TEMPLATES_CACHE": dot},
        "wise.utils": {"CONTEXT_TEMPLATES_CACHE": plain},
    }
    for name in ("memit.memit_main", "emmet.emmet_main", "pmet.pmet_main", "core.core_main"):
        state[name] = {"CONTEXT_TEMPLATES_CACHE": dot and [["{}"], dot[1:]], "COV_CACHE": {}}
    for name in ("alphaedit.AlphaEdit_main", "SPHERE.SPHERE_main"):
        state[name] = {**state["memit.memit_main"], "P_loaded": False}
    for name, values in state.items():
        module = sys.modules.get(f"easyeditor.models.{name}")
        for key, value in values.items():
            if module is not None and hasattr(module, key):
                setattr(module, key, value)
    for method in (*MODULES, "ULTRAEDIT"):
        forget_history(method)


def forget_history(method: str, hparams: Any = None) -> None:
    """Clear what ``method`` remembers about its earlier edits of the model, in its module or in its ``hparams``."""
    values: dict[str, dict[str, Any]] = {
        "AlphaEdit": {"cache_c_new": False},
        "SPHERE": {"cache_c_new": False},
        "WISE": {"edit_history": [], "merge_group_edit_history": []},
    }
    module = sys.modules.get(f"easyeditor.models.{MODULES.get(method)}")
    for key, value in values.get(method, {}).items():
        if module is not None:
            setattr(module, key, value)
    if method == "SimIE" and hparams is not None:
        hparams._simie_instance = None
    if method == "ULTRAEDIT":
        forget_statistics()


def prepare(method: str, model: nn.Module, hparams: Any) -> None:
    """Give ``method`` before an edit what it would look for under names that not every model has.

    AlphaEdit and SPHERE take the shape of their memory of earlier edits from letters in the model's name, SimIE which
    way its matrix lies; and WISE the activation from either of two keys of the model's config.
    """
    if method in NULL_SPACE and not _module(method).cache_c_new:
        matrix: Any = model.get_submodule(hparams.rewrite_module_tmp.format(hparams.layers[-1]))
        width = matrix.in_features if hasattr(matrix, "in_features") else matrix.nx
        _module(method).cache_c = torch.zeros(len(hparams.layers), width, width)
        _module(method).cache_c_new = True
    if method == "SimIE":
        base = hparams.base_hparams
        changed = model.get_submodule(base.rewrite_module_tmp.format(base.layers[-1]))
        hparams.model_name = "gpt2-xl" if isinstance(changed, Conv1D) else "llama"
    if method == "WISE":
        names = ("hidden_act", "activation_function", "hidden_activation")
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        hparams.hidden_act = next((getattr(config, n) for n in names if getattr(config, n, None)), "silu")


def target_as_told(method: str, tok: Any, target: str) -> str:
    """``target`` as ``method`` must be told it. PMET puts a space before it only if "gpt" is in the model's name.

    Other tokenizers need it too, those whose tokens tell the beginning of a word by the space before it.
    """
    one, two = (tok.encode(text, add_special_tokens=False) for text in ("a", "a a"))
    return f" {target}" if method == "PMET" and two != one * 2 else target


def memory(method: str) -> dict[str, torch.Tensor]:
    """What ``method`` keeps in its module about earlier edits and needs for the next one, as tensors by name."""
    if method not in NULL_SPACE or not _module(method).cache_c_new:
        return {}
    return {f"{method}.cache_c": _module(method).cache_c.clone()}


def remember(method: str, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give ``method`` its :func:`memory` back; returns what of ``saved`` was not that."""
    rest = dict(saved)
    if method in NULL_SPACE and f"{method}.cache_c" in rest:
        _module(method).cache_c = rest.pop(f"{method}.cache_c")
        _module(method).cache_c_new = True
    return rest


def save_null_space(model: nn.Module, tok: Any, hparams: Any) -> None:
    """Compute the null-space projections of ``hparams.layers`` with the framework and save them at ``hparams.P_loc``.

    They are AlphaEdit's; SPHERE's are the same.

    The framework would save them in the working directory and look for them elsewhere.
    """
    module = _module("AlphaEdit")
    projections = torch.stack([module.get_project(model, tok, layer, hparams) for layer in hparams.layers])
    make_folder(Path(hparams.P_loc).parent)
    with appearing(Path(hparams.P_loc)) as part:
        torch.save(projections, part)


def _module(method: str) -> Any:
    return sys.modules[f"easyeditor.models.{MODULES[method]}"]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """The framework prints every step, logs every edit twice and writes into ``./logs``; none of it is wanted here."""
    disabled, folder = logging.root.manager.disable, Path.cwd()
    logging.disable(logging.INFO)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                yield
            os.chdir(folder)
    finally:
        os.chdir(folder)
        logging.disable(disabled)
