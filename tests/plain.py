"""KDPO written down as plainly as it can be: two models, full forward passes, whole log-softmaxes.

The reference that the editor is compared with, for what it computes and for how long it takes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


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
