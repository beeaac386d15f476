"""An edit as a PEFT LoRA adapter, for every program that loads those."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..engine.generation import generate
from ..errors import CompressionError, StorageError
from .low_rank import decompose, pair_of
from .storage import make_folder, storage_error


def check_place(path: Path) -> None:
    """Raise :class:`~kdpo_editor.StorageError` where an adapter cannot be written: a folder that is not empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StorageError(errno.EEXIST, f"{path} exists and is not an empty folder")


def save_lora(
    path: Path,
    model: nn.Module,
    tok: Any,
    change: Mapping[str, Tensor],
    requests: Sequence[Mapping[str, Any]],
    wanted: Sequence[str],
    rank: int | None = None,
) -> int:
    """Write ``change`` to the folder ``path`` as an adapter for ``model``, which is as before the edit and left so.

    It is loaded with PEFT before it is kept: the free answers to ``requests`` must be ``wanted``. Returns the rank;
    errors as those of :meth:`EditDelta.save_lora`.
    """
    from peft import PeftModel

    make_folder(path.parent)
    weights = dict(model.named_parameters())
    parts = {name: decompose(matrix, weights[name]) for name, matrix in change.items()}
    full = max(scale.shape[-1] for _, scale, _ in parts.values())
    ranks = [rank] if rank is not None else [*(2**i for i in range(full.bit_length()) if 2**i < full), full]
    if rank is None and not requests:
        ranks = [full]  # nothing tells when a smaller one would do
    for r in ranks:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            _write(folder, model, parts, r)
            with _left_alone(model):
                adapted = PeftModel.from_pretrained(model, str(folder))
                try:
                    said = [generate(adapted, tok, request["prompt"]) for request in requests]
                finally:
                    adapted.unload()
            if said == wanted:
                folder.chmod(0o755)
                folder.replace(path)
                return r
        except OSError as error:
            raise storage_error("write", path, error) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    wrong = next(i for i, (a, b) in enumerate(zip(said, wanted, strict=True)) if a != b)
    raise CompressionError(
        f"an adapter of rank {ranks[-1]} does not hold the edit: after {requests[wrong]['prompt']!r} the "
        f"model says {said[wrong]!r}, not {wanted[wrong]!r}"
    )


def _write(folder: Path, model: nn.Module, parts: dict[str, tuple[Tensor, Tensor, Tensor]], rank: int) -> None:
    import peft
    from packaging.version import Version
    from transformers.pytorch_utils import Conv1D

    stacks = [name for name in parts if model.get_parameter(name).ndim == 3]
    # Those before it take [E, out, in] for [E, in, out].
    if stacks and Version(peft.__version__) < Version("0.19"):
        raise CompressionError(f"{stacks[0]} stacks experts, whose adapters need PEFT 0.19, not {peft.__version__}")
    modules = {name: name.rpartition(".")[0] for name in parts}
    transposed = {name for name, module in modules.items() if isinstance(model.get_submodule(module), Conv1D)}
    tensors = {}
    for name, module in modules.items():
        up, down = pair_of(parts[name], rank)
        # What is stored as [in, out]: GPT-2's matrices and gpt-oss's experts.
        if name in transposed or getattr(model.get_submodule(module), "is_transposed", False):
            up, down = down.mT, up.mT
        # PEFT wants one rank for all; a smaller matrix fills up with zeros.
        missing = rank - up.shape[-1]
        up, down = nn.functional.pad(up, (0, missing)), nn.functional.pad(down, (0, 0, 0, missing))
        if name in stacks:  # [E, out, rank] and [E, rank, in], as PEFT lays them out
            up, down = up.permute(1, 2, 0).flatten(1), down.flatten(0, 1)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = up.contiguous()
    extra: dict[str, Any] = {"target_parameters": stacks} if stacks else {}  # unknown to an older PEFT
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=[module for name, module in modules.items() if name not in stacks],
        fan_in_fan_out=bool(transposed),
        task_type="CAUSAL_LM",
        base_model_name_or_path=getattr(model, "name_or_path", None),
        inference_mode=True,
        **extra,
    )
    config.save_pretrained(str(folder))
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").write_bytes(data)


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Afterwards nothing remains on ``model`` of what PEFT does to one, and the random state is as before."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    orders = [(m, list(m._parameters)) for m in model.modules()]
    own = set(model.__dict__)
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for name in model.__dict__.keys() - own:
                del model.__dict__[name]
            for p, required in flags:
                p.requires_grad_(required)
            for module, training in modes:
                module.training = training
            for module, names in orders:  # a stack of experts that was adapted comes last
                for name in names:
                    module._parameters[name] = module._parameters.pop(name)
