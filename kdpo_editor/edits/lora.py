"""An edit as a PEFT LoRA adapter, for every program that loads those: PEFT, vLLM, the evaluation harness.

The adapter is of the unedited model, and says in its ``adapter_config.json`` which: by a name that PEFT can load
without this package, and by the class that its names of modules are from.
"""

from __future__ import annotations

import errno
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..engine.answers import begins_with
from ..engine.generation import answers
from ..engine.weights import uncompiled
from ..errors import CompressionError, DamagedFileError, FingerprintError, ModelError, StorageError
from ..models import dequantised_from, folder_of, is_known_here
from ..request_forms import right_answers
from .low_rank import decompose, pair_of
from .storage import make_folder, read_json, storage_error, write_file
from .switching import edited

if TYPE_CHECKING:
    from .delta import EditDelta

LOG = logging.getLogger(__name__)

# The ranks that vLLM makes room for by --max-lora-rank, but for 1 and 320, which not all its releases know.
SERVED = (8, 16, 32, 64, 128, 256, 512)


def save_lora(delta: EditDelta, path: Path, model: nn.Module, tok: Any, rank: int | None = None) -> int:
    """Write ``delta`` to the folder ``path`` as an adapter for the unedited model.

    It is loaded with PEFT before it is kept. After the prompt of each edit the model must give a right answer, or say
    what the edited one says; after a rephrase it must give one where the edited model does.

    Args:
        delta: in either form.
        path: must not exist, or be empty.
        model: the model that the delta fits, before or after it; it is left as found.
        tok: its tokenizer.
        rank: of the adapter; by default the smallest of :data:`SERVED` that keeps the answers. Where the change has a
            smaller one, the rest is zeros.

    Returns:
        The adapter's rank. A server must allow it: vLLM by ``--max-lora-rank`` :func:`served_rank`.

    Raises:
        CompressionError: an answer differs, and its prompt is named; the edits changed nothing; or a rank above 512
            would be needed, or was asked for.
        ModuleNotFoundError: PEFT is not installed.
        StorageError: the folder is not empty, or cannot be written.
        FingerprintError: the model is neither as before the edit nor as after it.
    """
    from peft import PeftModel

    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StorageError(errno.EEXIST, f"{path} exists and is not an empty folder")
    if not delta.changes:
        raise CompressionError("the edits changed no weight; there is nothing for an adapter to hold")
    if rank is not None:
        served_rank(rank)
    model = uncompiled(model)
    make_folder(path.parent)
    weights = dict(model.named_parameters())
    parts = {name: decompose(change, weights[name]) for name, change in delta.change().items()}
    full = max(len(scale) for _, scale, _ in parts.values())
    if rank is not None:
        ranks: list[int] = [rank]
    elif delta.info.requests:
        ranks = [r for r in SERVED if r < full] + [r for r in SERVED if r >= full][:1]
    else:
        ranks = [served_rank(full)]  # nothing tells when a smaller one would do
    prompts, right, needed = _asked(delta)
    with delta.before(model):
        with edited(model, delta):
            wanted = answers(model, tok, prompts)
        for r in ranks:
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            try:
                _write(folder, model, parts, r)
                with _left_alone(model):
                    adapted = PeftModel.from_pretrained(model, str(folder))
                    try:
                        said = answers(adapted, tok, prompts)
                    finally:
                        adapted.unload()
                lost = [i for i in range(len(prompts)) if not _is_kept(said[i], wanted[i], right[i], needed[i])]
                if not lost:
                    folder.chmod(0o755)
                    folder.replace(path)
                    LOG.info("%s: rank %d; vLLM needs --max-lora-rank %d", path, r, served_rank(r))
                    return r
            except OSError as error:
                raise storage_error("write", path, error) from error
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    raise CompressionError(
        f"an adapter of rank {ranks[-1]} does not hold the edit: after {prompts[lost[0]]!r} the model says "
        f"{said[lost[0]]!r}, not {wanted[lost[0]]!r}; export the model instead, which holds it exactly"
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
    targets = config.get("target_modules")
    if not isinstance(made, dict) or not isinstance(targets, list):
        raise DamagedFileError(f"{path}: adapter_config.json is not of an adapter by this package")
    own = type(uncompiled(model)).__name__
    if made.get("base_model_class", own) != own:
        raise FingerprintError(f"{path} was made on a {made['base_model_class']}, and this model is a {own}")
    modules = {name for name, _ in uncompiled(model).named_modules()}
    if missing := sorted(set(map(str, targets)) - modules):
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


def _asked(delta: EditDelta) -> tuple[list[str], list[tuple[str, ...]], list[bool]]:
    """Every prompt of the edits, its right answers, and whether it is a request's own and not a rephrase."""
    asked: dict[str, tuple[tuple[str, ...], bool]] = {}
    for request in delta.info.requests:  # a prompt that was edited again has the later answer
        asked[request["prompt"]] = right_answers(request), True
        for rephrase in request.get("rephrases") or ():
            asked.setdefault(rephrase, (right_answers(request), False))
    return list(asked), [right for right, _ in asked.values()], [own for _, own in asked.values()]


def _is_kept(says: str, said: str, right: tuple[str, ...], needed: bool) -> bool:
    """Whether the adapted model, which ``says`` so, keeps what the edited one ``said``."""
    if says == said or any(begins_with(says, answer) for answer in right):
        return True
    return not needed and not any(begins_with(said, answer) for answer in right)


def _write(folder: Path, model: nn.Module, parts: dict[str, tuple[Tensor, Tensor, Tensor]], rank: int) -> None:
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    modules = [name.rpartition(".")[0] for name in parts]
    transposed = [isinstance(model.get_submodule(module), Conv1D) for module in modules]  # GPT-2's [in, out]
    tensors = {}
    for (_, svd), module, turned in zip(parts.items(), modules, transposed, strict=True):
        up, down = pair_of(svd, rank)
        if turned:
            up, down = down.T, up.T
        # PEFT wants one rank for all; a smaller matrix fills up with zeros.
        missing = rank - up.shape[1]
        up, down = nn.functional.pad(up, (0, missing)), nn.functional.pad(down, (0, 0, 0, missing))
        tensors[f"base_model.model.{module}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = up.contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=modules,
        fan_in_fan_out=any(transposed),
        task_type="CAUSAL_LM",
        base_model_name_or_path=_base_of(model),
        inference_mode=True,
        auto_mapping={"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
    )
    config.save_pretrained(str(folder))
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").write_bytes(data)
    write_file(folder / "README.md", _card(model, rank).encode())


def _base_of(model: nn.Module) -> str | None:
    """The name by which PEFT loads the unedited model, without this package."""
    name = getattr(model, "name_or_path", None)
    try:
        return folder_of(name) if name and is_known_here(name) else name
    except (ModelError, StorageError):  # the file that it was read from is gone
        return str(name)


def _card(model: nn.Module, rank: int) -> str:
    """The README beside an adapter."""
    name, base, kind = getattr(model, "name_or_path", None) or "", _base_of(model) or "BASE", type(model).__name__
    source = dequantised_from(model)
    lines = ["---", "library_name: peft", *([f"base_model: {name}"] if _is_hub_id(name) else []), "---", ""]
    lines += [f"# An edit of {name or 'a model'}, as a LoRA adapter", "", f"Rank {rank}, of a `{kind}`.", ""]
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
        f"vllm serve {base} --enable-lora --max-lora-rank {served_rank(rank)} --lora-modules edit=THIS_FOLDER",
        f"lm_eval --model hf --model_args pretrained={base},peft=THIS_FOLDER --tasks ...",
        "```",
        "",
    ]
    return "\n".join(lines)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not is_known_here(name) and not Path(name).exists()


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Afterwards nothing remains on ``model`` of what PEFT does to one, and the random state is as before."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
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
