"""What a model writes when it is let: sampled text, the same for the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .weights import as_found


@torch.no_grad()
def write(
    model: nn.Module,
    tok: Any,
    starts: Tensor,
    length: int,
    *,
    greedy: bool = False,
    seed: int = 0,
    noting: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Go on from ``starts`` by at most ``length`` tokens, one row each: ``[B, S]`` to ``[B, S + L]`` int64, on the CPU.

    Tokens are drawn from the model's own distribution, as ``seed`` has it, or are its first choices where ``greedy``.
    What follows a row's end token is of no meaning. ``noting`` is called before each token with the ids so far and the
    logits of the next, ``[B, V]``. Torch's random state and the model's mode are left as they were.
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]

    def note(ids: Tensor, scores: Tensor) -> Tensor:
        if noting is not None:
            noting(ids, scores)
        return scores

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), as_found(model):
        torch.manual_seed(seed)
        return model.generate(  # type: ignore[operator,no-any-return]
            input_ids=starts.to(device),
            attention_mask=torch.ones_like(starts, device=device),
            do_sample=True,
            temperature=1.0,
            top_k=1 if greedy else 0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=length,
            pad_token_id=next((t for t in (tok.pad_token_id, tok.eos_token_id) if t is not None), 0),
            logits_processor=[note],
        ).cpu()


def until_end(tok: Any, ids: Tensor, start: int) -> list[int]:
    """``ids`` ``[L]`` without the first end token after position ``start`` and what follows it."""
    row: list[int] = ids.tolist()
    return row[: row.index(tok.eos_token_id, start)] if tok.eos_token_id in row[start:] else row
