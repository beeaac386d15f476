"""Models in ``.gguf`` files, turned once into folders of safetensors in the cache.

Weights come out in fp32, each the value that its quantised form stands for; a folder takes four bytes a parameter. It
is an ordinary model: it loads offline, is edited, saved and exported like any other. Its configuration says what it was
made from, and so does whatever keeps that configuration: a saved edit, a ledger, an exported model.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..cache import cache_folder
from ..errors import ModelError, StorageError
from ..whole_files import sync
from .packaged import PACKAGED, PackagedModel

LOG = logging.getLogger(__name__)
NEEDED = ("gguf", "accelerate")  # by transformers, to read such a file
# What transformers leaves on a model read from such a file, though its weights are plain matrices.
MARKS = ("is_quantized", "_is_quantized", "hf_quantizer", "quantization_config", "quantization_method")
CHUNK = 1 << 22  # bytes read at a time


def gguf_file(name: str) -> Path | None:
    """Find the ``.gguf`` file that ``name`` is, or the one in the folder that it is; ``None`` if it is neither.

    A folder that also has weights in another format is a model of that format.

    Raises:
        ModelError: ``name`` ends in ``.gguf`` and is not there, or the folder holds several such files.
    """
    path = Path(name)
    if not path.is_dir():
        if path.suffix.lower() != ".gguf":
            return None
        if not path.is_file():
            raise ModelError(f"there is no file {name}")
        return path
    files = sorted(file for file in path.iterdir() if file.is_file())
    found = [file for file in files if file.suffix.lower() == ".gguf"]
    if not found or any(file.suffix in (".safetensors", ".bin", ".pt", ".pth") for file in files):
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ModelError(f"{name} holds {len(found)} .gguf files; name one of them: {names}")
    return found[0]


def converted(name: str) -> Path | None:
    """Make the folder of a model in a ``.gguf`` file, or find the one made before; ``None`` for any other model.

    The folder goes by the content of the file and the version of transformers that reads it. It is written whole or
    not at all, and by one process at a time; others wait for it.

    Args:
        name: a name of :data:`~kdpo_editor.models.packaged.PACKAGED`, a ``.gguf`` file, or a folder with one.

    Raises:
        ModelError: the wheel, the file or a package to read it is missing, or the file is not what it should be.
        StorageError: the cache cannot be written.
    """
    package = PACKAGED.get(name)
    if package is not None:
        folder = _folder(package.sha256)
        if _is_whole(folder):
            return folder
        parts, file_name = package.parts(), package.file
    else:
        file = gguf_file(name)
        if file is None:
            return None
        parts, file_name = [file], file.name
    found = _sha256(parts, name)
    if package is not None and found != package.sha256:
        raise ModelError(
            f"{name}: {parts[0].parent} holds another file than {file_name}, SHA-256 {package.sha256[:12]}; it has "
            f"{found[:12]}. `{package.command} --force-reinstall` brings the right one"
        )
    folder = _folder(found)
    try:
        if not _is_whole(folder):
            _convert(name, parts, file_name, found, folder)
    except OSError as error:
        raise StorageError(
            error.errno or errno.EIO,
            f"cannot write {folder}: {error.strerror or error}; KDPO_CACHE names another folder for it",
        ) from error
    return folder


def _folder(sha256: str) -> Path:
    """Where the model of a file with this hash belongs."""
    import transformers

    package = _package_of(sha256)
    name = "gguf" if package is None else package.name
    # Releases of transformers before this one may not read the configuration that it writes, and say nothing.
    release = ".".join(transformers.__version__.split(".")[:2])
    return cache_folder() / "models" / f"{name}-{sha256[:32]}-transformers-{release}"


def _package_of(sha256: str) -> PackagedModel | None:
    return next((model for model in PACKAGED.values() if model.sha256 == sha256), None)


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _sha256(parts: Sequence[Path], name: str) -> str:
    """Hash files as if they were one; a progress bar on a terminal."""
    digest = hashlib.sha256()
    try:
        size = sum(part.stat().st_size for part in parts)
        with tqdm(total=size, desc=f"hash {name}", unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for chunk in _chunks(parts):
                digest.update(chunk)
                bar.update(len(chunk))
    except OSError as error:
        raise ModelError(f"cannot read {error.filename or name}: {error.strerror or error}") from error
    return digest.hexdigest()


def _chunks(parts: Sequence[Path]) -> Iterator[bytes]:
    for part in parts:
        with open(part, "rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk


def _convert(name: str, parts: Sequence[Path], file_name: str, sha256: str, folder: Path) -> None:
    """Write ``folder``, unless another process does so meanwhile."""
    from filelock import FileLock

    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise ModelError(
            f"{name}: reading a .gguf file needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}: "
            f"`pip install {' '.join(missing)}`"
        )
    models = folder.parent
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / "converting.lock"):
        if _is_whole(folder):
            return
        LOG.warning("%s is converted, this once, into %s. Its licence: %s", name, folder, _licence(sha256))
        for left in models.glob("*.part"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        unfinished = folder.with_name(f"{folder.name}.part")
        try:
            os.replace(_make(name, parts, file_name, sha256, unfinished), folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _make(name: str, parts: Sequence[Path], file_name: str, sha256: str, work: Path) -> Path:
    """Write the model's folder, all of it, inside ``work``, which is made too."""
    folder = work / "model"
    folder.mkdir(parents=True)
    file = work / file_name
    with tqdm(total=3, desc=f"convert {name}", leave=False, disable=None) as bar:
        if len(parts) == 1:
            # Beside no other file, which would be taken for part of the model.
            file.symlink_to(parts[0].absolute())
        else:
            with open(file, "wb") as whole:
                whole.writelines(_chunks(parts))
        bar.update()
        model, tok = _read(file, name)
        bar.update()
        model.config.dequantised_from = file_name
        model.config.dequantised_sha256 = sha256
        _save(model, tok, folder)
        (folder / "README.md").write_text(_card(name, file_name, sha256), "utf-8")
        # On the disk before it gets the name that says it is whole.
        for path in (*folder.iterdir(), folder):
            sync(path)
        bar.update()
    return folder


