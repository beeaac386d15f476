"""Short texts in the model's own words, to train an edit behind (``augment``)."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

STARTS = ("The", "In", "When", "It", "A")
TOKENS = 8
SEED = 0

_SAMPLED: WeakKeyDictionary[nn.Module, dict[int, list[str]]] = WeakKeyDictionary()


@torch.no_grad()
def sample_prefixes(model: nn.Module, tok: Any, count: int) -> list[str]:
    """``count`` texts of a few tokens, sampled from ``model`` the first time it is asked for that many.

    ROME (Meng et al. 2022, appendix E.5) averages over such prefixes, so that an edit does not depend on standing at
    the start of a text. ``model`` must be in evaluation mode; torch's random state is changed.
    """
    sampled = _SAMPLED.setdefault(model, {})
    if count not in sampled:
        torch.manual_seed(SEED)
        sampled[count] = [_sample(model, tok, STARTS[i % len(STARTS)]) for i in range(count)]
    return sampled[count]


def _sample(model: nn.Module, tok: Any, start: str) -> str:
    ids = torch.tensor([tok(start, add_special_tokens=True)["input_ids"]], device=model.device)  # type: ignore[arg-type]
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=TOKENS,
        max_new_tokens=TOKENS,
        do_sample=True,
        temperature=1.0,
        top_k=50,
        pad_token_id=tok.eos_token_id,
    )
    return str(tok.decode(output[0], skip_special_tokens=True)).strip()
