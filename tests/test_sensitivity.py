"""The shares that several matrices have in a step: how much predictions depend on what each puts out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import PARAMETER, assert_same, state
from test_cached_forward import ARCHITECTURES, tiny

from kdpo_editor import ModelError
from kdpo_editor.lifelong.preconditioning import LEAST, damping, preconditioners, shares
from kdpo_editor.lifelong.second_moments import Spectrum, spectra
from kdpo_editor.lifelong.sensitivity import sensitivities

EARLY = PARAMETER.replace("4", "1")
NAMES = [name.removesuffix(".weight") for name in (EARLY, PARAMETER)]
WINDOWS = [torch.arange(5, 14), torch.tensor([3, 70, 20]), torch.tensor([9, 8])]


def spectrum(mean: float, sensitivity: float) -> Spectrum:
    return Spectrum.of(mean * torch.eye(6), sensitivity=sensitivity)


def by_hand(model: Any, name: str) -> float:
    """The gradients of a summand of the module's output, which is zero."""
    squares = []
    for ids in WINDOWS:
        summand = torch.zeros(len(ids), model.config.hidden_size, requires_grad=True)
        handle = model.get_submodule(name).register_forward_hook(
            lambda _, __, out, added=summand: out + added.view_as(out)
        )
        said = model(ids[None]).logits[0].log_softmax(-1)
        handle.remove()
        loss = -sum(said[i, ids[i + 1]] for i in range(len(ids) - 1))
        squares.append(torch.autograd.grad(loss, summand)[0][1:].square().mean(-1))
    return float(torch.cat(squares).mean())


def test_they_are_mean_squares_of_the_gradients_at_outputs(llama: Any) -> None:
    model, _ = llama
    found = sensitivities(model, NAMES, WINDOWS)
    assert found.keys() == set(NAMES)
    for name, value in found.items():
        assert value == pytest.approx(by_hand(model, name), rel=1e-4)


@pytest.mark.parametrize(
    "name", [name for name, (_, _, matrix, _, _) in ARCHITECTURES.items() if "experts." not in matrix]
)
def test_they_are_found_in_every_architecture(name: str) -> None:
    """Falcon adds to a matrix's output in place."""
    model, blocks, matrix = tiny(name)
    names = [f"{blocks}.{layer}.{matrix}" for layer in (1, 2)]
    for module, value in sensitivities(model, names, WINDOWS).items():
        assert value == pytest.approx(by_hand(model, module), rel=1e-3)


def test_the_model_is_left_as_it_was_found(llama: Any) -> None:
    model, _ = llama
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    model.train()
    with torch.no_grad():
        sensitivities(model, NAMES, WINDOWS)
    assert model.training
    assert_same(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(model.get_submodule(name)._forward_hooks for name in NAMES)


def test_gradients_that_are_not_finite_are_an_error(llama: Any) -> None:
    model, _ = llama
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match=f"gradients at the outputs of {NAMES[0]} are not finite"):
        sensitivities(model, NAMES, WINDOWS)


def test_a_step_is_as_long_as_it_is_harmless() -> None:
    given = [spectrum(1.0, 8e-4), spectrum(0.5, 2e-4), spectrum(2.0, 1e-4)]
    found = torch.tensor(shares(given))
    harms = torch.tensor([8e-4, 1e-4, 2e-4])
    torch.testing.assert_close(found.square() * harms, (found.square() * harms)[:1].expand(3))
    torch.testing.assert_close(found.prod(), torch.tensor(1.0))


def test_a_single_matrix_has_all_of_a_step() -> None:
    assert shares([spectrum(3.0, 5e-3)]) == pytest.approx([1.0])


def test_no_share_is_without_bound() -> None:
    assert shares([spectrum(1.0, 0.0), spectrum(1.0, 1.0)]) == pytest.approx([LEAST**-0.25, LEAST**0.25])
    assert shares([spectrum(1.0, 0.0), spectrum(1.0, 0.0)]) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("rank", [2, 12])
def test_a_share_is_a_factor(rank: int) -> None:
    keys = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    moments, rows = keys.T @ keys, torch.ones(3, 12)
    whole, part = (damping(Spectrum.of(moments, rank), 3.0, rows, share) for share in (1.0, 0.25))
    torch.testing.assert_close(part(rows), whole(rows) / 4)


def test_each_matrix_of_an_edit_has_its_share(llama: Any, settings: Any, text: str) -> None:
    model, tok = llama
    names = [EARLY, PARAMETER]
    made = preconditioners(
        model, tok, {n: model.get_parameter(n) for n in names}, settings(mom2_weight=10.0, mom2_dataset=text)
    )
    found = spectra(model, tok, names, text, settings().mom2_n_samples)
    each = shares([found[name] for name in names])
    assert abs(each[0] - each[1]) > 0.01
    for name, share, preconditioner in zip(names, each, made, strict=True):
        weight = model.get_parameter(name)
        inputs = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
        alone = damping(found[name], 10.0, weight)
        torch.testing.assert_close(preconditioner.before(inputs), share * alone(inputs))
