"""An edit as a PEFT LoRA adapter, for every program that loads those: PEFT, vLLM, the evaluation harness.

The adapter is of the unedited model, and says in its ``adapter_config.json`` which: by a name that PEFT can load
without this package, and by the class that its names of modules are from.
"""

from __future__ import annotations

import errno
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..engine.generation import answers
from ..engine.weights import uncompiled
from ..errors import CompressionError, DamagedFileError, FingerprintError, ModelError, StorageError
from ..models.loading import dequantised_from, folder_of, is_hub_id, is_known_here
from ..requests.answers import begins_with_one
from ..requests.forms import right_answers, standing
from ..whole_files import make_folder, storage_error, write_file
from .low_rank import decompose, pair_of
from .storage import read_json

LOG = logging.getLogger(__name__)
# The ranks that vLLM makes room for by --max-lora-rank, but for 1 and 320, which not all its releases know.
SERVED = (8, 16, 32, 64, 128, 256, 512)


def check_place(path: Path) -> None:
    """Raise :class:`~kdpo_editor.StorageError` where a folder cannot be written anew: it is there and not empty."""
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

    It is loaded with PEFT before it is kept. After the prompt of each edit the model must give a right answer, or say
    what the edited one says; after a rephrase it must give one where the edited model does.

    Args:
        path: a folder; see :func:`check_place`.
        model: the model as before the edit; it is left as found.
        tok: its tokenizer.
        change: what is added, ``{parameter name: tensor}``.
        requests: the edits.
        wanted: the edited model's answers after :func:`asked_prompts` of ``requests``.
        rank: of the adapter; by default the smallest of :data:`SERVED` that keeps the answers. Where the change has a
            smaller one, the rest is zeros.

    Returns the adapter's rank; errors as those of :meth:`EditDelta.save_lora`.
    """
    from peft import PeftModel

    if rank is not None:
        served_rank(rank)
    model = uncompiled(model)
    make_folder(path.parent)
    weights = dict(model.named_parameters())
    parts = {name: decompose(matrix, weights[name]) for name, matrix in change.items()}
    full = max(scale.shape[-1] for _, scale, _ in parts.values())
    if rank is not None:
        ranks: list[int] = [rank]
    elif requests:
        ranks = [r for r in SERVED if r < full] + [r for r in SERVED if r >= full][:1]
    else:
        ranks = [served_rank(full)]  # nothing tells when a smaller one would do
    asked = _asked(requests)
    for r in ranks:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            _write(folder, model, parts, r)
            with _left_alone(model):
                adapted = PeftModel.from_pretrained(model, str(folder))
                try:
                    said = answers(adapted, tok, list(asked))
                finally:
                    adapted.unload()
            lost = [
                (prompt, says, was)
                for (prompt, rule), says, was in zip(asked.items(), said, wanted, strict=True)
                if not _is_kept(says, was, *rule)
            ]
            if not lost:
                folder.chmod(0o755)
                folder.replace(path)
                LOG.info("%s: rank %d; vLLM needs --max-lora-rank %d", path, r, served_rank(r))
                return r
        except OSError as error:
            raise storage_error("write", path, error) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    prompt, says, was = lost[0]
    raise CompressionError(
        f"an adapter of rank {ranks[-1]} does not hold the edit: after {prompt!r} the model says {says!r}, "
        f"not {was!r}; export the model instead, which holds it exactly"
    )


def load_lora(model: nn.Module, path: str | Path) -> Any:
    """Load an adapter of :func:`save_lora` onto ``model``, the unedited one, and return PEFT's model.

    PEFT alone does the same with ``PeftModel.from_pretrained(model, path)``. It looks modules up by the ends of their
    names, so on another class an adapter may find none of its tensors' places and do nothing; here that is an error.

    Raises:
        FingerprintError: the adapter was made on another class of model, or names modules that this one has not.
        DamagedFileError, StorageError: there is no adapter, or it cannot be read.
        ModuleNotFoundError: PEFT is not installed.
    """
    from peft import PeftModel

    config = read_json(Path(path) / "adapter_config.json")
    made = config.get("auto_mapping") or {}
    targets, stacks = config.get("target_modules"), config.get("target_parameters") or []
    if not isinstance(made, dict) or not isinstance(targets, list) or not isinstance(stacks, list):
        raise DamagedFileError(f"{path}: adapter_config.json is not of an adapter by this package")
    own = type(uncompiled(model)).__name__
    if made.get("base_model_class", own) != own:
        raise FingerprintError(f"{path} was made on a {made['base_model_class']}, and this model is a {own}")
    known = {name for name, _ in (*uncompiled(model).named_modules(), *uncompiled(model).named_parameters())}
    if missing := sorted(set(map(str, [*targets, *stacks])) - known):
        raise FingerprintError(f"{path} adapts {missing[0]}, which this {own} does not have")
    return PeftModel.from_pretrained(model, str(path))  # type: ignore[arg-type]


def served_rank(rank: int) -> int:
    """Say which ``--max-lora-rank`` an adapter of this rank needs of vLLM.

    Raises :class:`~kdpo_editor.CompressionError` for a rank that no server takes.
    """
    if rank < 1 or rank > SERVED[-1]:
        raise CompressionError(
            f"an adapter's rank is 1 to {SERVED[-1]}, and {rank} would be needed; export the model instead"
        )
    return next(served for served in SERVED if served >= rank)


def asked_prompts(requests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every prompt of ``requests``, rephrases too, once each: what an adapter is asked before it is kept."""
    return list(_asked(requests))


