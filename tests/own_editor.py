"""An editor that is neither EasyEdit's nor this package's: gradient steps on one matrix until the answer is won."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Settings:
    model_name: str
    matrix: str
    rate: float
    steps: int = 40
    device: Any = None


def apply_own_to_model(
    model: Any, tok: Any, requests: list[dict[str, Any]], hparams: Any, return_orig_weights: bool = False, **_: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    weight = model.get_parameter(hparams.matrix)
    original = weight.detach().clone()
    weight.requires_grad_(True)
    for request in requests:
        ids = torch.tensor([tok(f"{request['prompt']} {request['target_new']}")["input_ids"]])
        labels = ids.clone()
        labels[:, : len(tok(request["prompt"])["input_ids"])] = -100
        for _step in range(hparams.steps):
            loss = model(input_ids=ids, labels=labels).loss
            (gradient,) = torch.autograd.grad(loss, weight)
            with torch.no_grad():
                weight -= hparams.rate * gradient / gradient.norm()
            if loss < 0.02:
                break
    return model, {hparams.matrix: original} if return_orig_weights else {}


def apply_and_forget(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Edits, and says nothing of what was there."""
    model, _ = apply_own_to_model(*args, **kwargs)
    return model, {}


not_callable = 1
