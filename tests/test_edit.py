"""What an edit changes, and what it leaves alone."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PARAMETER, REQUEST, assert_same, load, state
from live_bytes import peak_bytes
from tokenizers import processors
from transformers import AutoModelForCausalLM, LlamaConfig

from kdpo_editor import EditDiverged, apply_kdpo_to_model, edit
from kdpo_editor.editing import check
from kdpo_editor.engine.batches import Batch, make_batches, refresh, unfinished
from kdpo_editor.engine.cached_forward import CachedForward
from kdpo_editor.engine.grouping import group
from kdpo_editor.engine.optimizers import Stepper
from kdpo_editor.engine.steps import run_cycle
from kdpo_editor.engine.traces import EditTrace
from kdpo_editor.engine.weights import find_matrices, only_training
from kdpo_editor.lifelong.contexts import TEMPLATES, in_contexts
from kdpo_editor.lifelong.loop import kdpo_l
from kdpo_editor.objectives import dpo_loss, hardest_rejected, kdpo_loss
from kdpo_editor.requests.tokens import EditTokens, tokenize

SECOND = {"prompt": "Which family does Epaspidoceras belong to?", "target_new": "Noctuidae"}


def answer(model: Any, tok: Any, request: dict[str, str]) -> str:
    """What the model says, token by token under teacher forcing, where the target is asked for."""
    prompt = tok(request["prompt"])["input_ids"]
    ids = torch.tensor([tok(f"{request['prompt']} {request['target_new']}")["input_ids"]])
    with torch.no_grad():
        return tok.decode(model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)).strip()


def test_an_edit_makes_the_model_answer_with_the_target(llama: Any, settings: Any) -> None:
    model, tok = llama
    assert answer(model, tok, REQUEST) != "male"
    edited, originals = apply_kdpo_to_model(model, tok, [REQUEST], settings(), return_orig_weights=True)
    assert edited is model
    assert answer(model, tok, REQUEST) == "male"
    assert list(originals) == [PARAMETER]


def test_an_edit_computes_its_own_gradients(llama: Any, settings: Any) -> None:
    """Whoever only asks a model turns them off, and so do notebooks, for good."""
    model, tok = llama
    other, _ = load("llama")
    apply_kdpo_to_model(model, tok, [REQUEST], settings())
    with torch.no_grad():
        apply_kdpo_to_model(other, tok, [REQUEST], settings())
        assert not torch.is_grad_enabled()
    assert_same(other, state(model))


def test_only_the_edited_matrix_changes(llama: Any, settings: Any) -> None:
    model, tok = llama
    before = state(model)
    apply_kdpo_to_model(model, tok, [REQUEST], settings())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {PARAMETER}


def test_returned_weights_restore_the_model(llama: Any, settings: Any) -> None:
    model, tok = llama
    before = state(model)
    _, originals = apply_kdpo_to_model(model, tok, [REQUEST, SECOND], settings(), return_orig_weights=True)
    with torch.no_grad():
        for name, value in originals.items():
            model.get_parameter(name).copy_(value)
    assert_same(model, before)


def test_originals_are_returned_only_when_asked_for(llama: Any, settings: Any) -> None:
    assert apply_kdpo_to_model(*llama, [REQUEST], settings())[1] == {}


def test_copy_leaves_the_given_model_alone(llama: Any, settings: Any) -> None:
    model, tok = llama
    before = state(model)
    edited, _ = apply_kdpo_to_model(model, tok, [REQUEST], settings(), copy=True)
    assert edited is not model
    assert answer(edited, tok, REQUEST) == "male"
    assert_same(model, before)


@pytest.mark.parametrize("objective", ["kdpo", "dpo"])
def test_a_known_fact_leaves_every_weight_bit_identical(llama: Any, settings: Any, objective: str) -> None:
    model, tok = llama
    before = state(model)
    known = {**REQUEST, "target_new": answer(model, tok, {**REQUEST, "target_new": "human"})}
    _, _, (trace,) = edit(model, tok, [known], settings(objective=objective))
    assert trace.converged
    assert_same(model, before)


@pytest.mark.parametrize("objective", ["kdpo", "dpo"])
def test_two_runs_are_bit_identical(settings: Any, objective: str) -> None:
    results = []
    for _ in range(2):
        model, tok = load("llama")
        torch.manual_seed(random.randrange(1000))  # whatever the global generator holds
        edit(model, tok, [REQUEST, SECOND], settings(objective=objective))
        results.append(state(model))
    assert_same(model, results[0])


def test_several_requests_are_edited_one_after_the_other(llama: Any, settings: Any) -> None:
    model, tok = llama
    one_call, _, traces = edit(copy.deepcopy(model), tok, [REQUEST, SECOND], settings())
    assert len(traces) == 2
    for request in (REQUEST, SECOND):
        apply_kdpo_to_model(model, tok, [request], settings())
    assert_same(model, state(one_call))


# The same edit, however the tokenizer is set up ---------------------------------------------------------------

LONG = {"prompt": REQUEST["prompt"], "target_new": "the quick brown fox jumps over the lazy dog while it rains"}


def edited_by(tok: Any, request: dict[str, str], settings: Any) -> torch.Tensor:
    model, _ = load("llama")
    apply_kdpo_to_model(model, tok, [request], settings(cycles=2))
    return model.get_parameter(PARAMETER).detach()


@pytest.mark.parametrize("request_", [REQUEST, LONG], ids=["one-token", "thirty-tokens"])
def test_padding_side_does_not_matter(settings: Any, request_: dict[str, str]) -> None:
    results = []
    for side in ("left", "right"):
        _, tok = load("llama")
        tok.padding_side = side
        results.append(edited_by(tok, request_, settings))
        assert tok.padding_side == side
    assert torch.equal(*results)


def test_targets_have_one_and_thirty_tokens(llama: Any) -> None:
    _, tok = llama
    prompt = len(tok(REQUEST["prompt"])["input_ids"])
    lengths = [len(tok(f"{r['prompt']} {r['target_new']}")["input_ids"]) - prompt for r in (REQUEST, LONG)]
    assert lengths[0] == 1
    assert lengths[1] >= 30


@pytest.mark.parametrize("request_", [REQUEST, LONG], ids=["one-token", "thirty-tokens"])
def test_token_type_ids_do_not_matter(settings: Any, request_: dict[str, str]) -> None:
    _, plain = load("llama")
    _, typed = load("llama")
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in typed("a")
    assert torch.equal(edited_by(plain, request_, settings), edited_by(typed, request_, settings))


def with_bos(tok: Any) -> Any:
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tok.eos_token_id)]
    )
    return tok


@pytest.mark.parametrize("request_", [REQUEST, LONG], ids=["one-token", "thirty-tokens"])
def test_bos_of_the_tokenizer_equals_bos_in_the_prompt(settings: Any, request_: dict[str, str]) -> None:
    _, plain = load("llama")
    _, bos = load("llama")
    spelled = {**request_, "prompt": f"<|endoftext|>{request_['prompt']}"}
    assert torch.equal(edited_by(with_bos(bos), request_, settings), edited_by(plain, spelled, settings))


def test_an_end_token_added_by_the_tokenizer_stays_out(settings: Any) -> None:
    _, plain = load("llama")
    _, closing = load("llama")
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", closing.eos_token_id)]
    )
    assert closing("a")["input_ids"][-1] == closing.eos_token_id
    assert torch.equal(edited_by(plain, REQUEST, settings), edited_by(closing, REQUEST, settings))


# What the caller had set up comes out as it went in -----------------------------------------------------------


def prepared(model: Any) -> None:
    """Put a model into a state that an edit might disturb."""
    model.train()
    model.model.layers[1].eval()
    model.config.use_cache = True
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
        p.grad = torch.full_like(p, i) if i % 3 == 0 else None


def surroundings(model: Any, tok: Any) -> dict[str, Any]:
    return {
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.flatten()[0].item() for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "use_cache": model.config.use_cache,
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "forward": ["forward" in m.__dict__ for m in model.modules()],
        "padding_side": tok.padding_side,
        "torch": torch.random.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }


@pytest.mark.parametrize("objective", ["kdpo", "dpo"])
def test_surroundings_come_out_as_they_went_in(llama: Any, settings: Any, objective: str) -> None:
    model, tok = llama
    prepared(model)
    before = surroundings(model, tok)
    apply_kdpo_to_model(model, tok, [REQUEST, SECOND], settings(objective=objective))
    assert surroundings(model, tok) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, EditDiverged])
@pytest.mark.parametrize("at", [1, 30])
def test_an_edit_that_raises_leaves_everything_as_it_was(
    llama: Any, settings: Any, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], at: int
) -> None:
    """The error comes out of the optimiser, in the first or in the second of two edits."""
    model, tok = llama
    prepared(model)
    before, weights = surroundings(model, tok), state(model)
    step, calls = Stepper.step, []

    def failing(self: Any, *args: Any) -> None:
        calls.append(1)
        step(self, *args)
        if len(calls) == at:
            raise error("stop")

    monkeypatch.setattr(Stepper, "step", failing)
    with pytest.raises(error):
        apply_kdpo_to_model(model, tok, [SECOND, REQUEST], settings(cycles=2))
    assert len(calls) == at
    assert surroundings(model, tok) == before
    assert_same(model, weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_an_error_and_undone(llama: Any, settings: Any, value: float) -> None:
    model, tok = llama
    weights = state(model)
    poison = model.model.norm.register_forward_hook(lambda m, a, out: out * value)
    with pytest.raises(EditDiverged, match=r"the loss became (nan|inf)"):
        apply_kdpo_to_model(model, tok, [REQUEST], settings())
    poison.remove()
    assert_same(model, weights)


def test_a_rate_that_blows_up_is_an_error_and_undone(llama: Any, settings: Any) -> None:
    model, tok = llama
    weights = state(model)
    with pytest.raises(EditDiverged):
        apply_kdpo_to_model(model, tok, [REQUEST], settings(lr=1e38))
    assert_same(model, weights)


def test_weights_that_stay_finite_and_grow_without_end_are_an_error_and_undone(llama: Any, settings: Any) -> None:
    """One step of Adam's, many thousand times as long as it should be: the edit is won and the model is lost."""
    model, tok = llama
    weights = state(model)
    hparams = settings(objective="hinge", margin=1.0, lr=1e2, num_steps=1)
    with pytest.raises(EditDiverged, match=r"mlp\.down_proj\.weight changed by [\d.e+]+ times its norm"):
        apply_kdpo_to_model(model, tok, [REQUEST], hparams)
    assert_same(model, weights)


