"""The steps that an edit is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import PARAMETER, REQUEST
from torch import nn

from kdpo_editor import HyperParamsError, edit
from kdpo_editor.engine.optimizers import Adam, Optimizer, Polyak
from kdpo_editor.testbed import load_model, load_records


def matrices(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (5, 2))]


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
    Polyak(weights, None, 1.0).step(loss)
    assert linear(weights).item() == pytest.approx(0, abs=1e-4)
    # The least: along the gradient, so as long as the loss is high over the gradient's norm.
    moved = torch.stack([(w - b).square().sum() for w, b in zip(weights, before, strict=True)]).sum().sqrt()
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert moved.item() == pytest.approx((loss / norm).item(), rel=1e-4)


def test_factors_share_a_polyak_step_out_and_it_still_reaches_zero() -> None:
    weights, even = matrices(), matrices()
    before = [w.detach().clone() for w in weights]
    Polyak(weights, None, 1.0, [0.25, 1.0]).step(linear(weights))
    Polyak(even, None, 1.0).step(linear(even))
    assert linear(weights).item() == pytest.approx(0, abs=1e-4)
    first, second = (((w - b).norm() / (e - b).norm()).item() for w, e, b in zip(weights, even, before, strict=True))
    assert first / second == pytest.approx(0.25, rel=1e-4)


def test_factors_are_on_adams_rates() -> None:
    weights = matrices()
    before = [w.detach().clone() for w in weights]
    Adam(weights, None, 0.1, 0.0, [0.5, 1.0]).step(linear(weights))
    for weight, start, rate in zip(weights, before, (0.05, 0.1), strict=True):
        torch.testing.assert_close((weight - start).abs(), torch.full_like(start, rate), rtol=1e-4, atol=0)


def test_the_rate_is_a_factor_on_a_polyak_step() -> None:
    weights = matrices()
    before = linear(weights).item()
    Polyak(weights, None, 1.5).step(linear(weights))
    assert linear(weights).item() == pytest.approx(-0.5 * before, rel=1e-4)


def test_a_loss_without_gradient_moves_nothing() -> None:
    weights = matrices()
    before = [w.detach().clone() for w in weights]
    Polyak(weights, None, 1.0).step(sum((w * 0).sum() for w in weights) + torch.tensor(1.0))
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("kind", ["adam", "polyak"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_skipped_leaves_everything_as_it_was(kind: str, dtype: torch.dtype) -> None:
    weights, expected = matrices(dtype), matrices(dtype)
    made: list[Optimizer] = [
        Adam(w, None, 0.1, 0.0) if kind == "adam" else Polyak(w, None, 1.0) for w in (weights, expected)
    ]
    before = [w.detach().clone() for w in weights]
    made[0].step(linear(weights), skip=torch.tensor(True))
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    # The state is as before too: the next step is like a first one.
    made[0].step(linear(weights), skip=torch.tensor(False))
    made[1].step(linear(expected))
    assert all(torch.equal(w, e) for w, e in zip(weights, expected, strict=True))
    assert not torch.equal(weights[0], before[0])


def test_small_steps_add_up_in_half_precision() -> None:
    weights = matrices(torch.bfloat16)
    optimizer, first = Polyak(weights, None, 1e-4), linear(weights).item()
    for _ in range(300):
        optimizer.step(linear(weights))
    # Each step is far below what bf16 tells apart; together they take 3% off.
    assert linear(weights).item() == pytest.approx(first * (1 - 1e-4) ** 300, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_pulled_back_in_full_precision(dtype: torch.dtype) -> None:
    weights = matrices(dtype)
    start = [w.detach().clone() for w in weights]
    optimizer = Polyak(weights, None, 1.0)
    optimizer.step(linear(weights))
    after = [m.detach().clone() for m in optimizer.masters]
    optimizer.pull(0.25, start)
    for weight, master, was, began in zip(weights, optimizer.masters, after, start, strict=True):
        torch.testing.assert_close(master.detach(), 0.75 * was + 0.25 * began.float())
        assert torch.equal(weight.detach(), master.detach().to(dtype))


@pytest.mark.parametrize("options", [{}, {"schedule": "breadth_first", "preserve": 10.0, "preserve_text": "shipped"}])
def test_an_edit_that_is_shrunk_is_won_by_less_change(settings: Any, options: dict[str, Any]) -> None:
    model, tok = load_model()
    requests = [{key: record[key] for key in ("prompt", "target_new")} for record in load_records()[:6]]
    change = {}
    for share in (0.0, 0.3):
        hparams = settings(optimizer="polyak", lr=1.5, objective="margin", margin=2.0, shrink=share, **options)
        edited, originals, traces = edit(model, tok, requests, hparams, copy=True)
        assert all(trace.converged for trace in traces)
        change[share] = (edited.get_parameter(PARAMETER) - originals[PARAMETER]).norm().item()
    assert change[0.3] < 0.95 * change[0.0]


def test_what_shrinking_cannot_be_is_named(settings: Any) -> None:
    with pytest.raises(HyperParamsError, match=r"shrink: 1.0 is not allowed; it must be at least 0 and less than 1"):
        settings(shrink=1.0)
    with pytest.raises(HyperParamsError, match=r"shrink_cycles: 3 is not allowed; it must be less than cycles, 3"):
        settings(shrink=0.3, cycles=3)
    settings(cycles=3)


@pytest.mark.parametrize("layers", [[4], [3, 4]])
def test_an_edit_by_polyak_steps_takes_a_few(llama: Any, settings: Any, layers: list[int]) -> None:
    model, tok = llama
    hparams = settings(optimizer="polyak", lr=1.5, objective="margin", margin=2.0, layers=layers)
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
    with pytest.raises(HyperParamsError, match=r"weight_decay: 0\.1 .* 0 where optimizer is not adam"):
        settings(optimizer="polyak", weight_decay=0.1)
