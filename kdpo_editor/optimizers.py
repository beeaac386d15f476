"""Steps on a few matrices of any floating dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .hparams import KDPOHyperParams


class Optimizer(ABC):
    """Half-precision matrices are stepped through fp32 copies and rounded into place after each step.

    Args:
        weights: the matrices, ``requires_grad`` set.
        norm_constraint: largest change of any single weight, or ``None``.
    """

    def __init__(self, weights: list[nn.Parameter], norm_constraint: float | None) -> None:
        self.weights = weights
        half = (torch.float16, torch.bfloat16)
        self.masters = [w.detach().float() if w.dtype in half else w for w in weights]
        self.bounds = (
            []
            if norm_constraint is None
            else [(m.detach() - norm_constraint, m.detach() + norm_constraint) for m in self.masters]
        )

    def step(self, loss: Tensor, skip: Tensor | None = None) -> None:
        """Backpropagate ``loss`` (a scalar) and take one step; gradients are gone afterwards.

        ``skip``, a boolean scalar on the weights' device, leaves weights and optimiser state as they are where it is
        true, without the host having to know.
        """
        gradients = torch.autograd.grad(loss, self.weights)
        with torch.no_grad():
            self._move([g.to(m.dtype) for g, m in zip(gradients, self.masters, strict=True)], loss.detach(), skip)
            for master, (low, high) in zip(self.masters, self.bounds, strict=False):
                master.clamp_(low, high)
            for weight, master in zip(self.weights, self.masters, strict=True):
                if weight is not master:
                    weight.copy_(master)

    @abstractmethod
    def _move(self, gradients: Sequence[Tensor], loss: Tensor, skip: Tensor | None) -> None:
        """Take a step on ``masters``."""


class Adam(Optimizer):
    """Fused Adam (Kingma and Ba 2015), the paper's.

    Args:
        lr: learning rate.
        weight_decay: L2 penalty.
    """

    def __init__(
        self, weights: list[nn.Parameter], norm_constraint: float | None, lr: float, weight_decay: float
    ) -> None:
        super().__init__(weights, norm_constraint)
        self.adam = torch.optim.Adam(self.masters, lr=lr, weight_decay=weight_decay, fused=True)

    def _move(self, gradients: Sequence[Tensor], loss: Tensor, skip: Tensor | None) -> None:
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        # The fused kernel's own switch, which gradient scalers use: a step is taken where it is zero.
        self.adam.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]
        self.adam.step()
        self.adam.zero_grad()


class Polyak(Optimizer):
    """Gradient steps as long as would bring the loss to zero if it were linear: ``lr * L / |g|^2 * g`` (Polyak 1969).

    Nothing is remembered from step to step. On a hinge, with ``lr`` 1, a step is the least change of the weights that
    satisfies the hinge's linear model, as in passive-aggressive learning (Crammer et al. 2006).

    Args:
        lr: a factor on every step's length; above 1 it aims beyond zero.
    """

    def __init__(self, weights: list[nn.Parameter], norm_constraint: float | None, lr: float) -> None:
        super().__init__(weights, norm_constraint)
        self.lr = lr

    def _move(self, gradients: Sequence[Tensor], loss: Tensor, skip: Tensor | None) -> None:
        squares = torch.stack([g.square().sum().to(loss.device) for g in gradients]).sum()
        length = torch.where(squares > 0, self.lr * loss / squares, 0.0)
        if skip is not None:
            length = length.masked_fill(skip, 0.0)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.sub_(gradient * length.to(master))


def make_optimizer(weights: list[nn.Parameter], hparams: KDPOHyperParams) -> Optimizer:
    """The one that the settings name, for ``weights``."""
    if hparams.optimizer == "polyak":
        return Polyak(weights, hparams.norm_constraint, hparams.lr)
    return Adam(weights, hparams.norm_constraint, hparams.lr, hparams.weight_decay)
