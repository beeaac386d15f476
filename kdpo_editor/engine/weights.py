"""Find the matrices to edit, and leave everything else about a model as it was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..hparams import KDPOHyperParams
from .experts import STACKED_ONLY, is_mixture, is_one_experts, is_routers, stacks

EDITABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def find_matrices(model: nn.Module, hparams: KDPOHyperParams) -> dict[str, nn.Parameter]:
    """The matrix of each of ``hparams.layers``, in that order, by parameter name.

    Of a mixture of experts it may be the stack of all routed experts' matrices, ``[E, D, F]`` or ``[E, F, D]``.

    Raises:
        ModelError: the model is an encoder-decoder or quantised; the template names no list of blocks, a layer lies
            outside it, or the name matches no matrix or several, a router, or one routed expert; or the matrix is
            quantised or not in memory.
    """
    check_kind(model)
    layers, name = hparams.place
    blocks = find_blocks(model, hparams)
    found = {}
    for layer in layers:
        if layer >= len(blocks):
            raise ModelError(
                f"layers: {layer} is outside the model, which has {len(blocks)} layers, 0 to {len(blocks) - 1}"
            )
        wanted = name.format(layer).removesuffix(".weight")
        matches = {
            n: p
            for n, p in uncompiled(model).named_parameters()
            if p.ndim >= 2 and (n == wanted or n.startswith(wanted + "."))
        }
        if len(matches) != 1:
            inside = [n for n, p in blocks[layer].named_parameters() if p.ndim >= 2]
            what = "matches no matrix" if not matches else f"matches {len(matches)} matrices, {', '.join(matches)}"
            raise ModelError(
                f"rewrite_module_tmp: {name!r} {what} in layer {layer}; it must name one of {', '.join(inside)}"
            )
        ((full_name, weight),) = matches.items()
        _check_shape(full_name, weight, blocks[layer])
        if weight.device.type == "meta":
            raise ModelError(f"{full_name} is on the meta device (not loaded, or offloaded); load the model first")
        if weight.dtype not in EDITABLE:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in EDITABLE)
            raise ModelError(
                f"{full_name} is {str(weight.dtype).removeprefix('torch.')}: quantised weights cannot be edited; "
                f"load the model in one of {allowed}"
            )
        found[full_name] = weight
    return found


def _check_shape(name: str, weight: Tensor, block: nn.Module) -> None:
    """Raise :class:`ModelError` unless ``weight`` is a matrix that every token meets or the stack of all experts'."""
    if any(weight is stack for stack in stacks(block).values()):
        return
    if weight.ndim != 2:
        raise ModelError(f"{name} has shape {tuple(weight.shape)}; only matrices can be edited")
    if is_mixture(block):
        if is_routers(name):
            raise ModelError(f"{name} is a router's; routing is not edited")
        if is_one_experts(name):
            raise ModelError(f"{name} is of one routed expert, or of a form that is not understood; {STACKED_ONLY}")


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was called on, where ``model`` is what it gave; else ``model`` itself."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def check_kind(model: nn.Module) -> None:
    """Raise :class:`ModelError` for a kind of model that cannot be edited."""
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(f"{kind} is an encoder-decoder; only decoder-only models can be edited")
    if getattr(model, "is_quantized", False):
        raise ModelError(f"{kind} was loaded quantised; load it in floating point to edit it")


def blocks_name(hparams: KDPOHyperParams) -> str:
    """Dotted name of the list of blocks: the template up to its ``.{}``."""
    return (hparams.rewrite_module_tmp or "").partition(".{}")[0]


def find_blocks(model: nn.Module, hparams: KDPOHyperParams) -> nn.ModuleList:
    """The model's list of blocks, or :class:`ModelError` where the template names none."""
    name = blocks_name(hparams)
    try:
        blocks = model.get_submodule(name)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList):
        lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        raise ModelError(
            f"rewrite_module_tmp: {hparams.rewrite_module_tmp!r} matches nothing: the model has no list of layers "
            f"{name!r}; it has {', '.join(lists) or 'none at all'}"
        )
    return blocks


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and nothing compiled is used; every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    # Modules that were compiled in place would be compiled anew for each length, and for the hooks set on them.
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def only_training(model: nn.Module, weights: dict[str, nn.Parameter], originals: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the model is in evaluation mode, gradients are computed, and only ``weights`` require them.

    Afterwards ``requires_grad`` and ``.grad`` of every parameter, the mode of every module and torch's random
    states are as they were, also on exceptions. If one is raised, ``weights`` get the values of ``originals`` back too.
    """
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    devices = {w.device for w in weights.values() if w.device.type == "cuda"}
    edited = {id(w) for w in weights.values()}
    with torch.random.fork_rng(devices=sorted(d.index for d in devices)), as_found(model), torch.enable_grad():
        try:
            for p, required, _ in flags:
                if required is not (id(p) in edited):
                    p.requires_grad_(not required)
            for w in weights.values():
                w.grad = None
            yield
        except BaseException:
            restore(weights, originals)
            raise
        finally:
            for p, required, grad in flags:
                if p.requires_grad is not required:
                    p.requires_grad_(required)
                if p.grad is not grad:
                    p.grad = grad


@torch.no_grad()
def restore(weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Write ``values`` into ``weights``, in place and bit for bit."""
    for name, value in values.items():
        weights[name].copy_(value)
