"""Puts KDPO into EasyEdit: among its methods, and around its editor what the editor lacks."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from .adalora import mend_adalora
from .applying import apply_kdpo_to_model
from .finding import editor_class, is_upstream
from .ledgers import followed, resumed
from .loading import with_model_loaded
from .pypi import mend_memit, on_its_device
from .wise import mend_wise


@functools.wraps(apply_kdpo_to_model)
def apply_for_pypi(*args: Any, keep_original_weight: bool = False, **kwargs: Any) -> Any:
    """KDPO, which returns weights only if it is to be undone: the PyPI form writes back whatever is returned."""
    model, originals = apply_kdpo_to_model(*args, **kwargs)
    return model, originals if keep_original_weight else {}


def register() -> None:
    """Add KDPO to the framework's methods, wrap its editor for models, devices and ledgers, and mend its methods.

    Once only.
    """
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
    if upstream:
        mend_wise()
