"""Steps on a few matrices of any floating dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from ..hparams import KDPOHyperParams


class Optimizer(ABC):
    """Half-precision matrices are stepped through fp32 copies and rounded into place after each step.

    Args:
        weights: the matrices, ``requires_grad`` set.
        norm_constraint: largest change of any single weight, or ``None``.
        factors: of each matrix, on the learning rate; 1 for all by default.
    """

    def __init__(
        self, weights: list[nn.Parameter], norm_constraint: float | None, factors: Sequence[float] | None = None
    ) -> None:
        self.weights = weights
        self.factors = [1.0] * len(weights) if factors is None else list(factors)
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
            self._round()
            for weight in self.weights:
                torch.autograd.graph.increment_version(weight)  # Adam's fused kernel does not

    @torch.no_grad()
    def pull(self, share: float, towards: Iterable[Tensor]) -> None:
        """Move each weight, of any shape, by ``share`` of the way to what it was some time."""
        for master, weight in zip(self.masters, towards, strict=True):
            master.lerp_(weight.to(master.dtype), share)
        self._round()

    def _round(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is not master:
                weight.copy_(master)

    @abstractmethod
    def _move(self, gradients: Sequence[Tensor], loss: Tensor, skip: Tensor | None) -> None:
        """Take a step on ``masters``."""


class Adam(Optimizer):
    """Fused Adam (Kingma and Ba 2015), the paper's, with the moments' usual rates.

    Args:
        lr: learning rate.
        weight_decay: L2 penalty.
    """

    def __init__(
        self,
        weights: list[nn.Parameter],
        norm_constraint: float | None,
        lr: float,
        weight_decay: float,
        factors: Sequence[float] | None = None,
    ) -> None:
        super().__init__(weights, norm_constraint, factors)
        self.lr, self.weight_decay = lr, weight_decay
        self.means = [torch.zeros_like(m) for m in self.masters]
        self.squares = [torch.zeros_like(m) for m in self.masters]
        self.steps = [torch.zeros((), device=m.device) for m in self.masters]

    def _move(self, gradients: Sequence[Tensor], loss: Tensor, skip: Tensor | None) -> None:
        moments = zip(self.means, self.squares, self.steps, self.factors, strict=True)
        for master, gradient, (mean, square, steps, factor) in zip(self.masters, gradients, moments, strict=True):
            adam(
                [master],
                [gradient],
                [mean],
                [square],
                [],
                [steps],
                fused=True,
                # The fused kernel's own switch, which gradient scalers use: a step is taken where it is zero.
                found_inf=None if skip is None else skip.to(master.device, torch.float32),
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=self.lr * factor,
                weight_decay=self.weight_decay,
                eps=1e-8,
                maximize=False,
            )


class Polyak(Optimizer):
    """Gradient steps as long as would bring the loss to zero if it were linear: ``lr * L / |g|^2 * g`` (Polyak 1969).

    With factors ``c_i`` on the rates of matrices with gradients ``g_i``, each one's step is
    ``lr * L / sum_i(c_i |g_i|^2) * c_i g_i``, and the same is true of them together. Nothing is remembered from step to
    step. On a hinge, with ``lr`` and factors 1, it is the least change of the weights that satisfies the hinge's
    linear model, as in passive-aggressive learning (Crammer et al. 2006).

    Args:
        lr: a factor on every step's length; above 1 it aims beyond zero.
    """

    def __init__(
        self,
        weights: list[nn.Parameter],
        norm_constraint: float | None,
        lr: float,
        factors: Sequence[float] | None = None,
    ) -> None:
        super().__init__(weights, norm_constraint, factors)
        self.lr = lr

    def _move(self, gradients: Sequence[Tensor], loss: Tensor, skip: Tensor | None) -> None:
        each = zip(gradients, self.factors, strict=True)
        squares = torch.stack([f * g.square().sum().to(loss.device) for g, f in each]).sum()
        length = torch.where(squares > 0, self.lr * loss / squares, 0.0)
        if skip is not None:
            length = length.masked_fill(skip, 0.0)
        for master, gradient, factor in zip(self.masters, gradients, self.factors, strict=True):
            master.sub_(gradient * (factor * length).to(master))


def make_optimizer(weights: list[nn.Parameter], hparams: KDPOHyperParams) -> Optimizer:
    """The one that the settings name, for ``weights``, the matrix of each of their ``layers``."""
    through_subject = hparams.subject_layers or ()
    factors = [hparams.subject_rate if layer in through_subject else 1.0 for layer in hparams.place[0]]
    if hparams.optimizer == "polyak":
        return Polyak(weights, hparams.norm_constraint, hparams.lr, factors)
    return Adam(weights, hparams.norm_constraint, hparams.lr, hparams.weight_decay, factors)
