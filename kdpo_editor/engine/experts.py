"""Mixtures of experts: what of a block belongs to its routed experts, and what of that can be edited.

``transformers`` keeps the experts of a block in one parameter for each of their matrices, ``[E, D, F]`` or
``[E, F, D]``. Such a stack is edited as a whole. Which of its experts change is the router's choice: a token's gradient
reaches those that the token is sent to, and without a gradient no optimiser here moves anything.

Routers are never edited. What is edited lies above the router of its own block, so there the choice stays. Routers of
later blocks read what an edit changes and may choose otherwise, while training as afterwards: every step runs the
model's own routing, and an edit that is won is won by the model as it is left.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

STACKED_ONLY = "routed experts are edited only where one parameter holds them all, as transformers 5 keeps most of them"


def is_mixture(block: nn.Module) -> bool:
    """Whether ``block`` routes tokens to experts or holds their matrices, stacked or one by one."""
    names = {name.rpartition(".")[2] for name, _ in block.named_modules()}
    return bool(stacks(block)) or not names.isdisjoint({"experts", "router"})


def stacks(block: nn.Module) -> dict[str, Tensor]:
    """The parameters of ``block`` that hold a matrix of every expert, ``[E, D, F]`` or ``[E, F, D]``, by name."""
    found: dict[str, Tensor] = {}
    for prefix, module in block.named_modules():
        if not isinstance(module, _ConvNd):
            own = module.named_parameters(recurse=False)
            # RWKV's mixing coefficients are [1, 1, D].
            found |= {f"{prefix}.{name}".lstrip("."): p for name, p in own if p.ndim == 3 and min(p.shape) > 1}
    return found


def is_one_experts(name: str) -> bool:
    """Whether ``name``, of a module or parameter, lies inside a block's routed experts."""
    return "experts" in name.split(".")


def is_routers(name: str) -> bool:
    """Whether ``name``, of a module or parameter of a mixture, lies inside a router."""
    return not {"router", "gate"}.isdisjoint(name.split("."))
