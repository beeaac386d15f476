"""How much a model's predictions depend on what its matrices put out, so that each layer bears what harms least.

An update of an early layer passes through all the others, and one of a layer whose outputs are small beside what they
are added to changes little. The mean square of the gradients tells: it is the output side of a Kronecker-factored
natural gradient (Martens and Grosse 2015), of which the mean eigenvalue alone is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..engine.weights import only_training
from ..errors import ModelError


def sensitivities(model: nn.Module, names: Sequence[str], windows: Sequence[Tensor]) -> dict[str, float]:
    """Find the mean square of the gradients at the outputs of each module named.

    They are gradients of the summed negative log-likelihood, in nats, of a text's own tokens. The output at a text's
    first token does not count, as among second moments. A bar shows the progress of what takes more than a second.

    Args:
        model: a language model. It is left as found.
        names: modules that a pass calls once each.
        windows: token ids ``[S]``, int64, of any lengths from 2 up that the model takes.

    Raises:
        ModelError: the gradients are not finite.
    """
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            outputs[name] = output.requires_grad_()
            return output.clone()  # some models add to it in place

        return model.get_submodule(name).register_forward_hook(keep)

    handles = [hook(name) for name in names]
    squares, count = dict.fromkeys(names, 0.0), 0
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    try:
        with only_training(model, {}, {}):
            for ids in tqdm(windows, desc="sensitivity", unit="text", delay=1, disable=None, leave=False):
                logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0, :-1].float()
                loss = F.cross_entropy(logits, ids[1:].to(logits.device), reduction="sum")
                gradients = torch.autograd.grad(loss, [outputs[name] for name in names])
                for name, gradient in zip(names, gradients, strict=True):
                    squares[name] += gradient.reshape(len(ids), -1)[1:].float().square().mean(-1).sum().item()
                count += len(ids) - 1
    finally:
        for handle in handles:
            handle.remove()
    found = {name: total / count for name, total in squares.items()}
    for name, value in found.items():
        if not value < float("inf"):
            raise ModelError(f"mom2_weight: the gradients at the outputs of {name} are not finite on the text")
    return found
