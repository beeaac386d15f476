"""Finds and imports EasyEdit, and tells its two forms apart."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import subprocess
from importlib import metadata
from pathlib import Path
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


@functools.cache
def version() -> str:
    """Which EasyEdit is imported: its release, or its checkout's commit, and a hash of its Python files."""
    return described(Path(str(require().__file__)).parent, form())


def described(package: Path, form: str) -> str:
    """:func:`version` of the ``package`` folder of either form.

    The hash is there since a checkout may have been changed, or have no history.
    """
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    name = form
    if form == "PyPI":
        with contextlib.suppress(metadata.PackageNotFoundError):
            name += f" {metadata.version('easyeditor')}"
    elif (package.parent / ".git").exists():
        asked = ["git", "-C", str(package.parent), "rev-parse", "--short=12", "HEAD"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
            name += f" commit {commit}"
    return f"{name}, files {digest.hexdigest()[:12]}"


def editor_class() -> Any:
    """The imported framework's ``BaseEditor``, which all its editing goes through."""
    return importlib.import_module("easyeditor.editors.editor").BaseEditor