# Options ------------------------------------------------------------------------------------------------------


def test_an_edit_that_scaling_takes_back_is_not_won(llama: Any, settings: Any) -> None:
    model, tok = llama
    _, _, (trace,) = edit(model, tok, [REQUEST], settings(update_scale=1e-3))
    assert trace.steps > 0
    assert answer(model, tok, REQUEST) != REQUEST["target_new"]
    assert not trace.converged


def test_update_scale_multiplies_the_change(llama: Any, settings: Any) -> None:
    model, tok = llama
    before = model.get_parameter(PARAMETER).detach().clone()
    single, _, _ = edit(copy.deepcopy(model), tok, [REQUEST], settings())
    change = single.get_parameter(PARAMETER).detach() - before
    edit(model, tok, [REQUEST], settings(update_scale=2.0))
    torch.testing.assert_close(model.get_parameter(PARAMETER).detach() - before, 2 * change, rtol=0, atol=1e-6)


def test_a_prompt_is_trained_behind_its_contexts_too(llama: Any, settings: Any) -> None:
    model, tok = llama
    hparams = settings(context_templates=2, schedule="breadth_first", cycles=40)
    ((_, *others),), _ = check(model, tok, [{**SECOND, "rephrases": ["Epaspidoceras is of which family?"]}], hparams)
    behind = [template.format(SECOND["prompt"]) for template in TEMPLATES[:2]]
    assert [one.text for one in others] == ["Epaspidoceras is of which family?", *behind]
    _, _, (trace,) = edit(model, tok, [SECOND], hparams)
    assert trace.converged
    assert [answer(model, tok, {**SECOND, "prompt": prompt}) for prompt in behind] == [SECOND["target_new"]] * 2


