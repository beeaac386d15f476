"""Of many edits, a request's phrasings take turns; products of steps may be in bfloat16."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from conftest import REQUEST, assert_same, state

from kdpo_editor import HyperParamsError, KDPOHyperParams, edit
from kdpo_editor.engine import half_products
from kdpo_editor.engine.batches import footprint, lost, make_batches
from kdpo_editor.engine.cached_forward import CachedForward
from kdpo_editor.engine.grouping import Footprint
from kdpo_editor.engine.weights import find_matrices, only_training
from kdpo_editor.lifelong import loop
from kdpo_editor.lifelong.loop import kdpo_l
from kdpo_editor.lifelong.preconditioning import preconditioned, preconditioners
from kdpo_editor.requests.tokens import tokenize

REQUESTS = [
    {**REQUEST, "rephrases": ["Tell me. What species is ZIC3 specific to?", "ZIC3 is specific to which species?"]},
    {
        "prompt": "Which family does Epaspidoceras belong to?",
        "target_new": "Noctuidae",
        "rephrases": ["Say it. Which family does Epaspidoceras belong to?", "Epaspidoceras is of which family?"],
    },
]
LINEAR = {"objective": "hinge", "margin": 2.0, "optimizer": "polyak", "lr": 1.2}


def trained(
    monkeypatch: pytest.MonkeyPatch, model: Any, tok: Any, hparams: KDPOHyperParams, lazy_from: int
) -> list[tuple[list[int], float]]:
    """Which phrasings each cycle trained, and how long its steps could be."""
    cycles: list[tuple[list[int], float]] = []
    run = loop.run_cycle

    def noted(minibatches: Any, stepper: Any, hparams: KDPOHyperParams) -> None:
        cycles.append((sorted(m for pairs in chain(*minibatches) for m in pairs.members), stepper.longest))
        run(minibatches, stepper, hparams)

    monkeypatch.setattr(loop, "run_cycle", noted)
    monkeypatch.setattr(loop, "LAZY_FROM", lazy_from)
    weights = find_matrices(model, hparams)
    edits = [*chain(*tokenize(tok, REQUESTS))]
    with only_training(model, weights, {name: w.detach().clone() for name, w in weights.items()}):
        forward = CachedForward.above(model, weights, hparams)
        traces = kdpo_l(forward, weights, edits, hparams)
    assert all(trace.converged for trace in traces)
    return cycles


def test_phrasings_take_turns_where_there_are_many(llama: Any, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each request's three at a time, in turn, until all hold."""
    cycles = trained(monkeypatch, *llama, settings(**LINEAR, num_steps=1, cycles=80), lazy_from=2)
    assert [members for members, _ in cycles[:3]] == [[0, 3], [1, 4], [2, 5]]
    assert all(len(members) <= 2 for members, _ in cycles)


