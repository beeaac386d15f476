"""The steps that an edit is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import PARAMETER, REQUEST
from torch import nn

from kdpo_editor import HyperParamsError, KDPOHyperParams, edit
from kdpo_editor.engine.optimizers import Stepper


def matrices(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (5, 2))]


def stepper(weights: list[nn.Parameter], optimizer: str, lr: float) -> Stepper:
    return Stepper(weights, KDPOHyperParams("model", [0], "layers.{}.weight", optimizer=optimizer, lr=lr))


def take_step(optimizer: Stepper, loss: torch.Tensor, skip: torch.Tensor | None = None) -> None:
    optimizer.gather(loss)
    optimizer.step(skip)


def linear(weights: list[nn.Parameter]) -> torch.Tensor:
    """What is linear in the weights and above zero at first."""
    coefficients = torch.Generator().manual_seed(1)
    parts = [(w.float() * torch.randn(w.shape, generator=coefficients)).sum() for w in weights]
    return torch.stack(parts).sum() + 10


def test_a_polyak_step_takes_a_linear_loss_to_zero_by_the_least_change() -> None:
    weights = matrices()
    before = [w.detach().clone() for w in weights]
    loss = linear(weights)
    gradients = torch.autograd.grad(linear(weights), weights)
    take_step(stepper(weights, "polyak", 1.0), loss)
    assert linear(weights).item() == pytest.approx(0, abs=1e-4)
    # The least: along the gradient, so as long as the loss is high over the gradient's norm.
    moved = torch.stack([(w - b).square().sum() for w, b in zip(weights, before, strict=True)]).sum().sqrt()
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert moved.item() == pytest.approx((loss / norm).item(), rel=1e-4)


def test_the_rate_is_a_factor_on_a_polyak_step() -> None:
    weights = matrices()
    before = linear(weights).item()
    take_step(stepper(weights, "polyak", 1.5), linear(weights))
    assert linear(weights).item() == pytest.approx(-0.5 * before, rel=1e-4)


@pytest.mark.parametrize(("losses", "factor"), [(1, 1.0), (4, 2.0)])
def test_no_polyak_step_is_longer_than_its_bound(losses: int, factor: float) -> None:
    weights = matrices()
    before = [w.detach().clone() for w in weights]
    optimizer = stepper(weights, "polyak", 1.0)
    optimizer.longest = 0.01
    optimizer.gather(linear(weights), losses)
    optimizer.step()
    moved = torch.stack([(w - b).square().sum() for w, b in zip(weights, before, strict=True)]).sum().sqrt()
    assert moved.item() == pytest.approx(0.01 * factor, rel=1e-4)


def test_a_loss_without_gradient_moves_nothing() -> None:
    weights = matrices()
    before = [w.detach().clone() for w in weights]
    take_step(stepper(weights, "polyak", 1.0), sum((w * 0).sum() for w in weights) + torch.tensor(1.0))
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_skipped_leaves_everything_as_it_was(dtype: torch.dtype) -> None:
    weights, expected = matrices(dtype), matrices(dtype)
    skipping, plain = (stepper(w, "adam", 0.1) for w in (weights, expected))
    before = [w.detach().clone() for w in weights]
    take_step(skipping, linear(weights), skip=torch.tensor(True))
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    # The state is as before too: the next step is like a first one.
    take_step(skipping, linear(weights), skip=torch.tensor(False))
    take_step(plain, linear(expected))
    assert all(torch.equal(w, e) for w, e in zip(weights, expected, strict=True))
    assert not torch.equal(weights[0], before[0])


def test_small_steps_add_up_in_half_precision() -> None:
    weights = matrices(torch.bfloat16)
    optimizer, first = stepper(weights, "polyak", 1e-4), linear(weights).item()
    for _ in range(300):
        take_step(optimizer, linear(weights))
    # Each step is far below what bf16 tells apart; together they take 3% off.
    assert linear(weights).item() == pytest.approx(first * (1 - 1e-4) ** 300, rel=0.01)


@pytest.mark.parametrize("layers", [[4], [3, 4]])
def test_an_edit_by_polyak_steps_takes_a_few(llama: Any, settings: Any, layers: list[int]) -> None:
    model, tok = llama
    hparams = settings(optimizer="polyak", lr=1.5, objective="hinge", margin=2.0, layers=layers)
    _, originals, (trace,) = edit(model, tok, [REQUEST], hparams)
    assert trace.converged
    assert trace.steps <= 8
    ids = tok(f"{REQUEST['prompt']} {REQUEST['target_new']}", return_tensors="pt")["input_ids"]
    best = model(ids).logits[0, -2].topk(2)
    assert tok.decode(best.indices[0]) == " male"
    assert best.values[0] - best.values[1] >= 2.0
    assert PARAMETER in originals


def test_what_does_not_go_with_polyak_is_refused(settings: Any) -> None:
    with pytest.raises(HyperParamsError, match=r"optimizer: 'sgd' .* one of adam, polyak"):
        settings(optimizer="sgd")