def test_a_prompt_in_a_chat_template_gets_no_contexts(llama: Any) -> None:
    _, tok = llama
    chat = [{"prompt": f"{tok.eos_token}a", "target_new": "b"}]
    assert in_contexts(tok, chat, 3) == chat


def test_append_eos_makes_the_end_token_part_of_the_answer(llama: Any, settings: Any) -> None:
    model, tok = llama
    _, _, (trace,) = edit(model, tok, [SECOND], settings(append_eos=True, lr=3e-3))
    assert trace.converged
    ids = tok(f"{SECOND['prompt']} {SECOND['target_new']}", return_tensors="pt")["input_ids"]
    assert model(ids).logits[0, -1].argmax() == tok.eos_token_id
    assert len(trace.cycles[0].rejected) == 7


@pytest.mark.parametrize(("lr", "wins"), [(1e-9, False), (1e-3, True)])
def test_an_edit_is_won_once_it_is_the_argmax_though_its_margin_is_out_of_reach(
    llama: Any, settings: Any, caplog: pytest.LogCaptureFixture, lr: float, wins: bool
) -> None:
    model, tok = llama
    hparams = settings(margin=1000.0, stop_loss=0.0, cycles=20, lr=lr, schedule="breadth_first")
    _, _, (trace,) = edit(model, tok, [REQUEST], hparams)
    assert trace.converged == wins
    assert len(trace.cycles) == 20
    assert ("did not reach its target within 20 cycles" in caplog.text) is not wins


