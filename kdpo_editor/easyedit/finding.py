"""Finds and imports EasyEdit, and tells its two forms apart."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

VARIABLE = "KDPO_EASYEDIT"
"""The environment variable that names a checkout of the framework."""
HOW_TO_GET_IT = (
    "EasyEdit was not found. Either install its PyPI release with its needs,\n"
    "    pip install 'kdpo-editor[easyedit]' && pip install --no-deps easyeditor==0.0.1.dev0\n"
    f"or clone https://github.com/zjunlp/EasyEdit and set {VARIABLE} to the clone."
)


def require() -> ModuleType:
    """``easyeditor``, imported; or ``ModuleNotFoundError`` that says how to get it or what it lacks."""
    try:
        return importlib.import_module("easyeditor")
    except ModuleNotFoundError as error:
        if error.name == "easyeditor":
            raise ModuleNotFoundError(HOW_TO_GET_IT, name="easyeditor") from None
        raise


def is_upstream() -> bool:
    """Whether the imported framework is the upstream form; the PyPI form lacks ``sequential_edit``."""
    return "sequential_edit" in inspect.signature(editor_class().edit).parameters


def form() -> str:
    """The imported framework's form, as users know it: "upstream" or "PyPI"."""
    return "upstream" if is_upstream() else "PyPI"


def editor_class() -> Any:
    """The imported framework's ``BaseEditor``, which all its editing goes through."""
    return importlib.import_module("easyeditor.editors.editor").BaseEditor
