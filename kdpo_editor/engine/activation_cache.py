"""What one pass over some tokens leaves behind, so that later passes need not begin anew."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .patches import Places

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with besides its hidden states."""


@runtime_checkable
class Rows(Protocol):
    """An argument of blocks that knows its own rows."""

    def rows(self, kept: Tensor, /) -> Any:
        """Those whose indices, int64, are in ``kept``."""


@dataclass
class ActivationCache:
    """What one pass over ``[B, L]`` token ids left behind.

    ``hidden``: ``[B, L, D]``, model dtype, without gradient: what the first edited block adds its matrix's output to,
    or, where ``inner`` is ``None``, that block's input.
    ``inner``: ``[B, L, F]``, the matrix's input.
    ``arguments``: the other positional and keyword arguments of each block that remains to be run.
    ``positions``: ``[B, T]`` int64, where logits are read.
    ``trained``: ``[B, L]`` bool, the tokens through which weights are trained; ``None`` is all.
    ``per_row``: of each leaf of ``arguments``, how many of its first dimension's entries belong to a row of the batch;
    0 where it is the same for all rows.
    """

    hidden: Tensor
    inner: Tensor | None
    arguments: list[Arguments]
    positions: Tensor
    trained: Tensor | None = None
    per_row: tuple[int, ...] = ()

    @cached_property
    def places(self) -> Places:
        """``positions`` in rows of this length."""
        return Places(self.positions, self.hidden.shape[1])

    def rows(self, kept: Tensor) -> ActivationCache:
        """Those rows of the batch whose indices, int64, are in ``kept``."""

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[kept.to(values.device)]

        leaves, tree = tree_flatten(self.arguments)
        sliced: dict[int, Any] = {}  # blocks share most of what they are called with
        for i, count in enumerate(self.per_row):
            leaf = leaves[i]
            if count or isinstance(leaf, Rows):
                if id(leaf) not in sliced:
                    sliced[id(leaf)] = leaf.rows(kept) if isinstance(leaf, Rows) else _rows(leaf, count, kept)
                leaves[i] = sliced[id(leaf)]
        hidden, positions = self.hidden[kept.to(self.hidden.device)], self.positions[kept.to(self.positions.device)]
        return ActivationCache(
            hidden, some(self.inner), tree_unflatten(leaves, tree), positions, some(self.trained), self.per_row
        )


def _rows(values: Tensor, count: int, kept: Tensor) -> Tensor:
    """Of a batch with ``count`` entries for each row (ALiBi has one for each head), those of the rows ``kept``."""
    each: Tensor = values.unflatten(0, (-1, count))  # type: ignore[no-untyped-call]
    return each[kept.to(values.device)].flatten(0, 1)
