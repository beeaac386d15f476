"""Modules that do something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError


class Places:
    """Some positions of each row of a batch, ``[B, T]`` int64, of rows of ``length``: indices that are made once."""

    def __init__(self, positions: Tensor, length: int) -> None:
        self.positions, self.length = positions, length
        self._span = _span(positions)

    @cached_property
    def _from(self) -> Tensor:
        starts = self.length * torch.arange(len(self.positions), device=self.positions.device)
        return (self.positions + starts.unsqueeze(-1)).flatten()

    @cached_property
    def _to(self) -> Tensor:
        # Each position takes one of the answers, or the row put behind them: where padding names a position again,
        # its gradient must not be counted again.
        size, count = self.positions.shape
        places = torch.arange(count, device=self.positions.device).expand(size, -1)
        taken = self.positions.new_full((size, self.length), count).scatter(1, self.positions, places)
        return Places(taken, count + 1)._from

    def read(self, hidden: Tensor) -> Tensor:
        """``[B, L, D]`` to ``[B, T, D]``; ``ValueError`` for other shapes."""
        size, count = self.positions.shape
        if hidden.ndim != 3 or hidden.shape[:2] != (size, self.length):
            raise ValueError(f"an input of shape {tuple(hidden.shape)} has no positions to choose from")
        if self._span is not None:
            # Not ``[:, first:end]``: its strides would have a product of one matrix taken for a batch of them.
            return hidden[0, slice(*self._span)].unsqueeze(0)
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._from.to(hidden.device))
        return rows.view(size, count, -1)

    def write(self, values: Tensor, elsewhere: float = 0.0) -> Tensor:
        """``[B, T, D]`` to ``[B, L, D]``, with ``elsewhere`` at the other positions."""
        if self._span is not None:
            first, end = self._span
            return nn.functional.pad(values, (0, 0, first, self.length - end), value=elsewhere)
        size, _, width = values.shape
        rows = torch.cat([values, values.new_full((size, 1, width), elsewhere)], 1).view(-1, width)
        return rows.index_select(0, self._to.to(values.device)).view(size, self.length, width)


def _span(positions: Tensor) -> tuple[int, int] | None:
    """The first and the end of positions of one row that follow each other, as those of an edit by itself do."""
    if len(positions) != 1:
        return None
    (row,) = positions.tolist()
    return (row[0], row[-1] + 1) if row == list(range(row[0], row[0] + len(row))) else None


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
def narrowed(module: nn.Module, places: Places, elsewhere: float = 0.0) -> Iterator[None]:
    """While inside, ``module`` is run at ``places`` of its input ``[B, L, D]`` only."""
    whole = module.forward
    with forward_is(module, lambda hidden: places.write(whole(places.read(hidden)), elsewhere)):
        yield


def trained_only_at(forward: Callable[..., Tensor], where: Tensor) -> Callable[..., Tensor]:
    """``forward`` of a module, with no gradient through its output for tokens outside ``where``, ``[B, L]``.

    Neither its weight nor what comes before it gets any from there.

    Raises :class:`~kdpo_editor.ModelError` where the module does not give one output for each token, in their order.
    """

    def trained(*args: Any, **kwargs: Any) -> Tensor:
        output = forward(*args, **kwargs)
        if output.shape[:-1].numel() != where.numel():
            raise ModelError(
                f"fact_token: an edited module gives {output.shape[:-1].numel()} outputs for {where.numel()} tokens, "
                "so that it cannot be told which are the subject's; edit with fact_token: all"
            )
        return torch.where(where.to(output.device).view(*output.shape[:-1], 1), output, output.detach())

    return trained
