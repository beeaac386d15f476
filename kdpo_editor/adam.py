"""Adam on a few matrices of any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Adam:
    """Fused Adam; half-precision matrices are stepped through fp32 copies and rounded into place after each step.

    Args:
        weights: the matrices, ``requires_grad`` set.
        lr: learning rate.
        weight_decay: L2 penalty.
        norm_constraint: largest change of any single weight, or ``None``.
    """

    def __init__(
        self, weights: list[nn.Parameter], lr: float, weight_decay: float, norm_constraint: float | None
    ) -> None:
        self.weights = weights
        half = (torch.float16, torch.bfloat16)
        self.masters = [w.detach().float() if w.dtype in half else w for w in weights]
        self.bounds = (
            []
            if norm_constraint is None
            else [(m.detach() - norm_constraint, m.detach() + norm_constraint) for m in self.masters]
        )
        self.optimizer = torch.optim.Adam(self.masters, lr=lr, weight_decay=weight_decay, fused=True)

    def step(self, loss: Tensor, skip: Tensor | None = None) -> None:
        """Backpropagate ``loss`` (a scalar) and take one step; gradients are gone afterwards.

        ``skip``, a boolean scalar on the weights' device, leaves weights and optimiser state as they are where it is
        true, without the host having to know.
        """
        gradients = torch.autograd.grad(loss, self.weights)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.to(master.dtype)
        # The fused kernel's own switch, which gradient scalers use: a step is taken where it is zero.
        self.optimizer.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for master, (low, high) in zip(self.masters, self.bounds, strict=False):
                master.clamp_(low, high)
            for weight, master in zip(self.weights, self.masters, strict=True):
                if weight is not master:
                    weight.copy_(master)
