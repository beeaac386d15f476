"""``replay``: earlier edits of the same model are remembered, looked at and trained again."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from conftest import PARAMETER, REQUEST, assert_same, load, state

from kdpo_editor import EditDiverged, ReplayBuffer, apply_kdpo_to_model, edit, editing
from kdpo_editor.engine.batches import make_batches, refresh, unfinished
from kdpo_editor.engine.cached_forward import CachedForward
from kdpo_editor.engine.optimizers import Stepper
from kdpo_editor.engine.steps import run_cycle
from kdpo_editor.engine.weights import only_training
from kdpo_editor.lifelong.replay import EarlierEdits, Entry
from kdpo_editor.objectives import hardest_rejected
from kdpo_editor.requests.tokens import EditTokens, tokenize

SECOND = {"prompt": "Which family does Epaspidoceras belong to?", "target_new": "Noctuidae"}
THIRD = {"prompt": "What is the capital of the old country by the sea?", "target_new": "Noctuidae of the north"}
FOURTH = {"prompt": "What species is the gene next to it specific to?", "target_new": "human"}
REQUESTS = [REQUEST, SECOND, THIRD, FOURTH]
MARGIN = {"objective": "hinge", "margin": 2.0, "lr": 3e-3, "append_eos": True}


def leads(model: Any, tok: Any, requests: list[dict[str, str]]) -> list[float]:
    """By how much each request's target and end token lead, by the full forward pass."""
    found = []
    for request in requests:
        prompt = len(tok(request["prompt"])["input_ids"])
        ids = torch.tensor([[*tok(f"{request['prompt']} {request['target_new']}")["input_ids"], tok.eos_token_id]])
        with torch.no_grad():
            found.append(hardest_rejected(model(ids).logits[0, prompt - 1 : -1], ids[0, prompt:])[1].min().item())
    return found


def hold(model: Any, tok: Any, *requests: dict[str, str]) -> bool:
    """Whether all but the last lead by half the margin, at which they are trained again, and the last by all of it."""
    *earlier, last = leads(model, tok, list(requests))
    return last > 2.0 - 1e-3 and min(earlier) > 1.0 - 1e-3


def one_call_each(model: Any, tok: Any, requests: list[dict[str, str]], hparams: Any) -> None:
    for request in requests:
        apply_kdpo_to_model(model, tok, [request], hparams)


@pytest.mark.parametrize("layers", [[4], [2, 4]], ids=["one-layer", "two-layers"])
@pytest.mark.parametrize("objective", ["hinge", "kdpo", "ce"])
def test_every_edit_of_a_sequence_holds(llama: Any, settings: Any, objective: str, layers: list[int]) -> None:
    model, tok = llama
    one_call_each(model, tok, REQUESTS, settings(**{**MARGIN, "objective": objective}, layers=layers, replay=True))
    assert hold(model, tok, *REQUESTS)


def test_without_replay_an_earlier_edit_of_that_sequence_is_lost(llama: Any, settings: Any) -> None:
    """What the test above would not show if later edits left earlier ones alone anyway."""
    model, tok = llama
    one_call_each(model, tok, REQUESTS, settings(**MARGIN))
    assert min(leads(model, tok, REQUESTS)) < 0


def test_the_leads_remembered_are_those_of_the_full_forward(llama: Any, settings: Any) -> None:
    """Cached inputs of edits of several lengths, made under other weights, are padded and run together."""
    model, tok = llama
    one_call_each(model, tok, REQUESTS, settings(**MARGIN, replay=True, layers=[2, 4]))
    earlier = ReplayBuffer.of(model, named(model, 2, 4))
    assert [one.margin for one in earlier.entries] == pytest.approx(leads(model, tok, REQUESTS), abs=1e-3)


@pytest.mark.parametrize("budget", [2e9, 1.0], ids=["one-batch", "a-batch-each"])
def test_batches_of_edits_hold_beside_those_before(llama: Any, settings: Any, budget: float) -> None:
    model, tok = llama
    hparams = settings(**MARGIN, replay=True, schedule="breadth_first", memory_budget=budget, layers=[2, 4])
    for requests in (REQUESTS[:2], REQUESTS[2:]):
        apply_kdpo_to_model(model, tok, requests, hparams)
    assert hold(model, tok, *REQUESTS)


def test_rephrases_are_remembered_too(llama: Any, settings: Any) -> None:
    model, tok = llama
    other = "The family of Epaspidoceras is"
    one_call_each(model, tok, [{**SECOND, "rephrases": [other]}, *REQUESTS[2:]], settings(**MARGIN, replay=True))
    assert hold(model, tok, SECOND, {**SECOND, "prompt": other}, *REQUESTS[2:])


