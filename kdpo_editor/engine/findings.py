"""What was found out about a model by trying it, kept for as long as the model is and, on disk, for others built alike.

Whether a forward from a cache is exact, and what a token takes, is decided by a model's modules, its configuration and
the code that they run. So what was tried once need not be tried again by the next process. A file of findings is named
by all of that: modules and their classes, shapes, dtypes and devices, the configuration, the source of what is neither
torch's nor transformers' (this package's own engine included), and the versions of those two. A model in which a hook
or a ``forward`` of its own was put has findings of its own, which are not kept on disk.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import nn

from ..cache import cache_folder
from ..whole_files import make_folder, write_file

LOG = logging.getLogger(__name__)
# Their code is named by their versions.
VERSIONED = {"torch": torch.__version__, "transformers": transformers.__version__}


class Findings:
    """What is known of one model, by the names that it was found under; values are JSON's.

    ``file``: where it is kept; ``None`` is nowhere.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.known: dict[str, Any] = {} if file is None else _read(file)

    @classmethod
    def of(cls, model: nn.Module) -> Findings:
        """Those of ``model`` as it is; others than before where its hooks, dtypes or devices have changed since."""
        state = _state(model)
        if model not in _FINDINGS or _FINDINGS[model][0] != state:
            built = _built(model)
            _FINDINGS[model] = state, cls(None if built is None else cache_folder() / "findings" / f"{built}.json")
        return _FINDINGS[model][1]

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What is known by ``name``, or else what ``find`` gives, which is kept unless it is ``None``."""
        if name not in self.known:
            found = find()
            if found is None:
                return None
            self.known[name] = found
            if self.file is not None:
                _write(self.file, self.known)
        return self.known[name]


_FINDINGS: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Findings]] = WeakKeyDictionary()


def _state(model: nn.Module) -> tuple[Any, ...]:
    """What may change of a model after it was built: its hooks, dtypes, devices and kind of attention."""
    hooked = tuple(name for name, module in model.named_modules() if _is_hooked(module))
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return hooked, tuple((p.dtype, p.device) for p in model.parameters()), attention


def _is_hooked(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or bool(module._forward_hooks or module._forward_pre_hooks)


def _built(model: nn.Module) -> str | None:
    """A hash of how ``model`` is built; ``None`` where something in it has no name."""
    classes = set()
    told: list[Any] = [VERSIONED, _source(Path(__file__).parent.glob("*.py"))]
    for name, module in model.named_modules():
        if _is_hooked(module):
            return None
        kind = type(module)
        classes.add(kind)
        told.append((name, kind.__module__, kind.__qualname__, kind.forward.__module__, kind.forward.__qualname__))
    told += [(name, str(p.dtype), tuple(p.shape), str(p.device)) for name, p in model.named_parameters()]
    config: Any = getattr(model, "config", None)
    told += [config.to_dict() if hasattr(config, "to_dict") else config, getattr(config, "_attn_implementation", None)]
    others = {c.__module__ for kind in classes for c in kind.__mro__ if c.__module__.split(".")[0] not in VERSIONED}
    with suppress(OSError, TypeError):
        files = {inspect.getsourcefile(sys.modules[name]) for name in others - {"builtins"}}
        told.append(_source(Path(file) for file in files if file))
        return hashlib.blake2b(json.dumps(told, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
    return None  # its code cannot be read


def _source(files: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _read(file: Path) -> dict[str, Any]:
    """What ``file`` holds, if it is whole."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(file.read_text("utf-8"))
        if stored["checksum"] == _checksum(stored["found"]):
            return dict(stored["found"])
    return {}


def _write(file: Path, known: dict[str, Any]) -> None:
    """Keep ``known`` in ``file``, whole or not at all. Where that cannot be done, it is found out again next time."""
    try:
        make_folder(file.parent)
        stored = json.dumps({"checksum": _checksum(known), "found": known})
        write_file(file, stored.encode(), synced=False)  # the checksum tells whether it is whole
    except OSError as error:
        LOG.warning("what was found out about the model cannot be kept in %s: %s", file.parent, error)


def _checksum(known: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16).hexdigest()
