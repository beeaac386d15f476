"""What a model writes when it is let: sampled text, the same for the same weights."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..models import cache_name
from .weights import as_found


@dataclass
class Written:
    """A text that a model wrote behind ``start`` tokens.

    ``ids``: all its tokens, without the end token. ``choices`` and ``leads``, for each token beyond the start and the
    end token too: the model's first choice there, and by how many logits it led.
    """

    ids: list[int]
    start: int
    choices: list[int] = field(default_factory=list)
    leads: list[float] = field(default_factory=list)

    @property
    def new(self) -> list[int]:
        """The tokens beyond the start."""
        return self.ids[self.start :]

    @property
    def ended(self) -> bool:
        """Whether the model ended it."""
        return len(self.new) < len(self.choices)


@torch.no_grad()
def write(
    model: nn.Module, tok: Any, starts: Tensor, length: int, *, draws: int = 1, greedy: bool = False, seed: int = 0
) -> list[Written]:
    """Go on from each of ``starts``, ``[B, S]`` int64, ``draws`` times, by at most ``length`` tokens; ``B * draws``
    texts, those behind the same start next to each other.

    Tokens are drawn from the model's own distribution, as ``seed`` has it, or are its first choices where ``greedy``.
    Torch's random state and the model's mode are left as they were.

    ``generate`` of transformers writes the same, but reads a start once for each draw, and goes on with texts that are
    at their end for as long as another of them is not: it takes half as long again, and more.
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    name = cache_name(model)
    texts = [Written([*start], len(start)) for start in starts.tolist() for _ in range(draws)]
    going = [*range(len(texts))]  # those without an end, and of which the model's past is kept
    past: Cache | None = None
    odds = torch.empty(0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), as_found(model):
        torch.manual_seed(seed)
        for step in range(length):
            ids = torch.tensor([texts[i].ids for i in going]) if step else starts
            output = model(
                input_ids=(ids if past is None else ids[:, -1:]).to(device),
                attention_mask=torch.ones_like(ids, device=device),
                use_cache=True,
                **{name: past, **last},
            )
            logits = output.logits[:, -1].to(device, torch.float32)
            past = getattr(output, name, None)
            past = past if isinstance(past, Cache) else None  # else all is read again
            if step == 0:
                logits = logits.repeat_interleave(draws, 0)
                odds = torch.ones_like(logits)
                _select(past, [i // draws for i in going])
            (leading, second), (first, _) = (best.T for best in logits.topk(2))
            drawn = first
            if not greedy:
                # Drawn for all texts, those with an end too, so that none depends on when the others end.
                odds[going] = logits.softmax(-1)
                drawn = odds.multinomial(1).flatten()[going]
            kept = []
            for row, (token, choice, lead) in enumerate(
                zip(drawn.tolist(), first.tolist(), (leading - second).tolist(), strict=True)
            ):
                text = texts[going[row]]
                text.choices.append(choice)
                text.leads.append(lead)
                if token != tok.eos_token_id:
                    text.ids.append(token)
                    kept.append(row)
            if not kept:
                break
            if len(kept) < len(going):
                going = [going[row] for row in kept]
                _select(past, kept)
    return texts


def _select(past: Cache | None, rows: list[int]) -> None:
    """Keep ``rows`` of a model's past, in this order."""
    if past is not None:
        past.reorder_cache(torch.tensor(rows))