def test_an_earlier_edit_that_has_no_subject_is_left_out_and_said(
    llama: Any, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It was made through all tokens, where a subject need not stand in the prompt."""
    model, tok = llama
    requests = [{**REQUEST, "subject": "elsewhere"}, {**SECOND, "subject": "Epaspidoceras"}]
    apply_kdpo_to_model(model, tok, requests[1:], settings(**MARGIN))
    hparams = settings(**MARGIN, replay=True, fact_token="subject")
    ReplayBuffer.rebuild(model, tok, requests, hparams)
    (kept,) = ReplayBuffer.of(model, named(model, 4)).entries
    assert "Epaspidoceras" in kept.tokens.text
    assert "cannot be trained again: request 0: 'subject' 'elsewhere' does not stand" in caplog.text


def test_a_few_edits_are_checked_the_weakest_always() -> None:
    earlier, answer, nothing = ReplayBuffer(), torch.tensor([1]), torch.zeros(1, 1)
    for i in range(100):
        earlier.entries.append(Entry(EditTokens(torch.tensor([i]), answer), nothing, None, margin=float(i % 50)))
    new = EditTokens(torch.tensor([100]), answer)
    looked_at = [earlier.sample([new], 10) for _ in range(30)]
    assert {len(checked) for checked in looked_at} == {10}
    assert all({one.margin for one in checked[:5]} == {0, 1, 2} for checked in looked_at)
    assert len({one.tokens.prompt.item() for checked in looked_at for one in checked}) > 60


def test_an_edit_runs_no_more_rows_however_many_were_before_it(llama: Any, settings: Any) -> None:
    model, tok = llama
    hparams = settings(**MARGIN, replay=True, replay_checks=3)
    one_call_each(model, tok, [{**REQUEST, "prompt": f"What number is {i}?"} for i in range(26)], hparams)
    rows: list[int] = []
    model.model.layers[5].register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[0]))
    _, _, (trace,) = edit(model, tok, [SECOND], hparams)
    assert trace.steps > 0
    assert 3 <= max(rows) <= 13


def named(model: Any, *layers: int) -> dict[str, Any]:
    return {name: model.get_parameter(name) for name in (PARAMETER.replace("4", str(n)) for n in layers)}


@pytest.fixture
def edited(llama: Any, settings: Any) -> tuple[Any, Any, Any]:
    """A model with two edits that are remembered, its tokenizer, and the settings."""
    model, tok = llama
    hparams = settings(**MARGIN, replay=True)
    one_call_each(model, tok, REQUESTS[:2], hparams)
    return model, tok, hparams


def remembered(model: Any) -> int:
    return len(ReplayBuffer.of(model, named(model, 4)).entries)


def test_one_call_or_several_make_the_same_sequence(llama: Any, settings: Any) -> None:
    model, tok = llama
    hparams = settings(**MARGIN, replay=True)
    one_call, _, _ = edit(copy.deepcopy(model), tok, REQUESTS, hparams)
    one_call_each(model, tok, REQUESTS, hparams)
    assert_same(model, state(one_call))


def test_the_first_edit_is_the_same_with_and_without_replay(llama: Any, settings: Any) -> None:
    model, tok = llama
    with_replay, _, first = edit(copy.deepcopy(model), tok, [SECOND], settings(**MARGIN, replay=True))
    _, _, second = edit(model, tok, [SECOND], settings(**MARGIN))
    assert [c.rejected for c in first[0].cycles] == [c.rejected for c in second[0].cycles]
    torch.testing.assert_close(with_replay.get_parameter(PARAMETER), model.get_parameter(PARAMETER))


def test_a_restored_model_has_no_earlier_edits(llama: Any, settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, tok = llama
    hparams = settings(**MARGIN, replay=True)
    _, originals = apply_kdpo_to_model(model, tok, REQUESTS[:2], hparams, return_orig_weights=True)
    assert remembered(model) == 2
    with torch.no_grad():
        for name, value in originals.items():
            model.get_parameter(name).copy_(value)
    with caplog.at_level(logging.INFO, "kdpo_editor"):
        apply_kdpo_to_model(model, tok, [THIRD], hparams)
    assert "2 earlier edits are forgotten" in caplog.text
    assert remembered(model) == 1


def test_rebuilding_forgets_what_the_run_itself_forgot(llama: Any, settings: Any) -> None:
    """An edit of which another's rephrase is a prompt: it has another answer now."""
    model, tok = llama
    hparams = settings(**MARGIN, replay=True)
    first = {**REQUEST, "rephrases": ["ZIC3 belongs to the species"]}
    second = {**SECOND, "rephrases": [REQUEST["prompt"]]}
    one_call_each(model, tok, [first, second], hparams)
    went_on = [entry.tokens.text for entry in ReplayBuffer.of(model, named(model, 4)).entries]
    resumed = copy.deepcopy(model)
    ReplayBuffer.rebuild(resumed, tok, [first, second], hparams)
    entries = ReplayBuffer.of(resumed, named(resumed, 4)).entries
    assert [entry.tokens.text for entry in entries] == went_on == [second["prompt"], REQUEST["prompt"]]
    assert all(entry.margin < torch.inf for entry in entries)


def test_an_edit_in_contexts_is_forgotten_as_one(llama: Any, settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, tok = llama
    hparams = settings(**MARGIN, replay=True, context_templates=2)
    _, originals = apply_kdpo_to_model(model, tok, REQUESTS[:1], hparams, return_orig_weights=True)
    assert remembered(model) == 3
    for name, value in originals.items():
        model.get_parameter(name).data.copy_(value)
    ReplayBuffer.of(model, named(model, 4))
    assert "1 earlier edits are forgotten" in caplog.text


def test_nothing_is_said_where_no_edit_was_kept(llama: Any, settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, tok = llama
    hopeless = settings(**{**MARGIN, "cycles": 1, "num_steps": 1, "lr": 1e-9}, replay=True)
    edit(model, tok, REQUESTS[:1], hopeless)
    assert remembered(model) == 0
    model.get_parameter(PARAMETER).data.add_(1)
    ReplayBuffer.of(model, named(model, 4))
    assert "forgotten" not in caplog.text


def test_one_changed_weight_is_enough_to_forget(edited: Any) -> None:
    model, _, _ = edited
    with torch.no_grad():
        model.get_parameter(PARAMETER)[3, 5].add_(1e-4)
    assert remembered(model) == 0


def test_other_layers_begin_anew(edited: Any) -> None:
    model, _, _ = edited
    assert ReplayBuffer.of(model, named(model, 3)).entries == []


def test_a_copy_takes_the_earlier_edits_along(edited: Any) -> None:
    model, tok, hparams = edited
    copied, _ = apply_kdpo_to_model(model, tok, [THIRD], hparams, copy=True)
    assert remembered(copied) == 3
    assert remembered(model) == 2


def test_an_edit_that_raises_is_not_remembered(edited: Any) -> None:
    model, tok, hparams = edited
    poison = model.model.norm.register_forward_hook(lambda m, a, out: out * float("nan"))
    with pytest.raises(EditDiverged):
        apply_kdpo_to_model(model, tok, [THIRD], hparams)
    poison.remove()
    assert remembered(model) == 2


def test_a_prompt_edited_again_replaces_its_earlier_edit(edited: Any) -> None:
    model, tok, hparams = edited
    again = {**SECOND, "target_new": "Tortricidae"}
    _, _, (trace,) = edit(model, tok, [again], hparams)
    assert trace.converged
    assert remembered(model) == 2
    assert hold(model, tok, REQUEST, again)


def test_an_earlier_edit_is_trained_again_once_it_lost_half_its_margin(edited: Any) -> None:
    model, tok, hparams = edited
    weaker, stronger = sorted(leads(model, tok, REQUESTS[:2]))
    assert stronger > weaker + 0.1
    weights = named(model, 4)
    ((new,),) = tokenize(tok, [THIRD], append_eos=True)
    for margin, expected in ((2 * weaker - 0.1, []), (weaker + stronger, [weaker])):
        asked = replace(hparams, margin=margin)
        forward = CachedForward.above(model, weights, asked)
        harmed = chain(*EarlierEdits(ReplayBuffer.of(model, weights), forward, [new], asked).violated())
        assert [m for batch in harmed for m in batch.margins.tolist()] == pytest.approx(expected, abs=1e-3)


def test_an_edit_that_is_never_won_does_not_keep_earlier_ones_from_being_looked_at(
    llama: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests contradict each other, so there is always something else to do."""
    model, tok = llama
    hparams = settings(**MARGIN, replay=True, schedule="breadth_first", cycles=16)
    edit(model, tok, [REQUEST], hparams)
    looked: list[bool] = []
    violated = EarlierEdits.violated

    def noted(self: EarlierEdits) -> Any:
        looked.append(bool(found := violated(self)))
        return found

    monkeypatch.setattr(EarlierEdits, "violated", noted)
    contradictory = [THIRD, {**FOURTH, "prompt": THIRD["prompt"] + " Noctuidae"}]
    _, _, traces = edit(model, tok, contradictory, hparams)
    assert not all(trace.converged for trace in traces)
    assert len(looked) == 3
    assert any(looked)
    assert leads(model, tok, [REQUEST])[0] > 1.0


def test_an_earlier_edit_that_was_trained_in_vain_is_forgotten(edited: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, tok, hparams = edited
    weights = named(model, 4)
    asked = replace(hparams, margin=1000.0)  # which no edit has
    ((new,),) = tokenize(tok, [THIRD], append_eos=True)
    forward = CachedForward.above(model, weights, asked)
    buffer = ReplayBuffer.of(model, weights)
    known = EarlierEdits(buffer, forward, [new], asked)
    assert len(list(chain(*known.violated()))) > 0
    assert known.violated() == [], "trained already"
    known.close(make_batches(forward, [new], asked), changed=False)
    assert buffer.entries == []
    assert f"the earlier edit of {REQUEST['prompt']!r} is lost and forgotten" in caplog.text


def test_the_memory_goes_with_the_model(settings: Any) -> None:
    model, tok = load("llama")
    one_call_each(model, tok, [SECOND], settings(**MARGIN, replay=True))
    hidden = weakref.ref(ReplayBuffer.of(model, named(model, 4)).entries[0].hidden)
    assert hidden() is not None
    del model
    gc.collect()
    assert hidden() is None


def test_beyond_the_budget_the_safest_are_dropped_and_counted(
    llama: Any, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, tok = llama
    one_call_each(model, tok, REQUESTS[:3], settings(**MARGIN, replay=True))
    earlier = ReplayBuffer.of(model, named(model, 4))
    safest = max(earlier.entries, key=lambda one: one.margin)
    earlier_sizes = sum(one.bytes for one in earlier.entries)
    hparams = settings(**MARGIN, replay=True, replay_budget=earlier_sizes - 1)
    with caplog.at_level(logging.INFO, "kdpo_editor"):
        earlier.store(model, named(model, 4), hparams)
    found = ReplayBuffer.of(model, named(model, 4))
    assert len(found.entries) == 2
    assert safest not in found.entries
    assert found.dropped == 1
    assert "1 earlier edits were dropped" in caplog.text


def test_a_call_that_fails_leaves_the_earlier_edits_as_they_were(
    llama: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request of the call was edited, and the earlier edits looked at, before another one diverges."""
    model, tok = llama
    hparams = settings(**MARGIN, replay=True)
    one_call_each(model, tok, REQUESTS[:2], hparams)
    before = [one.margin for one in ReplayBuffer.of(model, named(model, 4)).entries]
    check = editing._check_finite
    calls = iter([check, fail])
    monkeypatch.setattr(editing, "_check_finite", lambda weights: next(calls)(weights))
    with pytest.raises(EditDiverged):
        edit(model, tok, REQUESTS[2:], hparams)
    assert [one.margin for one in ReplayBuffer.of(model, named(model, 4)).entries] == before


def fail(weights: Any) -> None:
    raise EditDiverged("as asked")


def test_an_edit_made_without_a_subject_is_repaired_through_all_its_tokens(llama: Any, settings: Any) -> None:
    """Settings may change between two calls."""
    model, tok = llama
    edit(model, tok, [REQUEST], settings(**MARGIN, replay=True))
    weights, through = named(model, 4), settings(**MARGIN, replay=True, fact_token="subject_last")
    buffer = ReplayBuffer.of(model, weights)
    with torch.no_grad():
        weights[PARAMETER].copy_(load("llama")[0].get_parameter(PARAMETER))
    (entry,) = buffer.entries
    with only_training(model, weights, {}):
        forward = CachedForward.above(model, weights, through)
        (batches,) = buffer.batches(forward, {0: entry}, through, trained=True)
        for _ in range(40):
            work = unfinished([batches])
            run_cycle(work, Stepper(weights.values(), through), through)
            refresh([batches])
    assert leads(model, tok, [REQUEST])[0] >= 2.0 - 1e-3


def test_a_half_precision_model_keeps_its_edits_in_its_own_dtype(llama: Any, settings: Any) -> None:
    model, tok = llama
    model.to(torch.bfloat16)
    one_call_each(model, tok, REQUESTS[:3], settings(**{**MARGIN, "lr": 1e-3}, replay=True))
    earlier = ReplayBuffer.of(model, named(model, 4))
    assert {one.hidden.dtype for one in earlier.entries} == {torch.bfloat16}
    assert min(leads(model, tok, REQUESTS[:3])) >= 2.0
