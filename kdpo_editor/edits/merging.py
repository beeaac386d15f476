"""Several edits' changes made into one that does what they do in order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import FingerprintError
from .low_rank import decompose, largest_rank, pair_of
from .manifest import Change, Value, value_of

APART = "one delta does not begin where another begins or ended"


def merge_full(
    deltas: Iterable[tuple[Mapping[str, Change], Mapping[str, Tensor]]], force: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make one change of full forms, each given as its changes and its tensors ``before:NAME`` and ``after:NAME``.

    Where one begins at what the one before it left, the result is exact. Where several begin at the same weights, or
    ``force`` is given, their differences are added.

    The tensors are of any shape, those of one name of the same, in a model's dtype.

    Returns the matrices before and after, by name. Raises :class:`~kdpo_editor.FingerprintError` where they fit neither
    way.
    """
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    for changes, tensors in deltas:
        for name, change in changes.items():
            old, new = tensors[f"before:{name}"], tensors[f"after:{name}"]
            if name not in before:
                before[name], after[name] = old, new
            elif change.before == value_of(after[name]):
                after[name] = new
            elif force or change.before == value_of(before[name]):
                after[name] = added(after[name], wide(new) - wide(old))
            else:
                raise FingerprintError(f"{name}: {APART}")
    return before, after


def merge_low_rank(
    deltas: Iterable[tuple[Mapping[str, Change], Mapping[str, Tensor]]], force: bool
) -> tuple[dict[str, Change], dict[str, tuple[Tensor, Tensor]]]:
    """Make one change of low-rank forms, each given as its changes and its tensors.

    These are ``up:NAME``, ``[rows, rank]``, and ``down:NAME``, ``[rank, columns]``; of experts a stack of such.

    Returns the changes and the pairs. Their ranks add up, as long as that is of use (:func:`largest_rank`). What a
    merged pair makes of a matrix is not known, since the matrix is not: ``after`` tells one merger from others, and is
    no matrix's value. Raises as :func:`merge_full` does.
    """
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    merged: dict[str, Change] = {}
    last: dict[str, Value] = {}
    for changes, tensors in deltas:
        for name, change in changes.items():
            known = merged.get(name)
            if known is not None and not force and change.before not in (known.before, last[name]):
                raise FingerprintError(f"{name}: {APART}")
            merged[name] = change if known is None else Change(known.before, _both(known.after, change))
            last[name] = change.after
            pairs.setdefault(name, []).append((tensors[f"up:{name}"], tensors[f"down:{name}"]))
    return merged, {name: _joined(some) for name, some in pairs.items()}


def _both(first: Value, then: Change) -> Value:
    """What stands for the unknown value of a matrix that two changes were added to."""
    told = f"{first.sha256} {then.before.sha256} {then.after.sha256}"
    return Value(hashlib.sha256(told.encode()).hexdigest(), first.spec)


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The pair whose product is the sum of the products of ``pairs``."""
    up, down = torch.cat([up for up, _ in pairs], -1), torch.cat([down for _, down in pairs], -2)
    rows, columns = up.shape[-2], down.shape[-1]
    if up.shape[-1] <= largest_rank(rows, columns):
        return up, down
    return pair_of(decompose(up @ down, up), min(rows, columns))


def wide(w: Tensor) -> Tensor:
    """``w``, of any shape, in fp32, or fp64 if it is fp64."""
    return w if w.dtype == torch.float64 else w.float()


def added(w: Tensor, change: Tensor) -> Tensor:
    """``w + change``, of any shape, added in fp32 or fp64 and rounded to the dtype of ``w``, on its device."""
    return (wide(w) + change.to(w.device)).to(w.dtype)
