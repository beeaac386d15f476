"""Adam on a few matrices of any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .preserve import Preconditioner


class Adam:
    """Fused Adam; half-precision matrices are stepped through fp32 copies and rounded into place after each step.

    With preconditioners ``P`` steps are taken on ``D``, which begins at zero, in ``W = W_0 + D P``.

    Args:
        weights: the matrices, ``requires_grad`` set.
        lr: learning rate.
        weight_decay: L2 penalty.
        norm_constraint: largest change of any single weight, or ``None``.
        preconditioners: one for each matrix, or none at all.
    """

    def __init__(
        self,
        weights: list[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        norm_constraint: float | None = None,
        preconditioners: Sequence[Preconditioner] = (),
    ) -> None:
        self.weights = weights
        self.preconditioners = preconditioners
        half = (torch.float16, torch.bfloat16)
        self.masters = [w.detach().float() if w.dtype in half else w for w in weights]
        if preconditioners:
            self.starts = [m.detach().clone() for m in self.masters]
            self.masters = [torch.zeros_like(m) for m in self.starts]
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
        for i, (master, gradient) in enumerate(zip(self.masters, gradients, strict=True)):
            gradient = gradient.to(master.dtype)
            master.grad = self.preconditioners[i](gradient) if self.preconditioners else gradient
        # The fused kernel's own switch, which gradient scalers use: a step is taken where it is zero.
        self.optimizer.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for master, (low, high) in zip(self.masters, self.bounds, strict=False):
                master.clamp_(low, high)
            for i, (weight, master) in enumerate(zip(self.weights, self.masters, strict=True)):
                if self.preconditioners:
                    weight.copy_(self.starts[i] + self.preconditioners[i](master))
                elif weight is not master:
                    weight.copy_(master)
