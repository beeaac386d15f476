"""What a model answers: freely, and under teacher forcing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..requests import tokenize


@torch.no_grad()
def generate(model: nn.Module, tok: Any, prompt: str, longest: int = 24) -> str:
    """The model's greedy answer to ``prompt``; "..." marks one that did not stop within ``longest`` tokens."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    ids = tok(prompt, return_tensors="pt")["input_ids"].to(device)
    pad = tok.pad_token_id if tok.pad_token_id is not None else tok.eos_token_id
    out: Tensor = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=longest,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
    )[0, ids.shape[1] :]
    stopped = tok.eos_token_id in out.tolist()
    return str(tok.decode(out, skip_special_tokens=True)).strip() + ("" if stopped else " ...")


@torch.no_grad()
def says_target(
    model: nn.Module, tok: Any, requests: Sequence[Mapping[str, Any]], append_eos: bool = False
) -> list[bool]:
    """For each request, whether the new answer is the model's choice at every position, under teacher forcing."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    won = []
    for edit, *_ in tokenize(tok, requests, append_eos=append_eos):
        logits = model(input_ids=edit.sequence.unsqueeze(0).to(device), use_cache=False).logits
        choice = logits[0, len(edit.prompt) - 1 :].argmax(-1).cpu()
        won.append(bool(torch.equal(choice, edit.chosen)))
    return won
