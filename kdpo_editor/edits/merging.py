"""Several edits' changes made into one that does what they do in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import FingerprintError
from .manifest import Change, value_of

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

    Returns the changes and the pairs, whose ranks add up. Raises as :func:`merge_full` does.
    """
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    merged: dict[str, Change] = {}
    for changes, tensors in deltas:
        for name, change in changes.items():
            known = merged.get(name)
            if known is not None and not force and change.before not in (known.before, known.after):
                raise FingerprintError(f"{name}: {APART}")
            merged[name] = Change((known or change).before, change.after)
            pairs.setdefault(name, []).append((tensors[f"up:{name}"], tensors[f"down:{name}"]))
    return merged, {
        name: (torch.cat([up for up, _ in some], -1), torch.cat([down for _, down in some], -2))
        for name, some in pairs.items()
    }


def wide(w: Tensor) -> Tensor:
    """``w``, of any shape, in fp32, or fp64 if it is fp64."""
    return w if w.dtype == torch.float64 else w.float()


def added(w: Tensor, change: Tensor) -> Tensor:
    """``w + change``, of any shape, added in fp32 or fp64 and rounded to the dtype of ``w``, on its device."""
    return (wide(w) + change.to(w.device)).to(w.dtype)
