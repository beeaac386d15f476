"""A model of two matrices and ledgers of it, for what does not need a language model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from kdpo_editor import EditLedger
from kdpo_editor.edits.manifest import EditInfo

NAME = "a.weight"


class Small(nn.Module):
    """Two matrices of 4 x 3 and 5 x 4, always the same."""

    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Linear(3, rows, bias=False)
        self.b = nn.Linear(rows, 5, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))


def change(model: nn.Module, seed: int, name: str = NAME) -> dict[str, Tensor]:
    """Add noise to a matrix; what it was before."""
    weight = model.get_parameter(name)
    before = {name: weight.detach().clone()}
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    return before


def info(number: int) -> EditInfo:
    return EditInfo.now([{"prompt": f"question {number}", "target_new": f"answer {number}"}])


def add(ledger: EditLedger, model: nn.Module, number: int, name: str = NAME) -> None:
    ledger.record(model, change(model, number, name), info(number))


def make(folder: Path, edits: int) -> list[dict[str, Tensor]]:
    """A ledger with that many edits of both matrices in turn; the model's states, from the unedited one on."""
    model = Small()
    states = [{n: t.clone() for n, t in model.state_dict().items()}]
    with EditLedger(folder, write=True) as ledger:
        for number in range(1, edits + 1):
            add(ledger, model, number, ("a.weight", "b.weight")[number % 2])
            states.append({n: t.clone() for n, t in model.state_dict().items()})
    return states
