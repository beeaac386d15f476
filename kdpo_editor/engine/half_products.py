"""Matrix products in bfloat16 while steps are taken, on a model in fp32.

Most of a step's time goes into products with weights that are not edited. CPUs with instructions for bfloat16 do them
two to three times as fast in it. Only what is multiplied is rounded: the residual stream, norms, attention and the
edited matrices stay as they are, and so does the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .patches import forward_is
from .upper_part import UpperPart


def pay(device: torch.device) -> bool:
    """Whether products in bfloat16 are known to be faster on ``device``: on a CPU with AVX-512 BF16 or AMX."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in asked)


@contextmanager
def half_products(part: UpperPart, weights: Mapping[str, nn.Parameter], bf16: bool | None) -> Iterator[None]:
    """Inside, linear modules of the blocks of ``part`` multiply in bfloat16.

    Modules of ``weights``, the edited matrices, do not, nor do those whose weights are not in fp32, nor those with a
    ``forward`` of their own.

    Args:
        part: the model from its first edited block up.
        weights: the edited matrices, by name.
        bf16: whether; ``None`` is where :func:`pay` says so.
    """
    edited = {id(weight) for weight in weights.values()}
    with ExitStack() as patches:
        if bf16 or (bf16 is None and pay(part.place)):
            for module in chain.from_iterable(block.modules() for block in part.blocks):
                if type(module) not in (nn.Linear, Conv1D) or "forward" in module.__dict__:
                    continue
                weight, bias = module.weight, cast("Tensor | None", module.bias)
                assert isinstance(weight, Tensor)
                if weight.dtype == torch.float32 and id(weight) not in edited:
                    rounded = (weight if isinstance(module, nn.Linear) else weight.T).detach().bfloat16()
                    patches.enter_context(forward_is(module, _linear(rounded, bias)))
        yield


def _linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """``hidden @ weight.T + bias``, multiplied in the dtype of ``weight``, ``[D_out, D_in]``."""

    def forward(hidden: Tensor) -> Tensor:
        output = nn.functional.linear(hidden.to(weight.dtype), weight).to(hidden.dtype)
        return output if bias is None else output + bias

    return forward
