"""From where a model may be run again, and what follows its blocks: tried once for each model and edited matrix."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..errors import ModelError
from .activation_cache import ActivationCache
from .patches import narrowed
from .prefix import Recorder, cache_name
from .upper_part import Examined, UpperPart

# Tokens with which keys and values of those before the trained ones are tried, at least.
FEWEST = 4


def examined(part: UpperPart, ids: Tensor) -> Examined | None:
    """What is found out about a model with the first row of ``ids`` ``[B, L]``, and kept (:mod:`.findings`).

    ``None`` where its logits are NaN or infinite, of which nothing is kept.
    Raises :class:`ModelError` where neither of the two caches gives what the full forward gives.
    """

    def find() -> dict[str, Any] | None:
        found = _begin(part, ids[:1])
        return None if found is None else replace(found, narrow=tuple(find_narrow(part, ids[:1], found.inside))).plain()

    known = part.findings.once(f"examined {part.module_name}", find)
    return None if known is None else Examined.of(known)


@torch.no_grad()
def _begin(part: UpperPart, ids: Tensor) -> Examined | None:
    """Where the cache may begin and what follows it; :class:`ModelError` if it is exact from neither place.

    ``None`` where logits are NaN or infinite and nothing can be told; the loss will be, too.
    The matrix's output is disturbed after the capture, so that everything it feeds must answer for itself.
    """
    # Two rows of other tokens, run in the other order: rows are sliced out of batches.
    ids = torch.cat([ids, ids.flip(1)])
    swapped = torch.tensor([1, 0], device=ids.device)
    positions = torch.arange(ids.shape[1], device=ids.device).repeat(2, 1)
    disturbance: list[Tensor] = []

    def disturb(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not disturbance:
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
            scale = output.detach().float().std().nan_to_num(1.0, 1.0, 1.0).item() + 1e-6
            disturbance.append((3 * scale * noise).to(output))
        return output + disturbance[0].view(output.shape)

    found = "cannot be tried"
    # Routed experts are given more than their inputs, so that the cache begins at their block.
    weight = getattr(part.module, "weight", None)
    for inside in (True, False) if weight is not None and weight.ndim == 2 else (False,):
        try:
            cache, before = part.run(ids, positions, inside)
            cache = replace(cache, per_row=per_row(part, cache, ids, inside)).rows(swapped)
        except torch.OutOfMemoryError:
            raise
        except ModelError:
            if inside:
                continue
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # Hidden states that are no [B, L, D], as Gemma-3n's, of which there are several for each token.
            found = f"fails ({type(error).__name__}: {error})"
            continue
        handle = part.module.register_forward_hook(disturb)
        try:
            full = part.model(input_ids=ids[swapped], use_cache=False, return_dict=True).logits.float()
            hidden = part.from_cache(cache)
            replayed = part.logits(hidden).to(full.device)
            head = part.model.get_output_embeddings()  # type: ignore[operator]
            alone = head(hidden.to(head.weight.dtype)).float()
            pair = torch.stack([positions % full.shape[-1], full.argmax(-1).to(positions.device)], -1)
            rows = part.head_rows(pair)
            some = None if rows is None else part.logits(hidden, rows).to(full.device)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # Blocks or a head that want more than what they were seen to be given.
            found = f"fails ({type(error).__name__}: {error})"
            continue
        finally:
            handle.remove()
        if not torch.isfinite(full).all():
            return None
        change = (full - part.logits(before[swapped.to(before.device)]).to(full.device)).norm()
        allowed = _allowed(part, change, full.norm())
        difference = (full - replayed).norm()
        if some is not None:
            difference = torch.maximum(difference, (full.gather(-1, pair.to(full.device)) - some).norm())
        if difference <= allowed:
            after = [name for name, child in part.holder.named_children() if child in part.after]
            return Examined(inside, torch.equal(replayed, alone.to(full.device)), part.result, tuple(after))
        found = f"differs from the full forward (by {(difference / change).item():.2g} of the change)"
    raise ModelError(
        f"{type(part.model).__name__}: running what lies above {part.module_name} from its cache {found}; this "
        "architecture cannot be edited"
    )


@torch.no_grad()
def find_narrow(part: UpperPart, ids: Tensor, inside: bool) -> list[str]:
    """Modules of the last block, the largest first, that may be run at the answer positions only.

    ``ids``: ``[1, L]`` int64. Each module is tried: with NaN for whatever it gives elsewhere the final hidden state of
    the last position must stay.
    """
    ids = ids.repeat(1, -(-16 // ids.shape[1]))[:, :16]  # a few tokens tell more than one or two
    found: list[str] = []
    if inside and len(part.blocks) == 1:
        return found
    part = copy.copy(part)
    part.narrow, part.blocks = [], part.blocks[-1:]  # the others' outputs are its inputs, whatever is narrowed
    cache, _ = part.run(ids, torch.tensor([[ids.shape[1] - 1]], device=ids.device), inside=False)
    expected = part.from_cache(cache)
    last = part.blocks[-1]
    names = [name for name, _ in last.named_children()]
    while names:
        name = names.pop(0)
        module = last.get_submodule(name)
        if not any(p.ndim > 1 for p in module.parameters()):
            continue
        try:
            with narrowed(module, cache.places, torch.nan):
                same = torch.allclose(part.from_cache(cache), expected, rtol=0.05, atol=0.05)
        except (AttributeError, RuntimeError, TypeError, ValueError):  # it is called in another way
            same = False
        if same:
            found.append(name)
        else:
            names += [f"{name}.{child}" for child, _ in module.named_children()]
    return found


@torch.no_grad()
def per_row(part: UpperPart, cache: ActivationCache, ids: Tensor, inside: bool) -> tuple[int, ...]:
    """See :class:`ActivationCache`: what of the blocks' arguments grows with the number of rows, and how.

    ``ids``: ``[B, L]`` int64. It is found by running the same row two and three times. That is done once for each kind
    of arguments: a mask, for example, may be there for some lengths alone.
    """
    leaves, tree = tree_flatten(cache.arguments)
    kind = f"{tree} {[leaf.ndim if isinstance(leaf, Tensor) else -1 for leaf in leaves]}"

    def find() -> list[int]:
        two, three = (
            tree_flatten(part.run(row, torch.zeros_like(row[:, :1]), inside)[0].arguments)[0]
            for row in (ids[:1].repeat(2, 1), ids[:1].repeat(3, 1))
        )
        if not len(leaves) == len(two) == len(three):
            raise ModelError(f"{type(part.model).__name__} calls its blocks in another way for each batch size")
        return [
            c.shape[0] - b.shape[0] if isinstance(b, Tensor) and b.ndim and b.shape != c.shape else 0
            for b, c in zip(two, three, strict=True)
        ]

    name = hashlib.blake2b(kind.encode(), digest_size=16).hexdigest()
    return tuple(part.findings.once(f"per row {part.module_name} {name}", find))


@torch.no_grad()
def freezes(part: UpperPart, ids: Tensor, inside: bool) -> bool:
    """Whether keys and values can stand in for the tokens before the trained ones (:mod:`.prefix`).

    It is tried once for each model, matrix and order of lengths of ``ids`` ``[B, L]``, since a mask may be there for
    long rows alone. The matrix's output is disturbed from a token on that is another in each of two rows, and what the
    blocks make of all tokens is compared with what they make of those.
    """
    length = ids.shape[1]
    if length < FEWEST or cache_name(part.holder) is None:
        return False

    def find() -> bool:
        try:
            return _freezes(part, ids[:1], inside)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, ModelError, RuntimeError, TypeError, ValueError):
            return False  # it keeps more of a token than keys and values, or keeps them in another way

    return bool(part.findings.once(f"freezes {part.module_name} {length.bit_length()}", find))


def _freezes(part: UpperPart, ids: Tensor, inside: bool) -> bool:
    ids = torch.cat([ids, ids.flip(1)])
    length = ids.shape[1]
    first = torch.tensor([[length // 4], [length // 2]], device=ids.device)
    trained = torch.arange(length, device=ids.device) >= first
    positions = torch.arange(length // 2, length, device=ids.device).repeat(2, 1)
    recorder = Recorder()
    cache, before = part.run(ids, positions, inside, recorder)
    cache = replace(cache, trained=trained, per_row=per_row(part, cache, ids, inside))
    swapped = torch.tensor([1, 0], device=ids.device)
    short = part.frozen(cache, recorder).rows(swapped)
    noise: list[Tensor] = []

    def disturb(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not noise:
            drawn = torch.randn(*ids.shape, output.shape[-1], generator=torch.Generator().manual_seed(0))
            scale = output.float().std().nan_to_num(1.0, 1.0, 1.0).item() + 1e-6
            noise.append((3 * scale * drawn).to(output) * trained.unsqueeze(-1).to(output))
            return output + noise[0].view(output.shape)
        at = (first + torch.arange(output.numel() // output.shape[-1] // 2, device=ids.device)).clamp(max=length - 1)
        here = noise[0].gather(1, at.unsqueeze(-1).expand(-1, -1, output.shape[-1]).to(output.device))
        return output + here[swapped.to(here.device)].view(output.shape)

    handle = part.module.register_forward_hook(disturb)
    try:
        whole = part.from_cache(cache)[swapped.to(before.device)].float()
        difference = (part.from_cache(short).float() - whole).norm()
    finally:
        handle.remove()
    change = (whole - before[swapped.to(before.device)].float()).norm()
    return bool(difference <= _allowed(part, change, whole.norm()))


def _allowed(part: UpperPart, change: Tensor, size: Tensor) -> Tensor:
    """What rounding may cost, a scalar: a share of the norm of a change, and of that of the numbers themselves."""
    half = next(part.model.parameters()).dtype in (torch.float16, torch.bfloat16)
    return (0.05 if half else 1e-3) * change + (2e-2 if half else 1e-5) * size
