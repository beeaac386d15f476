"""What a model is made of, found by looking at it: its blocks, and in each the matrix that writes last.

Nothing here knows the name of an architecture. The list of blocks is the one beside the token embeddings, so the vision
tower of a multimodal model is never taken. In a block, names that many architectures share say which matrix is the
MLP's last. Where they do not, it is the last matrix to be called whose output is as wide as the residual stream, seen
by watching a forward pass of a few tokens.

In a mixture of experts it is the shared expert's, where there is one. Otherwise it is the parameter that stacks those
of all routed experts (:mod:`.experts`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .experts import STACKED_ONLY, is_mixture, is_one_experts, is_routers, stacks
from .weights import as_found, check_kind

# What the last matrix of an MLP is called: by Llama and most others; GPT-2; GPT-J; GPT-NeoX, Bloom and Falcon; OPT and
# Phi; LFM2; Granite 4.
MLP_LEAVES = ("down_proj", "c_proj", "fc_out", "dense_4h_to_h", "fc2", "w2", "output_linear")
# Token ids of the pass that is watched; every vocabulary has them.
WATCHED = 4


@dataclass(frozen=True)
class Structure:
    """Where things are in a decoder-only language model, as dotted names.

    ``blocks``: the list of blocks, such as ``model.layers``; ``depth``: how many there are. ``matrix``: the matrix of
    each block that writes into the residual stream last, with ``{}`` for the block's index, without ``.weight``; or the
    parameter that stacks those of its routed experts.
    ``mlp``: the module that holds it, likewise; the block itself where the matrix stands directly in it.
    ``attention``: the module that mixes tokens, likewise, or ``None`` where ``mlp`` does both. ``final_norm``: the norm
    after the last block. ``head``: what holds the matrix that gives logits; where it is tied, the embeddings.
    ``embeddings``: the token embeddings. ``is_stack``: ``matrix`` is the parameter of routed experts.
    """

    blocks: str
    depth: int
    matrix: str
    mlp: str
    attention: str | None
    final_norm: str | None
    head: str
    embeddings: str
    is_stack: bool = False


def structure_of(model: nn.Module) -> Structure:
    """Find the structure of ``model``, a decoder-only ``transformers`` model with a language-model head.

    A model on the meta device will do. Nothing about the model is changed.

    Raises:
        ModelError: the model is an encoder-decoder or quantised; it has no token embeddings, no head or no list of
            blocks; no block has a matrix that writes into the residual stream; or its blocks are mixtures of experts
            without a shared expert whose routed experts are not stacked.
    """
    check_kind(model)
    embeddings, head = _name_of(model, "input"), _name_of(model, "output")
    name, blocks = _blocks(model, embeddings)
    watched = _Watched(model)
    matrix = _matrix(name, blocks, watched)
    tied = model.get_submodule(head).weight is model.get_submodule(embeddings).weight
    mlp = matrix.rpartition(".")[0]
    attention = _attention(blocks, mlp)
    return Structure(
        blocks=name,
        depth=len(blocks),
        matrix=f"{name}.{{}}.{matrix}",
        mlp=f"{name}.{{}}.{mlp}".removesuffix("."),
        attention=None if attention is None else f"{name}.{{}}.{attention}",
        final_norm=_final_norm(name, blocks, watched),
        head=embeddings if tied else head,
        embeddings=embeddings,
        is_stack=not any(matrix in _matrices(block) for block in blocks),
    )


def editable_layers(model: nn.Module, template: str) -> list[int]:
    """The indices of the blocks that have the matrix ``template``: all of them, but in a hybrid model."""
    name, _, inside = template.removesuffix(".weight").partition(".{}.")
    blocks = model.get_submodule(name).named_children()
    return [int(i) for i, block in blocks if inside in _matrices(block) or inside in _stacks(block)]


class _Watched:
    """One forward pass of a few tokens, run when it is first asked for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def calls(self) -> list[nn.Module]:
        """Every module, once for each of its calls, in the order in which they ended."""
        found: list[nn.Module] = []

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found.append(module)

        handles = [module.register_forward_hook(note) for module in self.model.modules()]
        device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        try:
            with torch.no_grad(), as_found(self.model):
                self.model(input_ids=torch.arange(WATCHED, device=device).unsqueeze(0), use_cache=False)
        except Exception as error:
            raise ModelError(
                f"{type(self.model).__name__}: its structure cannot be found, as it does not run on token ids alone "
                f"({type(error).__name__}: {error}); give layers and rewrite_module_tmp"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        return found


def _name_of(model: nn.Module, end: str) -> str:
    """The name of what holds the token embeddings ("input") or the head's matrix ("output")."""
    try:
        module = getattr(model, f"get_{end}_embeddings")()
    except (AttributeError, NotImplementedError):
        module = None
    if isinstance(getattr(module, "weight", None), Tensor):
        for name, candidate in model.named_modules():
            if candidate is module:
                return str(name)
    what = "token embeddings" if end == "input" else "language-model head"
    raise ModelError(f"{type(model).__name__} has no {what}; only causal language models can be edited")


def _blocks(model: nn.Module, embeddings: str) -> tuple[str, nn.ModuleList]:
    """The list of blocks, and its name: of the lists beside the embeddings, the one with most parameters.

    Where there is none beside them, it is sought one module further up.
    """
    holder = embeddings
    while holder:
        holder = holder.rpartition(".")[0]
        lists = {
            f"{holder}.{name}".removeprefix("."): child
            for name, child in model.get_submodule(holder).named_children()
            if isinstance(child, nn.ModuleList) and len(child)
        }
        if lists:
            name = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
            return name, lists[name]
    raise ModelError(f"{type(model).__name__} has no list of blocks beside its token embeddings, {embeddings!r}")


def _matrix(name: str, blocks: nn.ModuleList, watched: _Watched) -> str:
    """The name, inside a block, of the matrix that writes into the residual stream last.

    Where blocks differ, it is the one that most of them have; an MLP's goes before a mixer's.
    """
    model = watched.model
    embedded = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    width = getattr(text_config(model), "hidden_size", None) or embedded
    votes: Counter[str] = Counter(last for block in blocks if (last := _last_writer(block, width, watched)) is not None)
    if not votes:
        mixture = next((i for i, block in enumerate(blocks) if is_mixture(block)), None)
        if mixture is not None:
            raise ModelError(
                f"layer {mixture} of {type(model).__name__} is a mixture of experts of a form that is not understood: "
                f"it has no shared expert, and {STACKED_ONLY}"
            )
        raise ModelError(
            f"{type(model).__name__}: no block of {name} has a matrix whose output is as wide as the residual stream, "
            f"{width}; give rewrite_module_tmp and layers"
        )
    return max(votes, key=lambda matrix: (matrix.rpartition(".")[2] in MLP_LEAVES, votes[matrix]))


def _last_writer(block: nn.Module, width: int, watched: _Watched) -> str | None:
    """The name, inside ``block``, of the last of its matrices whose output is ``width`` wide."""
    writers = {name: module for name, module in _matrices(block).items() if _width(module) == width}
    # GPT-2 calls its attention's last matrix as it does its MLP's.
    named = [name for name in writers if _is_mlps(name)]
    if not named and is_mixture(block):
        found = [name for name, stack in _stacks(block).items() if _is_mlps(name) and width in stack.shape[1:]]
        return found[0] if len(found) == 1 else None
    candidates = named or list(writers)
    if len(candidates) <= 1:
        return candidates[0] if candidates else None
    names = {id(writers[name]): name for name in candidates}
    return next((names[id(module)] for module in reversed(watched.calls) if id(module) in names), None)


def _matrices(block: nn.Module) -> dict[str, nn.Module]:
    """The linear modules of ``block`` that every token meets, by name; no router's."""
    found = {name: module for name, module in block.named_modules() if _width(module) and not is_one_experts(name)}
    if is_mixture(block):
        return {name: module for name, module in found.items() if not is_routers(name)}
    return found


def _stacks(block: nn.Module) -> dict[str, Tensor]:
    """The parameters of ``block`` that stack matrices of all experts, by name without ``.weight``."""
    return {name.removesuffix(".weight"): stack for name, stack in stacks(block).items()}


def _is_mlps(name: str) -> bool:
    return name.rpartition(".")[2] in MLP_LEAVES and not _is_attention(name)


def _width(module: nn.Module) -> int | None:
    """The width of the output of a linear module; ``None`` where ``module`` is none."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    # GPT-2's matrices are transposed, and say how wide their output is.
    return int(getattr(module, "nf", weight.shape[0]))


def _attention(blocks: nn.ModuleList, mlp: str) -> str | None:
    """The name of the module, directly in a block and beside ``mlp``, that mixes tokens."""
    votes: Counter[str] = Counter(
        name
        for block in blocks
        for name, child in block.named_children()
        if name != mlp.partition(".")[0] and _width(child) is None and any(p.ndim > 1 for p in child.parameters())
    )
    return max(votes, key=lambda name: (_is_attention(name), votes[name])) if votes else None


def _is_attention(name: str) -> bool:
    return "attn" in name or "attention" in name


def _final_norm(name: str, blocks: nn.ModuleList, watched: _Watched) -> str | None:
    """The name of the norm that follows the last block: a module without matrices, beside the list of blocks."""
    holder = name.rpartition(".")[0]
    norms = {
        child: f"{holder}.{own}".removeprefix(".")
        for own, child in watched.model.get_submodule(holder).named_children()
        if any(True for _ in child.parameters()) and all(p.ndim == 1 for p in child.parameters())
    }
    if len(norms) > 1:
        try:
            end = watched.calls.index(blocks[-1])
        except ModelError:  # nothing that an edit needs; on the meta device some models do not run
            return None
        norms = {module: norms[module] for module in watched.calls[end:] if module in norms}
    return next(reversed(norms.values()), None)


def room(model: nn.Module) -> float:
    """The most tokens that ``model`` takes; infinite where its configuration does not say."""
    return getattr(text_config(model), "max_position_embeddings", None) or inf


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, which multimodal models keep inside their own."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
