"""Modules that do something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def at_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """``[B, L, D]`` at ``[B, T]`` to ``[B, T, D]``."""
    size, length, width = hidden.shape
    starts = length * torch.arange(size, device=hidden.device)
    rows = positions.to(hidden.device) + starts.unsqueeze(-1)
    return hidden.reshape(-1, width).index_select(0, rows.flatten()).view(size, -1, width)


@contextmanager
def forward_is(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While inside, ``module`` does ``forward`` instead of its own."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


@contextmanager
def narrowed(module: nn.Module, positions: Tensor, elsewhere: float = 0.0) -> Iterator[None]:
    """While inside, ``module`` is run at ``positions`` ``[B, T]`` of its input ``[B, L, D]`` only."""
    whole = module.forward

    def forward(hidden: Tensor) -> Tensor:
        if hidden.ndim != 3 or hidden.shape[0] != len(positions):
            raise ValueError(f"an input of shape {tuple(hidden.shape)} has no positions to choose from")
        output: Tensor = whole(at_positions(hidden, positions))
        size, count, width = output.shape
        # Each position takes one of the answers, or the row put behind them: where padding names a position again,
        # its gradient must not be counted again.
        places = torch.arange(count, device=positions.device).expand(size, -1)
        taken = positions.new_full(hidden.shape[:2], count).scatter(1, positions, places)
        return at_positions(torch.cat([output, output.new_full((size, 1, width), elsewhere)], 1), taken)

    with forward_is(module, forward):
        yield


def trained_only_at(forward: Callable[..., Tensor], where: Tensor) -> Callable[..., Tensor]:
    """``forward`` of a module, with no gradient through its output for tokens outside ``where``, ``[B, L]``.

    Neither its weight nor what comes before it gets any from there.
    """

    def trained(inputs: Tensor) -> Tensor:
        output = forward(inputs)
        return torch.where(where.to(output.device).view(*output.shape[:-1], 1), output, output.detach())

    return trained