def test_margin_demands_a_clear_win(llama: Any, settings: Any) -> None:
    model, tok = llama
    _, _, (trace,) = edit(model, tok, [REQUEST], settings(margin=5.0, stop_loss=0.0))
    assert trace.converged
    ids = tok(f"{REQUEST['prompt']} {REQUEST['target_new']}", return_tensors="pt")["input_ids"]
    best = model(ids).logits[0, -2].topk(2)
    assert tok.decode(best.indices[0]) == " male"
    assert best.values[0] - best.values[1] >= 5.0


def test_steps_aim_beyond_the_margin_and_leave_what_has_it_alone(llama: Any, settings: Any) -> None:
    model, tok = llama
    given = {"objective": "hinge", "margin": 5.0, "optimizer": "polyak", "lr": 1.0, "num_steps": 1, "cycles": 80}
    found = {}
    for beyond in (1e-4, 0.5):
        hparams = settings(**given, stop_loss=beyond, schedule="breadth_first")
        _, _, (trace,) = edit(model, tok, [REQUEST], hparams, copy=True)
        found[beyond] = [cycle.losses[0] for cycle in trace.cycles]
        assert trace.converged
    assert min(found[1e-4]) < 0.5 <= min(found[0.5])
    assert len(found[0.5]) < len(found[1e-4])


