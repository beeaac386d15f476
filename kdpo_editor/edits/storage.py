"""Files that are read without trusting what they say.

Only JSON and safetensors are read. How much is read is bounded beforehand: JSON by its size, tensors by the shapes that
the caller expects, which the file's header must declare.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DamagedFileError
from ..whole_files import storage_error, write_file

MAX_JSON = 1 << 24
"""Bytes of one JSON document or journal line (16 MiB)."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that matrices may have, by safetensors' names."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """Shape and dtype (safetensors' name, such as ``F16``) of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes that a tensor of this kind takes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def torch_name(self) -> str:
        """The dtype as torch and :func:`kdpo_editor.load` name it, such as ``float16``."""
        return str(DTYPES[self.dtype]).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.shape))} {self.dtype}"


def spec_of(tensor: Tensor) -> Spec:
    """The spec of a floating-point tensor of any shape."""
    return Spec(tuple(tensor.shape), NAMES[tensor.dtype])


def open_regular(path: Path) -> BinaryIO:
    """Open a plain file for reading; links, pipes and devices are refused, so that nothing leads elsewhere or waits.

    Raises :class:`~kdpo_editor.StorageError` or :class:`~kdpo_editor.DamagedFileError`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedFileError(f"{path} is a link; only plain files are read") from None
        raise storage_error("read", path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedFileError(f"{path} is not a plain file")
    return os.fdopen(descriptor, "rb")


def dump_json(value: Any) -> bytes:
    """``value`` on one line, always the same way; :class:`~kdpo_editor.DamagedFileError` if it is nested too deep."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    except RecursionError:
        raise DamagedFileError("a record is nested too deep") from None


def parse_json(data: bytes, what: str) -> Any:
    """Read a JSON document.

    Raises :class:`~kdpo_editor.DamagedFileError`, beginning with ``what``: not UTF-8, not JSON, NaN or infinite
    numbers, half surrogate pairs, nested too deep, or more than :data:`MAX_JSON` bytes.
    """
    if len(data) > MAX_JSON:
        raise DamagedFileError(f"{what} is longer than {MAX_JSON} bytes")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not allowed")

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse, parse_float=_finite)
        if re.search(rb"\\u[dD][89a-fA-F]", data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{what} is not JSON: {error}") from None
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is out of range")
    return number


def field(record: Any, key: str, kind: type | tuple[type, ...], what: str) -> Any:
    """``record[key]``, of type ``kind``, or :class:`~kdpo_editor.DamagedFileError`, beginning with ``what``."""
    if not isinstance(record, dict):
        raise DamagedFileError(f"{what} is a {type(record).__name__}; it must be an object")
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if key not in record:
        raise DamagedFileError(f"{what} has no {key!r}")
    if type(record[key]) not in kinds:
        names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise DamagedFileError(f"{what}: {key!r} is a {type(record[key]).__name__}; it must be {names}")
    return record[key]


def spec_from(record: Any, what: str) -> Spec:
    """A :class:`Spec` of its JSON form; raises :class:`~kdpo_editor.DamagedFileError`."""
    shape, dtype = field(record, "shape", list, what), field(record, "dtype", str, what)
    if not 1 <= len(shape) <= 3 or any(type(n) is not int or not 1 <= n < 1 << 31 for n in shape):
        raise DamagedFileError(f"{what}: 'shape' is not that of a matrix or a stack of them")
    if dtype not in DTYPES:
        raise DamagedFileError(f"{what}: {dtype!r:.60} is not one of {', '.join(DTYPES)}")
    return Spec(tuple(shape), dtype)


def hash_from(record: Any, key: str, what: str) -> str:
    """A SHA-256 in hexadecimal; raises :class:`~kdpo_editor.DamagedFileError`."""
    value: str = field(record, key, str, what)
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise DamagedFileError(f"{what}: {key!r} is {value!r:.80}, not 64 hexadecimal digits")
    return value


def read_json(path: Path) -> Any:
    """Read a file that holds one JSON document; errors as in :func:`parse_json` and :func:`open_regular`."""
    with open_regular(path) as file:
        return parse_json(file.read(MAX_JSON + 1), str(path))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    write_file(path, safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


def check_tensors(path: Path, expected: Mapping[str, Spec]) -> None:
    """Raise :class:`~kdpo_editor.DamagedFileError` unless a safetensors file holds just the tensors ``expected``.

    Only its header is read.
    """
    open_regular(path).close()
    try:
        with safe_open(path, "np") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: Spec(tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except OSError as error:
        raise storage_error("read", path, error) from error
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from None
    if found.keys() != expected.keys():
        raise DamagedFileError(f"{path} holds {', '.join(found) or 'nothing'}, not {', '.join(expected)}"[:400])
    for name, spec in expected.items():
        if found[name] != spec:
            raise DamagedFileError(f"{path}: {name} is {found[name]}; it must be {spec}")


def read_tensors(path: Path, expected: Mapping[str, Spec]) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, on the CPU, after :func:`check_tensors`."""
    check_tensors(path, expected)
    with open_regular(path) as file:
        data = file.read()
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from None
