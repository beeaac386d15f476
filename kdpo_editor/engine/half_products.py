"""Matrix products in bfloat16 while steps are taken, on a model in fp32.

Most of a step's time goes into products with weights that are not edited. CPUs with instructions for bfloat16 do them
two to three times as fast in it. Only what is multiplied is rounded: the residual stream, norms, attention and the
edited matrices stay as they are, and so does the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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


def halved(part: UpperPart, weights: Mapping[str, nn.Parameter], bf16: bool | None) -> list[nn.Linear | Conv1D]:
    """The linear modules of the blocks of ``part`` that multiply in bfloat16 while steps are taken.

    Modules of ``weights``, the edited matrices, do not, nor do those whose weights are not in fp32, nor those with a
    ``forward`` of their own.

    Args:
        part: the model from its first edited block up.
        weights: the edited matrices, by name.
        bf16: whether any do; ``None`` is where :func:`pay` says so.
    """
    if not (pay(part.place) if bf16 is None else bf16):
        return []
    edited = {id(weight) for weight in weights.values()}
    modules = chain.from_iterable(block.modules() for block in part.blocks)
    linear = [cast("nn.Linear | Conv1D", m) for m in modules if type(m) in (nn.Linear, Conv1D)]
    whole = [m for m in linear if m.weight.dtype == torch.float32 and "forward" not in m.__dict__]
    return [m for m in whole if id(m.weight) not in edited]


def copied_bytes(modules: Iterable[nn.Linear | Conv1D]) -> int:
    """What the copies of the weights of ``modules`` take."""
    return sum(module.weight.numel() for module in modules) * torch.bfloat16.itemsize


@contextmanager
def half_products(modules: Iterable[nn.Linear | Conv1D]) -> Iterator[None]:
    """Inside, ``modules`` multiply in bfloat16, with a copy of their weights."""
    with ExitStack() as patches:
        for module in modules:
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
            patches.enter_context(forward_is(module, _linear(weight.detach().bfloat16(), module.bias)))
        yield


def _linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """``hidden @ weight.T + bias``, multiplied in the dtype of ``weight``, ``[D_out, D_in]``."""

    def forward(hidden: Tensor) -> Tensor:
        output = nn.functional.linear(hidden.to(weight.dtype), weight).to(hidden.dtype)
        return output if bias is None else output + bias

    return forward