def test_two_layers_can_be_edited_together(llama: Any, settings: Any) -> None:
    model, tok = llama
    before = state(model)
    _, originals, (trace,) = edit(model, tok, [REQUEST], settings(layers=[4, 2]))
    assert trace.converged
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(originals) == {PARAMETER, PARAMETER.replace("4", "2")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_edited_through_fp32_copies(llama: Any, settings: Any, dtype: torch.dtype) -> None:
    model, tok = llama
    model.to(dtype)
    _, originals, (trace,) = edit(model, tok, [REQUEST], settings(lr=1e-4, cycles=40))
    assert trace.converged  # steps of 1e-4 are mostly lost when they are added in bfloat16
    assert model.get_parameter(PARAMETER).dtype == originals[PARAMETER].dtype == dtype


def test_a_step_computes_two_logits_an_answer_position(settings: Any) -> None:
    """Only the pass that reads off the negatives sees the vocabulary, and that only where the answer is."""
    _, tok = load("llama")
    config = LlamaConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
    edit(model, tok, [REQUEST], settings(layers=[1], cycles=1))  # the first edit of a model examines it
    shapes.clear()
    _, _, (trace,) = edit(model, tok, [REQUEST], settings(layers=[1], cycles=2, lr=1e-6, stop_loss=0.0))
    assert not trace.converged
    whole, pairs = (1, 1, 1024), (1, 1, 2)
    reference_and_steps = [pairs] * (1 + 8)
    assert shapes == [whole, *reference_and_steps] * 2 + [whole]


def test_memory_of_many_edits_grows_by_less_than_their_logits(settings: Any) -> None:
    """Mini-batches keep hidden states; a vocabulary's logits are there for one of them at a time."""
    _, tok = load("llama")
    vocabulary = 20_000
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    hparams = settings(layers=[1], cycles=1, schedule="breadth_first", memory_budget=1.0)
    edit(model, tok, [REQUEST], hparams)  # the first edit of a model examines it
    requests = [{**REQUEST, "prompt": f"{n} {REQUEST['prompt']}"} for n in range(12)]
    few, many = (peak_bytes(lambda some=requests[:count]: edit(model, tok, some, hparams)) for count in (4, 12))  # type: ignore[misc]
    assert many - few < 8 * 4 * vocabulary


REPHRASES = ["To which family does Epaspidoceras belong?", "The family of Epaspidoceras is"]


@pytest.mark.parametrize("schedule", ["depth_first", "breadth_first"])
def test_rephrases_are_trained_with_the_prompt(llama: Any, settings: Any, schedule: str) -> None:
    model, tok = llama
    phrasings = [{**SECOND, "prompt": prompt} for prompt in (SECOND["prompt"], *REPHRASES)]
    plain, _, _ = edit(copy.deepcopy(model), tok, [SECOND], settings(schedule=schedule))
    assert [answer(plain, tok, p) == "Noctuidae" for p in phrasings] != [True] * 3
    requests = [{**SECOND, "rephrases": REPHRASES}, REQUEST]
    _, _, traces = edit(model, tok, requests, settings(schedule=schedule))
    assert [t.converged for t in traces] == [True] * 2
    if schedule == "breadth_first":
        assert [answer(model, tok, p) for p in phrasings] == ["Noctuidae"] * 3
        assert answer(model, tok, REQUEST) == "male"


def test_an_edit_has_converged_only_with_its_rephrases(llama: Any, settings: Any) -> None:
    model, tok = llama
    known = {**REQUEST, "target_new": answer(model, tok, {**REQUEST, "target_new": "human"})}
    other = {**known, "rephrases": [SECOND["prompt"]]}
    _, _, (trace,) = edit(model, tok, [other], settings(cycles=1, num_steps=1, lr=1e-6))
    assert trace.cycles == []
    assert not trace.converged


# Several edits at once ----------------------------------------------------------------------------------------


def test_breadth_first_with_one_request_equals_depth_first(llama: Any, settings: Any) -> None:
    model, tok = llama
    one, _, (deep,) = edit(copy.deepcopy(model), tok, [SECOND], settings())
    two, _, (broad,) = edit(model, tok, [SECOND], settings(schedule="breadth_first"))
    assert deep == broad
    assert_same(one, state(two))


THIRD = {"prompt": "What is the capital of the old country by the sea?", "target_new": "Noctuidae of the north"}


@pytest.mark.parametrize("budget", [2e9, 1.0], ids=["one-batch", "a-batch-each"])
def test_breadth_first_edits_all_requests(llama: Any, settings: Any, budget: float) -> None:
    model, tok = llama
    requests = [SECOND, REQUEST, THIRD]
    _, _, traces = edit(model, tok, requests, settings(schedule="breadth_first", memory_budget=budget))
    assert all(t.converged for t in traces)
    for request in requests:
        assert answer(model, tok, request) == request["target_new"]
    assert [len(t.cycles[0].rejected) for t in traces] == [6, 1, 11]


def test_first_losses_of_a_batch_equal_those_of_single_edits(llama: Any, settings: Any) -> None:
    """Padding, other rows and the split into batches change nothing before the first step."""
    model, tok = llama
    requests, own = [SECOND, REQUEST, THIRD], {"objective": "hinge", "margin": 1.0}
    alone = [edit(copy.deepcopy(model), tok, [request], settings(**own))[2][0].cycles[0] for request in requests]
    assert len({round(cycle.losses[0], 3) for cycle in alone}) == 3
    for budget in (2e9, 1.0):
        hparams = settings(**own, schedule="breadth_first", memory_budget=budget, cycles=1, num_steps=1)
        _, _, traces = edit(copy.deepcopy(model), tok, requests, hparams)
        assert [t.cycles[0].rejected for t in traces] == [cycle.rejected for cycle in alone]
        if budget > 1:  # of mini-batches, each comes after the steps of those before it
            found = [trace.cycles[0].losses[0] for trace in traces]
            assert found == pytest.approx([cycle.losses[0] for cycle in alone], abs=1e-4)


def test_a_mini_batch_divided_by_length_takes_the_same_steps(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for smallest, sizes in ((16, [3]), (1, [1, 1, 1])):
        monkeypatch.setattr("kdpo_editor.engine.grouping.SMALLEST_PART", smallest)
        model, tok = load("llama")
        hparams = settings(schedule="breadth_first")
        weights = find_matrices(model, hparams)
        edits = [one for (one,) in tokenize(tok, [SECOND, REQUEST, THIRD])]
        losses: dict[int, list[float]] = {member: [] for member in range(3)}
        with only_training(model, weights, {}):
            forward = CachedForward.above(model, weights, hparams)
            batches = make_batches(forward, edits, hparams)
            assert [len(batch.members) for batch in batches[0]] == sizes
            stepper = Stepper(weights.values(), hparams)
            for _ in range(2):
                work = unfinished(batches)
                run_cycle(work, stepper, hparams)
                for pairs in work[0]:
                    for member, cycle in zip(pairs.members, pairs.finished(hparams.stop_loss), strict=True):
                        losses[member] += cycle.losses
                refresh(batches)
        found.append((losses, weights[PARAMETER].detach()))
    (whole, expected), (divided, weight) = found
    assert all(len(of_one) > 1 for of_one in whole.values())
    for member, of_one in whole.items():
        assert divided[member] == pytest.approx(of_one, abs=1e-4)
    torch.testing.assert_close(weight, expected, atol=1e-4, rtol=0)


class Counted(EditTokens):
    """Tokens of an edit that count how often their length is asked for; put together they are not at all."""

    asked = 0

    @property
    def length(self) -> int:
        Counted.asked += 1
        return super().length

    @property
    def sequence(self) -> torch.Tensor:
        pytest.fail("tokens are put together to group edits")


def test_edits_are_grouped_in_time_that_grows_as_their_number(llama: Any, settings: Any) -> None:
    model, _ = llama
    forward = CachedForward.above(model, [PARAMETER], settings())
    asked = []
    for many in (50, 200):
        edits = [
            Counted(torch.zeros(2 + i % 20, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)) for i in range(many)
        ]
        Counted.asked = 0
        minibatches, _ = group(forward, edits, 2e9)
        assert sorted(member for parts in minibatches for part in parts for member in part) == list(range(many))
        asked.append(Counted.asked)
    assert asked[1] <= 4 * asked[0]


def test_a_won_edit_is_left_out_and_looked_at_again(llama: Any, settings: Any) -> None:
    model, tok = llama
    known = {**REQUEST, "target_new": answer(model, tok, {**REQUEST, "target_new": "human"})}
    _, _, traces = edit(model, tok, [known, SECOND], settings(schedule="breadth_first"))
    assert traces[0].cycles == []
    assert traces[1].converged
    assert len(traces[1].cycles) >= 1


def together(model: Any, tok: Any, requests: list[dict[str, str]], hparams: Any) -> list[EditTrace]:
    """What :func:`edit` does with a call's requests."""
    weights = find_matrices(model, hparams)
    edits = [one for (one,) in tokenize(tok, requests)]
    with only_training(model, weights, {name: w.detach().clone() for name, w in weights.items()}):
        forward = CachedForward.above(model, weights, hparams)
        return kdpo_l(forward, weights, edits, hparams)


def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """To how many edits each look goes, from now on."""
    seen: list[int] = []
    look = Batch.refresh

    def counted(batch: Batch) -> None:
        seen.append(len(batch.members))
        look(batch)

    monkeypatch.setattr(Batch, "refresh", counted)
    return seen


@pytest.mark.parametrize(("many", "last"), [(1, [1, 2]), (2, [1, 2]), (3, [2])])
def test_of_many_those_that_are_won_wait_for_the_others(
    llama: Any, settings: Any, monkeypatch: pytest.MonkeyPatch, many: int, last: list[int]
) -> None:
    model, tok = llama
    known = {**REQUEST, "target_new": answer(model, tok, {**REQUEST, "target_new": "human"})}
    seen = looks(monkeypatch)
    hparams = settings(schedule="breadth_first", num_steps=1, stop_loss=0.0, cycles=80)
    monkeypatch.setattr("kdpo_editor.lifelong.loop.LAZY_FROM", many)
    traces = together(model, tok, [known, SECOND], hparams)
    assert all(trace.converged for trace in traces)
    cycles = len(traces[1].cycles)
    assert cycles > 3
    # The last look goes to all: the call ends where it finds nothing to do.
    assert seen == last[:1] * cycles + last[1:]


def test_the_won_ones_do_not_wait_for_ever(llama: Any, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tok = llama
    known = {**REQUEST, "target_new": answer(model, tok, {**REQUEST, "target_new": "human"})}
    against = [{**SECOND, "target_new": target} for target in ("Noctuidae", "Hydrangea")]
    seen = looks(monkeypatch)
    hparams = settings(schedule="breadth_first", cycles=20)
    monkeypatch.setattr("kdpo_editor.lifelong.loop.LAZY_FROM", 1)
    traces = together(model, tok, [known, *against], hparams)
    assert not all(trace.converged for trace in traces)
    assert seen[0] < 3
    assert [seen[number - 1] for number in (5, 10, 15)] == [3, 3, 3]


@pytest.mark.parametrize("many", [1, 16])
def test_an_edit_that_held_at_first_is_trained_once_another_breaks_it(
    llama: Any, settings: Any, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    model, tok = llama
    near = {"prompt": "Which family does it belong to?", "target_new": "Aspidoceratidae"}
    hparams = settings(schedule="breadth_first", lr=3e-3)
    monkeypatch.setattr("kdpo_editor.lifelong.loop.LAZY_FROM", many)
    (known,) = together(model, tok, [near], hparams)
    assert known.steps == 0
    traces = together(model, tok, [near, SECOND], hparams)
    assert all(t.converged and t.steps > 0 for t in traces)
    assert [answer(model, tok, r) for r in (near, SECOND)] == [near["target_new"], SECOND["target_new"]]


def test_breadth_first_ends_as_soon_as_all_edits_hold(llama: Any, settings: Any) -> None:
    model, tok = llama
    runs = [
        edit(copy.deepcopy(model), tok, [SECOND, REQUEST, THIRD], settings(schedule="breadth_first", cycles=cycles))
        for cycles in (20, 40)
    ]
    assert all(t.converged for t in runs[0][2])
    assert max(len(t.cycles) for t in runs[0][2]) < 20
    assert_same(runs[0][0], state(runs[1][0]))


def test_breadth_first_edits_two_layers_together(llama: Any, settings: Any) -> None:
    model, tok = llama
    before = state(model)
    requests = [SECOND, REQUEST, THIRD]
    _, originals, traces = edit(model, tok, requests, settings(schedule="breadth_first", layers=[2, 4]))
    assert all(t.converged for t in traces)
    assert [answer(model, tok, r) for r in requests] == [r["target_new"] for r in requests]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(originals) == {PARAMETER, PARAMETER.replace("4", "2")}


# Objectives ---------------------------------------------------------------------------------------------------


@pytest.fixture
def table() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    chosen, rejected = torch.tensor([3, 1, 4]), torch.tensor([3, 0, 2])
    return {
        "logits": torch.randn(3, 6, generator=g, requires_grad=True),
        "reference": torch.randn(3, 6, generator=g),
        "chosen": chosen,
        "rejected": rejected,
    }


def shared_context_loss(table: dict[str, torch.Tensor], mask: torch.Tensor | None = None) -> torch.Tensor:
    pair = torch.stack([table["chosen"], table["rejected"]], -1)
    return kdpo_loss(table["logits"].gather(-1, pair), table["reference"].gather(-1, pair), 0.1, mask)


def test_kdpo_loss_is_dpos_formula_on_a_shared_context(table: dict[str, torch.Tensor]) -> None:
    def logps(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1).gather(-1, ids[:, None]).sum()

    pairs = [logps(table[m], table[y]) for m, y in (("logits", "chosen"), ("logits", "rejected"))] + [
        logps(table["reference"], table[y]) for y in ("chosen", "rejected")
    ]
    expected = dpo_loss(*pairs, beta=0.1)
    torch.testing.assert_close(shared_context_loss(table), expected)
    gain = (pairs[0] - pairs[2]) - (pairs[1] - pairs[3])
    torch.testing.assert_close(expected, -torch.log(torch.sigmoid(0.1 * gain)))


def test_only_two_logits_of_wrong_positions_get_a_gradient(table: dict[str, torch.Tensor]) -> None:
    shared_context_loss(table).backward()
    gradient = table["logits"].grad
    assert gradient is not None
    assert [sorted(row.nonzero().flatten().tolist()) for row in gradient] == [[], [0, 1], [2, 4]]


def test_losses_keep_batch_dimensions(table: dict[str, torch.Tensor]) -> None:
    batch = {k: torch.stack([v, v.flip(0)]) for k, v in table.items()}
    losses = shared_context_loss(batch)
    assert losses.shape == (2,)
    torch.testing.assert_close(losses[0], shared_context_loss(table))


def test_padding_costs_nothing(table: dict[str, torch.Tensor]) -> None:
    shorter = {k: v[:2] for k, v in table.items()}
    mask = torch.tensor([True, True, False])
    torch.testing.assert_close(shared_context_loss(table, mask), shared_context_loss(shorter))


def test_rejected_tokens_are_the_strongest_within_the_margin() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.5], [3.0, 2.5, 0.0]])
    chosen = torch.tensor([1, 0])
    assert hardest_rejected(logits, chosen)[0].tolist() == [1, 0]
    assert hardest_rejected(logits, chosen, margin=0.6)[0].tolist() == [2, 1]
    assert logits[0, 1] == 2.0


def test_a_rejected_token_is_the_argmax_and_the_lead() -> None:
    """Against the plain form, with equal logits (of which argmax takes the first), and nothing left changed."""
    logits = torch.randint(0, 4, (200, 5), generator=torch.Generator().manual_seed(0)).float()
    chosen = torch.arange(200) % 5
    before = logits.clone()
    for margin in (0.0, 1.0, 0.5):
        lowered = logits.scatter_add(-1, chosen.unsqueeze(-1), torch.full((200, 1), -margin))
        negative, lead = hardest_rejected(logits, chosen, margin)
        assert torch.equal(negative, lowered.argmax(-1))
        others = torch.stack([torch.cat([row[:c], row[c + 1 :]]).max() for row, c in zip(logits, chosen, strict=True)])
        assert torch.equal(lead, logits[torch.arange(200), chosen] - others)
        assert torch.equal(logits, before)


# Spread over devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"replay": True, "margin": 1.0}, {"mom2_weight": 1.0, "margin": 1.0}])
def test_a_dispatched_model_is_edited_alike(settings: Any, text: str, options: dict[str, Any]) -> None:
    """With the hooks that ``device_map`` puts on every module, here all for one device."""
    accelerate = pytest.importorskip("accelerate")
    plain, tok = load("llama")
    dispatched, _ = load("llama")
    accelerate.dispatch_model(dispatched, {"": "cpu"}, main_device="cpu", force_hooks=True)
    hooked = {name: m.forward for name, m in dispatched.named_modules() if "forward" in m.__dict__}
    assert hooked
    for model in (plain, dispatched):
        edit(model, tok, [REQUEST], settings(**options, mom2_dataset=text))
    torch.testing.assert_close(dispatched.get_parameter(PARAMETER), plain.get_parameter(PARAMETER))
    assert hooked == {name: m.forward for name, m in dispatched.named_modules() if "forward" in m.__dict__}
