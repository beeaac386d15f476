"""Models to be compared on: loaded alike for every method."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..testbed import resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def load(name: str, *, dtype: str = "float32", device: str | None = None) -> tuple[nn.Module, Any]:
    """A causal language model in evaluation mode, nothing of it requiring gradients, and its tokenizer.

    Args:
        name: Hugging Face id, folder, or :data:`kdpo_editor.SHIPPED_MODEL`.
        dtype: "float32", "bfloat16", "float16" or "auto" (as saved).
        device: "cpu", "cuda", "cuda:1", "auto" (spread over all GPUs); ``None`` is the GPU where there is one.

    Raises:
        ModelError: ``dtype`` is unknown or ``name`` cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tok = AutoTokenizer.from_pretrained(resolve(name))
        model = AutoModelForCausalLM.from_pretrained(
            resolve(name), dtype=DTYPES[dtype], device_map="auto" if device == "auto" else None
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"the model {name!r} cannot be loaded: {error}") from error
    if device != "auto":
        model.to(device)
    model.eval().requires_grad_(False)
    # The framework goes by this name, and so do the files that it keeps; a folder's path would be part of them.
    model.config._name_or_path = name
    if tok.pad_token_id is None:
        tok.pad_token_id = tok.eos_token_id
    return model, tok
