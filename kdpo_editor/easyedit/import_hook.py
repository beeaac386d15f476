"""Makes ``import easyeditor`` register KDPO, whichever package is imported first, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

VARIABLE = "KDPO_EASYEDIT"


def install() -> None:
    """Register KDPO with ``easyeditor``: now, if it is imported already, else as soon as it is.

    Raises ``ModuleNotFoundError`` if the environment variable names a folder without ``easyeditor``.
    """
    checkout = os.environ.get(VARIABLE)
    if checkout and "easyeditor" not in sys.modules:
        if not (Path(checkout) / "easyeditor" / "__init__.py").is_file():
            raise ModuleNotFoundError(f"{VARIABLE}={checkout}: there is no folder easyeditor/ in it")
        if checkout not in sys.path:
            sys.path.insert(0, checkout)
    if "easyeditor" in sys.modules:
        from .registering import register

        register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(importlib.abc.MetaPathFinder):
    """Waits for ``import easyeditor``, lends it what it lacks meanwhile, and registers KDPO afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "easyeditor":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
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
