"""What EasyEdit lacks on a modern stack and is lent while it is imported: placeholders and moved names."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from typing import Any

# What the text editors of either form need for real; nothing may stand in for these.
NEEDED = ("peft", "higher", "nltk", "scipy", "sklearn", "regex", "numpy")
# What both forms import and no text editor calls (but for data sets read from the hub, which say so themselves).
UNUSED = (
    "PIL", "av", "bitsandbytes", "cv2", "datasets", "decord", "einops", "fairscale", "gradio", "hydra", "iopath",
    "jsonlines", "matplotlib", "openai", "opencv", "pandas", "pytorch_lightning", "qwen_vl_utils", "rouge", "seaborn",
    "sentence_transformers", "sniffio", "timm", "torchvision", "umap", "webdataset", "zhipuai",
)  # fmt: skip
MOVED = ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")
# A module that transformers 5.24 no longer has; upstream's UnKE alone calls it.
GONE = "transformers.modeling_attn_mask_utils"


@contextlib.contextmanager
def lent() -> Iterator[None]:
    """For EasyEdit's import: what it names and text editing never calls need not be installed, nor be where it was.

    Raises ``ModuleNotFoundError`` naming a package that it does need and that is not installed.
    """
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"EasyEdit needs {name}, which is not installed: pip install 'kdpo-editor[easyedit]'", name=name
            )
    import transformers.modeling_utils
    import transformers.pytorch_utils

    importlib.import_module("peft")
    added = [n for n in MOVED if not hasattr(transformers.modeling_utils, n)]
    for name in added:
        value = getattr(transformers.pytorch_utils, name, _placeholder(f"transformers.modeling_utils.{name}"))
        setattr(transformers.modeling_utils, name, value)
    real_import = builtins.__import__

    def import_(
        name: str,
        globals_: dict[str, Any] | None = None,
        locals_: dict[str, Any] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> Any:
        root = name.partition(".")[0]
        if level == 0 and str((globals_ or {}).get("__name__")).startswith("easyeditor"):
            wanted = name if name == GONE else root if root in UNUSED else None
            if wanted and wanted not in sys.modules and importlib.util.find_spec(wanted) is None:
                return _placeholder(name if fromlist else root)
        return real_import(name, globals_, locals_, fromlist, level)

    builtins.__import__ = import_  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.__import__ = real_import
        for name in added:
            delattr(transformers.modeling_utils, name)


class _Missing(type):
    """The type of placeholders: classes, since the framework also derives from what it imports."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _placeholder(f"{cls.__qualname__}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "__init__" in cls.__dict__:  # a class of the framework's own, derived from a placeholder
            return super().__call__(*args, **kwargs)
        package = cls.__qualname__.partition(".")[0]
        why = (
            "the installed transformers no longer has it"
            if package == "transformers"
            else f"{package} is not installed"
        )
        raise ModuleNotFoundError(f"EasyEdit called {cls.__qualname__}: {why}", name=package)


def _placeholder(name: str) -> Any:
    return _Missing(name, (), {"__qualname__": name, "__all__": []})
