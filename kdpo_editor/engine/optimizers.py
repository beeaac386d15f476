"""Steps on a few matrices of any floating dtype."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from ..hparams import KDPOHyperParams


class Polyak(torch.optim.Optimizer):
    """Gradient steps as long as would bring the loss to zero if it were linear: ``lr * L / |g|^2 * g`` (Polyak 1969).

    ``|g|^2`` is taken over all matrices together. Nothing is remembered from step to step. On a hinge, with ``lr`` 1, a
    step is the least change of the weights that satisfies the hinge's linear model, as in passive-aggressive learning
    (Crammer et al. 2006).

    Args:
        params: the matrices.
        lr: a factor on every step's length. Above 1 it aims beyond zero.
        longest: no step is longer than this, in the norm of all matrices together. Where a loss is high and hardly
            depends on the weights, a step without bound goes far and gains little.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1.0, longest: float = inf) -> None:
        super().__init__(params, {"lr": lr, "longest": longest})

    @torch.no_grad()
    def step(self, closure: Any) -> Tensor:  # type: ignore[override]
        """Take a step along the gradients in ``.grad``. ``closure`` gives the loss, a scalar, that they belong to."""
        loss: Tensor = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        norms = [torch.linalg.vector_norm(p.grad).to(loss.device) for p in params]
        squares = torch.stack(norms).square().sum()
        lr, longest = (self.param_groups[0][key] for key in ("lr", "longest"))
        length = torch.where(squares > 0, (lr * loss / squares).minimum(longest * squares.rsqrt()), 0.0)
        for p in params:
            p.addcmul_(p.grad, -length.to(p))
        return loss


class Stepper:
    """Steps of the settings' optimiser. Half-precision matrices are stepped through fp32 copies and rounded into place.

    ``longest``: for one loss, the longest step of Polyak's, without bound at first; for several, times the root of
    their number, since the steps of different edits are at right angles to each other, or nearly.

    Args:
        weights: the matrices, ``requires_grad`` set.
        hparams: settings: ``optimizer``, ``lr``, and ``cuda_graphs``, with which Adam's state is kept on the device.
    """

    def __init__(self, weights: Iterable[nn.Parameter], hparams: KDPOHyperParams) -> None:
        self.weights = list(weights)
        self.longest = inf
        self.losses = 0  # that were gathered
        half = (torch.float16, torch.bfloat16)
        self.masters = [w.detach().float() if w.dtype in half else w for w in self.weights]
        self.loss: Tensor | None = None  # of what was gathered
        self.optimizer: torch.optim.Optimizer
        if hparams.optimizer == "polyak":
            self.optimizer = Polyak(self.masters, hparams.lr)
        else:
            recorded = hparams.cuda_graphs and all(m.is_cuda for m in self.masters)
            self.optimizer = torch.optim.Adam(self.masters, lr=hparams.lr, fused=True, capturable=recorded)

    def gather(self, loss: Tensor, losses: int = 1) -> None:
        """Backpropagate ``loss``, a scalar and the sum of so many ``losses``, for the next step.

        What it was computed by is free for the next part's.
        """
        gradients = torch.autograd.grad(loss, self.weights)
        for master, gradient in zip(self.masters, gradients, strict=True):
            gradient = gradient.to(master.dtype)
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()
        self.losses += losses

    def step(self, skip: Tensor | None = None) -> None:
        """Take one step along what was gathered, which is gone afterwards.

        ``skip``, a boolean scalar on the weights' device, leaves weights and Adam's state as they are where it is true,
        without the host having to know. Polyak's steps are never skipped.
        """
        gathered, self.loss = self.loss, None
        losses, self.losses = self.losses, 0
        assert gathered is not None
        if isinstance(self.optimizer, Polyak):
            self.optimizer.param_groups[0]["longest"] = self.longest * losses**0.5
        if skip is not None:
            # The fused kernel's own switch, which gradient scalers use: a step is taken where it is zero.
            self.optimizer.found_inf = skip.to(self.masters[0].device, torch.float32)  # type: ignore[attr-defined]
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.step(lambda: gathered)  # type: ignore[arg-type, return-value]
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                master.grad = None
                if weight is not master:
                    weight.copy_(master)
                torch.autograd.graph.increment_version(weight)  # Adam's fused kernel does not