def _asked(requests: Sequence[Mapping[str, Any]]) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Every prompt's right answers, and whether it is a request's own and not a rephrase."""
    last = standing(requests)
    own = {request["prompt"]: (right_answers(request), True) for request in last}
    return {r: (right_answers(request), False) for request in last for r in request.get("rephrases") or ()} | own


def _is_kept(says: str, said: str, right: tuple[str, ...], needed: bool) -> bool:
    """Whether the adapted model, which ``says`` so, keeps what the edited one ``said``."""
    if says == said or begins_with_one(says, right):
        return True
    return not needed and not begins_with_one(said, right)


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
        base_model_name_or_path=_base_of(model),
        inference_mode=True,
        auto_mapping={"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        **extra,
    )
    config.save_pretrained(str(folder))
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").write_bytes(data)
    write_file(folder / "README.md", _card(model, rank, bool(stacks)).encode())


def _base_of(model: nn.Module) -> str | None:
    """The name by which PEFT loads the unedited model, without this package."""
    name, path = _name_of(model), getattr(model, "name_or_path", None)
    try:
        return folder_of(name) if name and is_known_here(name) else path or name
    except (ModelError, StorageError):  # the file that it was read from is gone
        return str(path or name)


def _name_of(model: nn.Module) -> str | None:
    """The name that the user has for the model; this package notes it in the configuration."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)


def _card(model: nn.Module, rank: int, of_experts: bool) -> str:
    """The README beside an adapter. No server was seen to load one of routed experts."""
    name, base, kind = _name_of(model) or "", _base_of(model) or "BASE", type(model).__name__
    source, served = dequantised_from(model), f"--enable-lora --max-lora-rank {served_rank(rank)}"
    lines = ["---", "library_name: peft", *([f"base_model: {name}"] if is_hub_id(name) else []), "---", ""]
    lines += [f"# An edit of {name or 'a model'}, as a LoRA adapter", "", f"Rank {rank}, of a `{kind}`.", ""]
    if of_experts:
        lines += [
            "It adapts the matrices of routed experts, each by a pair of its own, for which PEFT 0.19 is needed.",
            "",
        ]
    if source is not None:
        lines += [
            f"The base is the model in `{source['file']}` (SHA-256 `{source['sha256']}`), written out in fp32. It is "
            "not the unquantised model of the same name on the hub, for which this adapter was not made. Its folder of "
            f"safetensors is `{base}`, where it was made; on another machine copy that folder, or have it made again "
            f"by `kdpo settings --model {Path(name).name}` there, and name it as the base.",
            "",
        ]
    lines += [
        "```python",
        "from peft import PeftModel",
        f"from transformers import {kind}",
        "",
        f'model = {kind}.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(model, "THIS FOLDER")',
        "```",
        "",
        "```sh",
        *([] if of_experts else [f"vllm serve {base} {served} --lora-modules edit=THIS_FOLDER"]),
        f"lm_eval --model hf --model_args pretrained={base},peft=THIS_FOLDER --tasks ...",
        "```",
        "",
    ]
    return "\n".join(lines)


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Afterwards nothing remains on ``model`` of what PEFT does to one, and the random state is as before."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    orders = [(m, list(m._parameters)) for m in model.modules()]
    children = [(m, dict(m._modules)) for m in model.modules()]
    own = set(model.__dict__)
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for name in model.__dict__.keys() - own:
                del model.__dict__[name]
            for module, named in children:
                module._modules.update(named)
            for p, required in flags:
                p.requires_grad_(required)
            for module, training in modes:
                module.training = training
            for module, names in orders:  # a stack of experts that was adapted comes last
                for name in names:
                    module._parameters[name] = module._parameters.pop(name)