def _read(file: Path, name: str) -> tuple[Any, Any]:
    """The model in a ``.gguf`` file, fp32 on the CPU and without marks of its quantisation, and its tokenizer."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # without it weights stay packed where there are kernels for them
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with _bars_on_a_terminal():
            model, info = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)
            tok = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the reader checks little: a damaged file raises whatever comes of it
        raise ModelError(
            f"{name}: {file.name} is damaged, or of a kind that transformers does not read: "
            f"{type(error).__name__}: {error!s:.300}"
        ) from error
    absent = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if absent:
        raise ModelError(f"{name}: {file.name} has no weights for {len(absent)} matrices, {absent[0]} among them")
    for marked in (model, model.config):
        for mark in MARKS:
            marked.__dict__.pop(mark, None)
    return model, tok


@contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    """Inside, transformers shows its progress bars on a terminal, and only there."""
    from transformers.utils import logging as theirs

    shown, terminal = theirs.is_progress_bar_enabled(), sys.stderr.isatty()
    (theirs.enable_progress_bar if terminal else theirs.disable_progress_bar)()
    try:
        # The bar of its gguf reader heeds no setting.
        with nullcontext() if terminal else redirect_stderr(io.StringIO()):
            yield
    finally:
        (theirs.enable_progress_bar if shown else theirs.disable_progress_bar)()


def _save(model: Any, tok: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, it takes {size / 1e6:.0f} MB")
    try:
        with _bars_on_a_terminal():
            model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error
    tok.save_pretrained(folder)


def _licence(sha256: str) -> str:
    package = _package_of(sha256)
    return "that of the file" if package is None else package.licence


def _card(name: str, file_name: str, sha256: str) -> str:
    """The README beside the converted weights."""
    package = _package_of(sha256)
    lines = [f"# {name if package is None else package.name}", ""]
    lines.append(f"Weights in fp32, dequantised from `{file_name}` (SHA-256 `{sha256}`).")
    if package is not None:
        lines.append(f"The file comes with `{package.command}`. The model is {package.source}, quantised.")
    return "\n".join([*lines, "", f"Licence: {_licence(sha256)}.", ""])
