"""Editors that neither EasyEdit nor this package has: a function and its settings, found by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from ...errors import HyperParamsError


def editor(apply: str, settings_class: str, settings: Mapping[str, Any]) -> tuple[Callable[..., Any], Any]:
    """The function ``apply`` names, ``package.module:function``, and ``settings`` as it reads them.

    That is an object of ``settings_class``, named likewise and made with the settings as keywords, or where that is
    empty one with the settings as its attributes. Raises :class:`~kdpo_editor.errors.HyperParamsError` where a name
    leads nowhere or the class refuses its settings.
    """
    function = _named("method.apply", apply)
    if not settings_class:
        return function, SimpleNamespace(**settings)
    try:
        return function, _named("method.settings_class", settings_class)(**settings)
    except TypeError as error:
        raise HyperParamsError(f"method.hparams: {settings_class} refuses them: {error}") from error


def _named(key: str, name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise HyperParamsError(
            f"{key}: {name!r} was not found ({error}); it must be package.module:name, importable from here "
            "(PYTHONPATH names more folders)"
        ) from error
    if not callable(found):
        raise HyperParamsError(f"{key}: {name!r} is a {type(found).__name__}; it must be callable")
    return found  # type: ignore[no-any-return]
