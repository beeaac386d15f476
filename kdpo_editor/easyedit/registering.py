"""Makes ``import easyeditor`` register KDPO, whichever package is imported first, without importing it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from ..kdpo import apply_kdpo_to_model
from .adalora import mend_adalora
from .finding import VARIABLE, editor_class, is_upstream
from .ledgers import followed, resumed
from .lending import lent
from .loading import with_model_loaded
from .pypi import apply_for_pypi, mend_memit, on_its_device


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
        _register()
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
            with lent():
                execute(module)
            _register()
            sys.meta_path.remove(self)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    """Add KDPO to the framework's methods, and wrap its editor for shipped models and devices. Once only."""
    methods = importlib.import_module("easyeditor.util.alg_dict").ALG_DICT
    if "KDPO" in methods:
        return
    upstream = is_upstream()
    methods["KDPO"] = apply_kdpo_to_model if upstream else apply_for_pypi
    batch = importlib.import_module("easyeditor.editors.batch_editor").BatchEditor
    was_batchable = batch.is_batchable_method
    batch.is_batchable_method = staticmethod(lambda name: name == "KDPO" or was_batchable(name))
    editor = editor_class()
    editor.__init__ = resumed(with_model_loaded(editor.__init__, upstream))
    for name in ("edit", "batch_edit", "edit_requests", "edit_dataset", "generate_edit"):
        if hasattr(editor, name):
            setattr(editor, name, followed(getattr(editor, name)))
    if not upstream:
        for name in ("__init__", "edit", "batch_edit", "edit_requests", "edit_dataset"):
            setattr(editor, name, on_its_device(getattr(editor, name)))
        mend_memit()
    mend_adalora()
