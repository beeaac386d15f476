"""Keys and values of the tokens that an edit does not train, so that blocks are run from the first trained token on.

Where matrices are trained through some tokens alone, what comes before the first of them matters to the rest by its
keys and values. They are noted in a pass over all tokens, and stand in for those tokens in passes that follow. A matrix
that changes would change them too. So they hold for the weights of the pass that they are from, and what was trained
with them is looked at in another pass over all tokens before it counts as done.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers.cache_utils import DynamicCache

from .activation_cache import ActivationCache, Arguments

Kept = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of each layer, ``[B, H, L, D]``."""


class Recorder(DynamicCache):  # type: ignore[misc]
    """Stands where a model expects its cache of keys and values, and notes what passes while it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Kept | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Give back ``keys`` and ``values``, ``[B, H, L, D]``, which there is nothing before."""
        if self.kept is not None:
            self.kept[layer] = keys.detach(), values.detach()
        return keys, values

    def take(self) -> Kept:
        """What was noted; nothing is from now on."""
        kept, self.kept = self.kept or {}, None
        return kept


@dataclass(eq=False)
class Prefix:
    """Keys and values of the tokens before those that are run, to which these are put in their places.

    ``kept``: of the first ``P`` tokens of each row, ``[B, H, P, D]``; ``P`` is the most that any row has before them.
    ``at``: ``[B, S]`` int64, where the tokens stand that are run; ``L``, one beyond the row, for those that pad it.
    ``length``: ``L``. ``chosen``: the rows of ``kept`` that are meant, ``[B]`` int64; ``None`` is all. Some rows of a
    batch share what is kept with the others.
    """

    kept: Kept
    at: Tensor
    length: int
    chosen: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """``keys`` and ``values`` ``[B, H, S, D]`` in their places among those of whole rows, ``[B, H, L, D]``."""
        keys_before, values_before = self.kept[layer]
        return self._put(keys_before, keys), self._put(values_before, values)

    def _put(self, before: Tensor, new: Tensor) -> Tensor:
        before = before if self.chosen is None else before[self.chosen.to(before.device)]
        at = self.at.to(new.device)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        room = (0, 0, 0, self.length + 1 - before.shape[2])
        return nn.functional.pad(before.to(new.device), room).scatter(2, at, new)[:, :, : self.length]

    def rows(self, chosen: Tensor) -> Prefix:
        """Those rows of the batch whose indices are in ``chosen``, ``[N]`` int64."""
        where = chosen if self.chosen is None else self.chosen[chosen.to(self.chosen.device)]
        return replace(self, at=self.at[chosen.to(self.at.device)], chosen=where)


def cache_name(holder: nn.Module) -> str | None:
    """By which name the module that holds the blocks takes a cache of keys and values; ``None`` if it takes none."""
    taken = inspect.signature(holder.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


def recorder_of(cache: ActivationCache) -> Recorder | None:
    """The recorder that the blocks were called with, if they were."""
    found = (leaf for leaf in tree_flatten(cache.arguments)[0] if isinstance(leaf, Recorder))
    return next(found, None)


def prefix_bytes(cache: ActivationCache) -> int:
    """The bytes of the keys and values that ``cache`` holds for tokens that are not run."""
    kept = {id(leaf): leaf.kept for leaf in tree_flatten(cache.arguments)[0] if isinstance(leaf, Prefix)}
    return sum(t.nbytes for layers in kept.values() for pair in layers.values() for t in pair)


def without_prefix(cache: ActivationCache, kept: Kept, blocks: Sequence[nn.Module]) -> ActivationCache:
    """The part of ``cache`` from each row's first trained token on, with ``kept`` for what is before it.

    ``blocks``: those that remain to be run. Keys stay where they are in a row, so of a mask or bias only the rows of
    the tokens that are run are taken, whatever it says.
    """
    assert cache.trained is not None
    size, length = cache.hidden.shape[:2]
    begin = cache.trained.int().argmax(-1, keepdim=True)
    count = int((cache.positions.amax(-1, keepdim=True) + 1 - begin).max())
    at = begin + torch.arange(count, device=begin.device)
    inside = at.clamp(max=length - 1)
    causal = torch.arange(length, device=at.device) <= inside.unsqueeze(-1)
    before = int(begin.max())
    # Copied, so that the rest is given back.
    kept = {layer: (k[:, :, :before].clone(), v[:, :, :before].clone()) for layer, (k, v) in kept.items()}
    prefix = Prefix(kept, at.clamp(max=length), length)
    made: dict[int, Any] = {}  # blocks share most of what they are called with

    def taken(values: Tensor, dimension: int) -> Tensor:
        where = inside.to(values.device).view(
            size, *(1,) * (dimension - 1), count, *(1,) * (values.ndim - dimension - 1)
        )
        shape = list(values.shape)
        shape[0], shape[dimension] = size, count
        return values.expand(size, *values.shape[1:]).gather(dimension, where.expand(shape))

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Recorder):
            return prefix
        if not isinstance(leaf, Tensor) or leaf.ndim < 2 or leaf.shape[0] not in (1, size):
            return leaf
        # A mask or bias of queries and keys; embeddings of positions; their numbers.
        dimension = {4: 2, 3: 1, 2: 1}.get(leaf.ndim)
        if dimension is None or leaf.shape[dimension] != length or (leaf.ndim == 2 and leaf.is_floating_point()):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = taken(leaf, dimension)
        return made[id(leaf)]

    def argument(name: str, value: Any) -> Any:
        if name == "attention_mask" and value is None:
            return causal.unsqueeze(1)
        return tree_map(cut, value)

    def arguments(block: nn.Module, given: Arguments) -> Arguments:
        names = [*inspect.signature(block.forward).parameters][1:]
        args, kwargs = given
        named = zip(names, args, strict=False)
        return tuple(argument(name, value) for name, value in named), {k: argument(k, v) for k, v in kwargs.items()}

    short = [arguments(block, given) for block, given in zip(blocks, cache.arguments, strict=True)]
    old_leaves, new_leaves = tree_flatten(cache.arguments)[0], tree_flatten(short)[0]
    per_row = tuple(
        count if leaf is old else int(isinstance(leaf, Tensor))
        for leaf, old, count in zip(new_leaves, old_leaves, cache.per_row, strict=True)
    )
    return replace(
        cache,
        hidden=taken(cache.hidden, 1),
        inner=None if cache.inner is None else taken(cache.inner, 1),
        arguments=short,
        positions=(cache.positions - begin).clamp(min=0),
        trained=taken(cache.trained, 1),
        per_row=per_row,
    )
