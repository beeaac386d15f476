"""Matrices, or stacks of them, as products of two thin ones."""

from __future__ import annotations

import torch
from torch import Tensor


def decompose(change: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of ``change`` ``[..., rows, columns]``, made where ``weight`` is, on the CPU."""
    up, scale, down = torch.linalg.svd(change.to(weight.device), full_matrices=False)
    return up.cpu(), scale.cpu(), down.cpu()


def pair_of(parts: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """The best ``up`` ``[..., rows, rank]``, ``down`` ``[..., rank, columns]`` of a singular value decomposition."""
    up, scale, down = parts
    root = scale[..., :rank].sqrt()
    return up[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * down[..., :rank, :]


def largest_rank(rows: int, columns: int) -> int:
    """The largest rank of a pair for a matrix ``[rows, columns]``: a merger of several may exceed the matrix's own."""
    return 10 * min(rows, columns)


def rank_within(scale: Tensor, tolerance: float) -> int:
    """The smallest rank that leaves out at most ``tolerance`` of the norm of singular values ``scale`` ``[..., N]``."""
    left = scale.double().square().view(-1, scale.shape[-1]).sum(0).flip(0).cumsum(0).flip(0).sqrt()
    return max(int((left > tolerance * left[0]).sum()), 1)
