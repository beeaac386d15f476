"""KDPO written down as plainly as it can be: two models, full forward passes, whole log-softmaxes. And KDPO-L by its
own loop, each pass of which runs the whole model.

The references that the editor is compared with, for what it computes and for how long it takes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kdpo_editor import KDPOHyperParams
from kdpo_editor.derived import complete
from kdpo_editor.editing import check
from kdpo_editor.engine.activation_cache import ActivationCache
from kdpo_editor.engine.cached_forward import CachedForward
from kdpo_editor.engine.findings import Findings
from kdpo_editor.engine.traces import EditTrace
from kdpo_editor.engine.weights import only_training
from kdpo_editor.lifelong.loop import kdpo_l
from kdpo_editor.lifelong.preconditioning import preconditioners


@dataclass
class PlainTrace:
    negatives: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def plain_kdpo(
    model: nn.Module,
    tok: object,
    request: dict[str, str],
    parameter: str,
    *,
    lr: float,
    beta: float = 0.1,
    num_steps: int = 8,
    cycles: int = 20,
    stop_loss: float = 1e-3,
) -> PlainTrace:
    """Edit ``parameter`` of ``model`` in place."""
    model.eval()
    reference = copy.deepcopy(model)
    prompt = tok(request["prompt"])["input_ids"]
    joined = tok(f"{request['prompt']} {request['target_new']}")["input_ids"]
    ids = torch.tensor([joined], device=next(model.parameters()).device)
    chosen = ids[0, len(prompt) :]

    def logps(of: nn.Module) -> Tensor:
        return of(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)

    def answer(table: Tensor, tokens: Tensor) -> Tensor:
        return table.gather(1, tokens[:, None]).sum()

    for name, p in model.named_parameters():
        p.requires_grad_(name == parameter)
    optimizer = torch.optim.Adam([dict(model.named_parameters())[parameter]], lr=lr)
    trace = PlainTrace()
    for _ in range(cycles):
        with torch.no_grad():
            rejected = logps(model).argmax(-1)
        if torch.equal(rejected, chosen):
            break
        trace.negatives.append(rejected.tolist())
        for _ in range(num_steps):
            policy = logps(model)
            with torch.no_grad():
                ref = logps(reference)
            gain = (answer(policy, chosen) - answer(ref, chosen)) - (answer(policy, rejected) - answer(ref, rejected))
            loss = -torch.nn.functional.logsigmoid(beta * gain)
            trace.losses.append(loss.item())
            if loss < stop_loss:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return trace


class FullForward(CachedForward):
    """Keeps nothing of a pass but its token ids, and runs the whole model on all of them every time."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.findings = Findings(None)

    def capture(self, ids: Tensor, positions: Tensor, trained: Tensor | None = None) -> tuple[ActivationCache, Tensor]:
        cache = ActivationCache(ids, None, [], positions, trained)
        return cache, self.from_cache(cache)

    def capture_frozen(
        self, ids: Tensor, positions: Tensor, trained: Tensor | None
    ) -> tuple[ActivationCache, ActivationCache | None, Tensor]:
        cache, hidden = self.capture(ids, positions, trained)
        return cache, None, hidden

    def from_cache(self, cache: ActivationCache) -> Tensor:
        with self.trained_at(cache.trained):
            return cache.places.read(self.holder(input_ids=cache.hidden, use_cache=False).last_hidden_state)

    def logits(self, hidden: Tensor, head_rows: Any = None) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits.float()

    def head_rows(self, tokens: Tensor) -> None:
        return None


def plain_kdpo_l(
    model: nn.Module, tok: object, requests: Sequence[Mapping[str, Any]], hparams: KDPOHyperParams
) -> list[EditTrace]:
    """Edit ``model`` in place, without earlier edits. Its logits are those of its head alone."""
    hparams = complete(hparams, model)
    edits, weights = check(model, tok, requests, hparams)
    spared = preconditioners(model, tok, weights, hparams)
    originals = {name: weight.detach().clone() for name, weight in weights.items()}
    with only_training(model, weights, originals):
        forward = FullForward.above(model, weights, hparams)
        return kdpo_l(forward, weights, [*chain(*edits)], hparams, None, spared)