def test_those_left_share_the_places_of_those_that_are_won(
    llama: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four places for two requests are two each."""
    cycles = trained(monkeypatch, *llama, settings(**LINEAR, num_steps=1, cycles=80), lazy_from=4)
    assert [members for members, _ in cycles[:3]] == [[0, 1, 3, 4], [0, 2, 3, 5], [1, 2, 4, 5]]


def test_the_bound_of_a_step_is_that_of_what_is_trained(
    llama: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of what waits for its turn: the optimiser takes the root of the number of losses."""
    hparams = settings(**LINEAR, num_steps=1, cycles=80)
    before = state(llama[0])
    one_of_three = trained(monkeypatch, *llama, hparams, lazy_from=2)[0][1]
    llama[0].load_state_dict(before)
    assert one_of_three == trained(monkeypatch, *llama, hparams, lazy_from=7)[0][1] < 100


@pytest.mark.parametrize("cycles", [1, 2, 5, 7, 10, 19, 160])
def test_there_are_four_quarters_of_any_number_of_cycles_at_most(settings: Any, cycles: int) -> None:
    """So the bound of a step is doubled three times at most."""
    assert (cycles - 1) // loop.Work([], [], settings(**LINEAR, cycles=cycles)).patience <= 3


def test_few_edits_are_trained_in_all_their_phrasings(
    llama: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cycles = trained(monkeypatch, *llama, settings(**LINEAR, num_steps=1, cycles=80), lazy_from=7)
    assert cycles[0][0] == [0, 1, 2, 3, 4, 5]


def test_what_a_graph_takes_does_not_count_the_matrices_that_it_holds(llama: Any, settings: Any, text: str) -> None:
    """Preconditioning multiplies by matrices that are no parameters of the model."""
    model, tok = llama
    hparams = settings(**LINEAR, layers=[2, 4], mom2_weight=10.0, mom2_dataset=text)
    weights = find_matrices(model, hparams)
    (edits,) = tokenize(tok, [REQUEST])
    found: list[Footprint] = []
    with only_training(model, weights, {}):
        for spared in ([], preconditioners(model, tok, weights, hparams)):
            forward = CachedForward.above(model, weights, hparams)
            forward.findings.known.clear()
            with preconditioned(model, weights, spared):
                found.append(footprint(forward, edits))
    plain, spared_too = found
    assert plain.graph == spared_too.graph > 0


def test_an_edit_whose_logits_are_nan_is_lost(llama: Any, settings: Any) -> None:
    model, tok = llama
    hparams = settings(**LINEAR)
    weights = find_matrices(model, hparams)
    (edits,) = tokenize(tok, [REQUEST])
    with torch.no_grad():
        for weight in weights.values():
            weight.fill_(3e38)  # finite, as no check of the weights alone would find
        batches = make_batches(CachedForward.above(model, weights, hparams), edits, hparams)
        assert lost(batches) == [0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_products_in_bfloat16_give_an_edit_alike(request: pytest.FixtureRequest, settings: Any, name: str) -> None:
    changes = []
    for bf16 in (False, True):
        model, tok = request.getfixturevalue(name)
        module = {} if name == "llama" else {"rewrite_module_tmp": "transformer.h.{}.mlp.c_proj", "layers": [2]}
        before = state(model)
        _, originals, traces = edit(model, tok, REQUESTS[:1], settings(**LINEAR, **module, bf16=bf16))
        assert traces[0].converged
        assert not any("forward" in each.__dict__ for each in model.modules())
        ((weight, start),) = ((dict(model.named_parameters())[key], value) for key, value in originals.items())
        assert weight.dtype == torch.float32
        changes.append((weight - start).detach().clone())
        model.load_state_dict(before)
    assert not torch.equal(*changes)
    assert torch.nn.functional.cosine_similarity(*(change.flatten() for change in changes), dim=0) > 0.98


@pytest.mark.parametrize("there", [False, True])
def test_null_asks_the_processor(llama: Any, settings: Any, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    model, tok = llama
    before = state(model)
    monkeypatch.setattr(half_products, "pay", lambda device: there)
    edit(model, tok, REQUESTS[:1], settings(**LINEAR, bf16=None))
    found = state(model)
    model.load_state_dict(before)
    edit(model, tok, REQUESTS[:1], settings(**LINEAR, bf16=there))
    assert_same(model, found)


def test_a_model_in_half_precision_is_left_as_it_is(llama: Any, settings: Any) -> None:
    model, tok = llama
    model = model.to(torch.bfloat16)
    before = state(model)
    edit(model, tok, REQUESTS[:1], settings(**LINEAR))
    found = state(model)
    model.load_state_dict(before)
    edit(model, tok, REQUESTS[:1], settings(**LINEAR, bf16=True))
    assert_same(model, found)


def test_the_ablation_has_no_products_in_bfloat16(settings: Any) -> None:
    with pytest.raises(HyperParamsError, match=r"bf16: True is not allowed; it must be False where objective is dpo"):
        settings(objective="dpo", bf16=True)
