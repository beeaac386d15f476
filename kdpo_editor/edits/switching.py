"""``with edited(model, delta):`` and ``with original(model):``, and what it takes to know what a model was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..engine.weights import restore, uncompiled
from ..errors import FingerprintError
from .manifest import Value, matrices_of, value_of
from .storage import spec_of


@dataclass
class _Applied:
    """A matrix that was changed here: its value before the first change and after the last, and the former's source."""

    before: Value
    after: Value
    read: Callable[[], Tensor]


# By model, for as long as it lives: the matrices that deltas and ledgers changed, by name.
_APPLIED: WeakKeyDictionary[nn.Module, dict[str, _Applied]] = WeakKeyDictionary()


def note(
    model: nn.Module,
    name: str,
    before: Value,
    after: Value,
    read: Callable[[], Tensor],
    first: Value | None = None,
) -> None:
    """Remember that a matrix of ``model`` went from ``before`` to ``after``.

    ``read`` gives back what it was before any change, which is ``first``, or ``before`` where nothing else is known.
    """
    known = _APPLIED.setdefault(model, {})
    if name in known and known[name].after == before:
        known[name].after = after
    else:
        known[name] = _Applied(first or before, after, read)


@contextmanager
def passing(model: nn.Module) -> Iterator[None]:
    """What is noted of ``model`` inside is forgotten afterwards: whoever changes it there puts it back."""
    inner = uncompiled(model)
    known = {name: _Applied(a.before, a.after, a.read) for name, a in _APPLIED.get(inner, {}).items()}
    try:
        yield
    finally:
        if known:
            _APPLIED[inner] = known
        else:
            _APPLIED.pop(inner, None)


class _Delta(Protocol):
    def apply(self, model: nn.Module, *, force: bool = False) -> dict[str, Tensor]: ...


@contextmanager
def edited(model: nn.Module, delta: _Delta, *, force: bool = False) -> Iterator[nn.Module]:
    """Inside, ``model`` has the change ``delta``; afterwards, also on exceptions, it is bit for bit as before.

    Errors as those of :meth:`EditDelta.apply`, before anything is changed.
    """
    with passing(model):
        originals = delta.apply(model, force=force)
        try:
            yield model
        finally:
            restore(dict(uncompiled(model).named_parameters()), originals)


@contextmanager
def original(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
    """Inside, ``model`` is as it was before it was edited; afterwards, also on exceptions, bit for bit as found.

    Args:
        model: a model that an :class:`EditDelta` or an :class:`EditLedger` of this process changed, or any model if
            ``weights`` are given.
        weights: ``{parameter name: original tensor}``, such as ``apply_kdpo_to_model`` and EasyEdit return.

    Raises:
        FingerprintError: the original weights are not known, or something else changed them since.
    """
    if weights is None:
        known = _APPLIED.get(uncompiled(model))
        if known is None:
            raise FingerprintError(
                "nothing is known of this model before it was edited: no EditDelta or EditLedger of this process "
                "changed it; give the original weights as the second argument"
            )
        parameters = dict(uncompiled(model).named_parameters())
        now = {name: value_of(parameters[name]) for name in known}
        for name, applied in known.items():
            if now[name] not in (applied.after, applied.before):
                raise FingerprintError(f"{name} was changed by something else since it was edited")
        weights = {name: applied.read() for name, applied in known.items() if now[name] != applied.before}
    matrices = matrices_of(model, {name: spec_of(w) for name, w in weights.items()}, "weights")
    found = {name: w.detach().clone() for name, w in matrices.items()}
    try:
        restore(matrices, dict(weights))
        yield model
    finally:
        restore(matrices, found)


def unedited(model: nn.Module) -> AbstractContextManager[Any]:
    """As :func:`original`, and without effect on a model that nothing of this process changed."""
    return original(model) if uncompiled(model) in _APPLIED else nullcontext()
