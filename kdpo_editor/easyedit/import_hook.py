"""Makes ``import easyeditor`` register KDPO, whichever package is imported first, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from .finding import VARIABLE


def install() -> None:
    """Register KDPO with ``easyeditor``: now, if it is imported already, else as soon as it is.

    Nothing else is done before that. The folder that the environment variable names is looked into when ``easyeditor``
    is imported, and only for it.
    """
    if "easyeditor" in sys.modules:
        from .registering import register

        register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds ``easyeditor`` for who imports it, lends it what it lacks meanwhile, and registers KDPO afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "easyeditor":
            return None
        sys.meta_path.remove(self)
        try:
            spec = _spec()
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            from .placeholders import lent
            from .registering import register

            with lent():
                execute(module)
            register()
            sys.meta_path.remove(self)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _spec() -> ModuleSpec | None:
    """``easyeditor`` in the checkout that the environment variable names, or wherever Python finds it.

    Raises ``ModuleNotFoundError`` if the variable names a folder without it.
    """
    checkout = os.environ.get(VARIABLE)
    if not checkout:
        return importlib.util.find_spec("easyeditor")
    spec = PathFinder.find_spec("easyeditor", [checkout])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{VARIABLE}={checkout}: there is no folder easyeditor/ in it", name=VARIABLE)
    return spec
