"""Models that EasyEdit would load wrongly, or not at all, are loaded here and handed to its editor ready."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .. import testbed as testbed  # it brings the shipped model
from ..models.loading import is_known_here, load

# The framework's own names for the methods that want padding on the right.
RIGHT_PADDED = ("ROME", "R-ROME", "MEMIT", "EMMET", "EAMET", "AlphaEdit", "CORE", "SPHERE")
# Letters in a model's name for which each form has a loader that works.
LOADS_ITSELF = {
    "pypi": ("t5", "gpt", "baichuan", "chatglm", "internlm"),
    "upstream": ("t5", "gpt", "llama", "baichuan", "chatglm", "internlm", "qwen2", "qwen3", "mistral"),
}


def with_model_loaded(init: Callable[..., None], upstream: bool) -> Callable[..., None]:
    """``BaseEditor.__init__`` of either form, which is given its model where it has no loader that works."""

    @functools.wraps(init)
    def wrapped(self: Any, hparams: Any) -> None:
        name = getattr(hparams, "model_name", None)
        known = LOADS_ITSELF["upstream" if upstream else "pypi"]
        loads_itself = isinstance(name, str) and any(letters in name.lower() for letters in known)
        if not isinstance(name, str) or (loads_itself and not is_known_here(name)):
            init(self, hparams)
            return
        hparams.model_name = _load(name, hparams)
        try:
            init(self, hparams)
        finally:
            hparams.model_name = name
        self.model_name = name

    return wrapped


def _load(name: str, hparams: Any) -> tuple[nn.Module, Any]:
    """Model and tokenizer, set up as the framework sets up those it loads itself."""
    dtype = "float16" if getattr(hparams, "fp16", False) else "float32"
    # The framework itself moves a model that is not spread over all devices.
    model, tok = load(name, dtype=dtype, device="auto" if getattr(hparams, "model_parallel", False) else "cpu")
    tok.pad_token_id = tok.eos_token_id
    tok.padding_side = "right" if hparams.alg_name in RIGHT_PADDED else "left"
    return model, tok
