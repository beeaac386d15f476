"""Models and their tokenizers, loaded alike wherever one is needed."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, nearest
from .gguf_files import converted, gguf_file
from .packaged import FOLDERS, PACKAGED

CONFIGS = ("config.json", "adapter_config.json")  # of a model, or of an adapter that names one
DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")


def load(
    name: str,
    *,
    dtype: str = "float32",
    device: str | int | None = None,
    trust_remote_code: bool = False,
    safetensors_only: bool = False,
) -> tuple[nn.Module, Any]:
    """A causal language model in evaluation mode, and its tokenizer, which has a padding token.

    Args:
        name: Hugging Face id, folder, ``.gguf`` file or folder with one, or a name of
            :data:`~kdpo_editor.models.packaged.PACKAGED` or :data:`~kdpo_editor.models.packaged.FOLDERS`.
        dtype: one of :data:`DTYPES`; "auto" is as saved.
        device: "cpu", "cuda", "cuda:1", a GPU's number, "auto" (spread over all GPUs); ``None`` is the GPU where
            there is one.
        trust_remote_code: run code that comes with the model.
        safetensors_only: refuse weights in any other format.

    Raises:
        ModelError: ``dtype`` is unknown, ``name`` cannot be loaded, or ``device`` is not there.
        StorageError: the model is in a ``.gguf`` file and the cache cannot be written.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise ModelError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(name, (str, Path)):
        raise ModelError(f"a model's name is text, not {type(name).__name__}")
    folder = folder_of(name)
    if Path(folder).is_dir() and not any((Path(folder) / config).is_file() for config in CONFIGS):
        raise ModelError(f"cannot load the model {name}: the folder {folder} has no {CONFIGS[0]}")
    try:
        tok = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map="auto" if device == "auto" else None,
            trust_remote_code=trust_remote_code,
            use_safetensors=safetensors_only or None,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"cannot load the model {name}{_hint(name)}: {error}") from error
    if device != "auto":
        try:
            model.to(int(device) if str(device).isdigit() else device)
        except (RuntimeError, AssertionError) as error:  # torch says either, by how it was built
            raise ModelError(f"device {device}: {str(error).splitlines()[0]}") from None
    # The framework goes by this name, and so do the files that it keeps; a folder's path would be part of them.
    model.config._name_or_path = name
    if tok.pad_token_id is None:
        tok.pad_token_id = tok.eos_token_id
    return model.eval(), tok


def outline(name: str, *, trust_remote_code: bool = False) -> nn.Module:
    """The model's modules without their weights, on the meta device; nothing but its configuration is read.

    Raises :class:`~kdpo_editor.errors.ModelError` where ``name`` has no configuration of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder_of(name), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the configuration of {name}{_hint(name)}: {error}") from error
    return model.eval()


def is_known_here(name: str) -> bool:
    """Whether ``name`` is a model that only :func:`load` can load: a name of this package's, or a ``.gguf`` file."""
    return name in FOLDERS or name in PACKAGED or gguf_file(name) is not None


def _hint(name: str) -> str:
    """Said of a name that looks like one of this package's and is not known."""
    if name.startswith("kdpo-"):
        return ", a name that `import kdpo_editor.testbed` may make known"
    near = nearest(name, [*PACKAGED, *FOLDERS])
    return f" (did you mean {near}?)" if near else ""


def whole_name(name: str) -> str:
    """``name`` as it is understood from any folder: the whole path of what lies here and is not known by name."""
    return name if is_known_here(name) or not Path(name).exists() else os.path.abspath(name)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` looks like a repository of the hub, and is nothing that is known or lies here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not is_known_here(name) and not Path(name).exists()


def folder_of(name: str) -> str:
    """The folder or hub id by which ``transformers`` alone loads what :func:`load` loads by ``name``.

    Raises :class:`~kdpo_editor.errors.ModelError` and :class:`~kdpo_editor.errors.StorageError` as :func:`load`.
    """
    return str(converted(name) or FOLDERS.get(name) or name)


def dequantised_from(model: nn.Module) -> dict[str, str] | None:
    """The name and SHA-256 of the ``.gguf`` file that ``model``'s weights were dequantised from, if they were."""
    config = getattr(model, "config", None)
    name, sha256 = (getattr(config, key, None) for key in ("dequantised_from", "dequantised_sha256"))
    return None if name is None or sha256 is None else {"file": name, "sha256": sha256}
