"""AdaLoRA: the LoRA of the PyPI form, and of upstream's by default."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn


def mend_adalora() -> None:
    """Let either form's AdaLoRA run: peft is told the number of steps, and settings get what the code reads."""
    lora: Any = importlib.import_module("easyeditor.models.lora.lora_main")
    hparams_class = importlib.import_module("easyeditor.models.lora.lora_hparams").LoRAHyperParams
    if not hasattr(hparams_class, "model_parallel"):
        hparams_class.model_parallel = False
    config_class, run = lora.AdaLoraConfig, lora.execute_lora

    @functools.wraps(run)
    def execute(model: nn.Module, tok: Any, requests: Sequence[Any], hparams: Any, *args: Any, **kwargs: Any) -> Any:
        lora.AdaLoraConfig = functools.partial(config_class, total_step=hparams.num_steps)
        try:
            return run(model, tok, requests, hparams, *args, **kwargs)
        finally:
            lora.AdaLoraConfig = config_class

    lora.execute_lora = execute
