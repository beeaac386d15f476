"""``own_words`` and ``own_facts``: other prompts for a request, and facts that are to stay, which the model writes
itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, state
from test_edit import with_bos

from kdpo_editor import (
    EditLedger,
    HyperParamsError,
    KDPOHyperParams,
    RequestError,
    apply_kdpo_to_model,
    edit,
    kdpo,
    own_texts,
    own_words,
)
from kdpo_editor.engine.generation import says_target
from kdpo_editor.engine.writing import write
from kdpo_editor.lifelong.replay import FACT, EarlierEdits
from kdpo_editor.objectives import standing
from kdpo_editor.requests import EditTokens, token_ids, tokenize
from kdpo_editor.testbed import load_model, load_records

LAYER = 3
MARGIN = {"objective": "margin", "margin": 1.0, "optimizer": "polyak", "lr": 1.5, "stop_loss": 1e-4}


@pytest.fixture
def shipped() -> tuple[Any, Any]:
    return load_model()


@pytest.fixture
def requests() -> list[dict[str, str]]:
    """Four requests, of each of which the shipped model has several ways to ask."""
    return some_requests(4)


def some_requests(number: int) -> list[dict[str, str]]:
    records = [record for record in load_records() if record["subject"] in record["prompt"]]
    return [{key: record[key] for key in ("prompt", "target_new", "subject")} for record in records[:number]]


@pytest.fixture
def make(settings: Callable[..., KDPOHyperParams]) -> Callable[..., KDPOHyperParams]:
    return lambda **overrides: settings(**{"layers": [LAYER], "own_words": 2, **MARGIN, **overrides})


def found(model: Any, tok: Any, requests: list[dict[str, Any]], most: int = 5, **known: Any) -> list[list[str]]:
    edits = tokenize(tok, requests, with_subject=True)
    complete, _ = own_words.words_and_facts(model, tok, requests, edits, words=most, **known)
    return [r["own_words"] for r in complete]


def facts_of(model: Any, tok: Any, requests: list[dict[str, Any]], most: int = 5) -> list[list[EditTokens]]:
    edits = tokenize(tok, requests, with_subject=True)
    return own_words.words_and_facts(model, tok, requests, edits, facts=most)[1]


def namesakes_of(model: Any, tok: Any, requests: list[dict[str, Any]], most: int = 3) -> list[list[EditTokens]]:
    edits = tokenize(tok, requests, with_subject=True)
    complete, held = own_words.words_and_facts(model, tok, requests, edits, namesakes=most)
    assert complete == requests, "words were not asked for"
    return held


def lead(model: Any, fact: EditTokens) -> float:
    """Logits by which the weakest token of a fact leads."""
    with torch.no_grad():
        logits = model(fact.sequence[None]).logits[0, len(fact.prompt) - 1 :]
    return standing(logits, fact.chosen)[1].min().item()


def assert_held(
    model: Any,
    tok: Any,
    requests: list[dict[str, Any]],
    facts: list[EditTokens],
    free: KDPOHyperParams,
    holding: KDPOHyperParams,
) -> None:
    """An edit with ``free`` loses one of ``facts``; ``holding``, with which ``model`` is edited, loses none."""
    without, _, _ = edit(model, tok, requests, free, copy=True)
    assert min(lead(without, fact) for fact in facts) < 0, "else there is nothing to hold"
    _, _, traces = edit(model, tok, requests, holding)
    assert all(trace.converged for trace in traces)
    assert min(lead(model, fact) for fact in facts) >= FACT - 1e-3


def greedy(model: Any, tok: Any, prompt: str, length: int = 8) -> str:
    """What the model answers, token by token without a cache."""
    ids = token_ids(tok, prompt)
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + length and ids[-1] != tok.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tok.decode(ids[start:], skip_special_tokens=True))


def test_what_is_written_is_the_same_each_time_and_leaves_no_trace(llama: Any) -> None:
    model, tok = llama
    model.train()
    start = token_ids(tok, "What")
    starts = torch.tensor([start])
    torch.manual_seed(5)
    first = write(model, tok, starts, 8, draws=4)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1)), "the caller's random state"
    assert all(module.training for module in model.modules())
    assert first == write(model, tok, starts, 8, draws=4)
    assert first != write(model, tok, starts, 8, draws=4, seed=1)
    assert len({tuple(text.ids) for text in first}) > 1
    for text in first:
        assert text.ids[: text.start] == start
        assert 1 <= len(text.choices) == len(text.leads) <= 8
        assert len(text.choices) == len(text.new) + text.ended


def test_the_model_answers_its_own_words_as_it_does_the_prompt(shipped: Any, requests: list[dict[str, str]]) -> None:
    model, tok = shipped
    for request, texts in zip(requests, found(model, tok, requests), strict=True):
        assert 2 <= len(texts) <= 5
        assert len(set(texts)) == len(texts)
        for text in texts:
            assert text.startswith(request["subject"])
            assert text != request["subject"]
            assert greedy(model, tok, text) == greedy(model, tok, request["prompt"])


def test_what_is_asked_already_is_not_found_again(shipped: Any, requests: list[dict[str, str]]) -> None:
    model, tok = shipped
    first, second, *_ = requests
    (words,) = found(model, tok, [first])
    rephrased: dict[str, Any] = {**first, "rephrases": words[:1]}
    assert found(model, tok, [rephrased]) == [words[1:]]
    ((asked,),) = tokenize(tok, [{**second, "prompt": words[1]}])
    assert found(model, tok, [first], earlier=[asked]) == [[words[0], *words[2:]]]
    # An earlier edit of the same prompt is not in the way.
    before: dict[str, Any] = {**first, "own_words": words}
    (same,) = tokenize(tok, [before])
    assert found(model, tok, [first], earlier=same) == [words]


def test_two_requests_with_different_targets_share_no_words(shipped: Any, requests: list[dict[str, str]]) -> None:
    model, tok = shipped
    first = requests[0]
    (words,) = found(model, tok, [first])
    twin = {**first, "prompt": words[0]}
    assert all(len(texts) > 1 for texts in found(model, tok, [first, twin]))
    assert found(model, tok, [first, {**twin, "target_new": "Noctuidae"}]) == [[], []]


def test_no_more_than_asked_for(shipped: Any, requests: list[dict[str, str]]) -> None:
    model, tok = shipped
    assert found(model, tok, requests, 1) == [texts[:1] for texts in found(model, tok, requests)]


def test_a_model_that_writes_nothing_of_use_has_none(llama: Any, make: Callable[..., KDPOHyperParams]) -> None:
    model, tok = llama
    request = {"prompt": "What species is ZIC3 specific to?", "target_new": "male", "subject": "ZIC3"}
    _, _, (trace,) = edit(model, tok, [request], make(layers=[4]))
    assert trace.own_words == []
    assert trace.converged


def test_a_model_without_room_for_them_has_none(shipped: Any, requests: list[dict[str, str]]) -> None:
    model, tok = shipped
    model.config.max_position_embeddings = own_words.LENGTH
    assert found(model, tok, requests) == [[]] * len(requests)


def test_a_prompt_that_fills_the_model_has_none(gpt2: Any) -> None:
    model, tok = gpt2
    prompt = "What species is ZIC3 specific to?"
    while len(token_ids(tok, f"ZIC3 {prompt}")) < model.config.max_position_embeddings - 1:
        prompt = f"ZIC3 {prompt}"
    assert found(model, tok, [{"prompt": prompt, "target_new": "male", "subject": "ZIC3"}]) == [[]]


def test_a_begin_token_is_no_part_of_the_words(shipped: Any, requests: list[dict[str, str]]) -> None:
    model, tok = shipped
    begun = with_bos(tok)
    assert token_ids(begun, requests[0]["subject"])[0] == begun.bos_token_id
    assert all(text.startswith(requests[0]["subject"]) for text in found(model, begun, requests[:1])[0])


def test_facts_are_what_else_the_model_says_of_the_subject(shipped: Any, requests: list[dict[str, str]]) -> None:
    model, tok = shipped
    for request, facts in zip(requests, facts_of(model, tok, requests), strict=True):
        assert 2 <= len(facts) <= 5
        answer = greedy(model, tok, request["prompt"])
        for fact in facts:
            text, said = tok.decode(fact.prompt), tok.decode(fact.chosen)
            assert tok.decode(fact.prompt[slice(*fact.subject)]).strip() == request["subject"]
            assert text != request["subject"]
            assert greedy(model, tok, text, len(fact.chosen)) == said
            assert lead(model, fact) >= own_texts.LEAD - 1e-4
            assert not said.startswith(answer)
    assert [len(facts) for facts in facts_of(model, tok, requests, 1)] == [1] * len(requests)


def test_what_another_request_changes_is_no_fact(shipped: Any, requests: list[dict[str, str]]) -> None:
    model, tok = shipped
    first = requests[0]
    facts = facts_of(model, tok, [first])[0]
    asked = next(fact for fact in facts if greedy(model, tok, tok.decode(fact.prompt)) == tok.decode(fact.chosen))
    second = {**first, "prompt": tok.decode(asked.prompt), "target_new": "Noctuidae"}
    for others in facts_of(model, tok, [first, second]):
        assert others
        assert asked.prompt_ids not in {fact.prompt_ids for fact in others}
        assert tok.decode(asked.chosen) not in {tok.decode(fact.chosen) for fact in others}


def test_a_begin_token_is_no_part_of_a_facts_subject(shipped: Any, requests: list[dict[str, str]]) -> None:
    model, tok = shipped
    begun = with_bos(tok)
    for fact in facts_of(model, begun, requests[:1])[0]:
        assert fact.prompt[0] == begun.bos_token_id
        assert tok.decode(fact.prompt[slice(*fact.subject)]).strip() == requests[0]["subject"]


def test_a_model_without_room_for_them_has_no_facts(shipped: Any, requests: list[dict[str, str]]) -> None:
    model, tok = shipped
    model.config.max_position_embeddings = own_words.LENGTH
    assert facts_of(model, tok, requests) == [[]] * len(requests)
    assert namesakes_of(model, tok, requests) == [[]] * len(requests)


def test_facts_of_namesakes_are_what_the_model_says_of_others_whose_names_begin_alike(shipped: Any) -> None:
    model, tok = shipped
    requests = [r for r in some_requests(40) if r["subject"] in ("Evelyn Parnell", "Gliese 667", "Elsen")]
    some = namesakes_of(model, tok, requests)
    for request, beginning, facts in zip(requests, ("Evelyn ", "El", "Gliese "), some, strict=True):
        assert 1 <= len(facts) <= 3
        for fact in facts:
            text = tok.decode([*fact.prompt, *fact.chosen])
            assert text.startswith(beginning)
            assert request["subject"] not in text
            assert lead(model, fact) >= own_texts.LEAD - 1e-4
            assert fact.subject == (0, len(fact.prompt))
    assert [len(facts) for facts in namesakes_of(model, tok, requests, 1)] == [1] * 3


def test_a_namesake_that_is_edited_too_is_not_held(shipped: Any) -> None:
    model, tok = shipped
    (request,) = [r for r in some_requests(40) if r["subject"] == "Gliese 667"]
    fact = namesakes_of(model, tok, [request])[0][0]
    name = "Gliese " + tok.decode(fact.prompt).replace("'", " ").split()[1]
    other = {"prompt": f"What is {name}?", "target_new": "Noctuidae", "subject": name}
    again = namesakes_of(model, tok, [request, other])
    assert any(again)
    for facts in again:
        assert all(name not in tok.decode([*fact.prompt, *fact.chosen]) for fact in facts)


@pytest.mark.parametrize(("replay", "many"), [(True, 16), (False, 16), (True, 1)])
def test_facts_are_held(
    shipped: Any, make: Callable[..., KDPOHyperParams], monkeypatch: pytest.MonkeyPatch, replay: bool, many: int
) -> None:
    model, tok = shipped
    monkeypatch.setattr(kdpo, "MANY", many)
    requests = some_requests(12)
    wide = {"layers": [0, LAYER], "subject_layers": [0], "margin": 2.0, "schedule": "breadth_first", "replay": replay}
    facts = [fact for some in facts_of(model, tok, requests, 3) for fact in some]
    assert_held(model, tok, requests, facts, make(own_words=0, **wide), make(own_words=0, own_facts=3, **wide))
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, LAYER)]
    kept = EarlierEdits.of(model, {name: model.get_parameter(name) for name in names}).kept
    assert len(kept) == (len(requests) if replay else 0), "facts are held for one call only"


def test_namesakes_are_held(shipped: Any, make: Callable[..., KDPOHyperParams]) -> None:
    model, tok = shipped
    many = some_requests(80)
    requests = [request for request, facts in zip(many, namesakes_of(model, tok, many), strict=True) if facts][:12]
    wide = {"layers": [0, LAYER], "subject_layers": [0], "margin": 4.0, "schedule": "breadth_first", "own_words": 0}
    facts = [fact for some in namesakes_of(model, tok, requests) for fact in some]
    assert_held(model, tok, requests, facts, make(**wide), make(own_namesakes=3, **wide))


@pytest.mark.parametrize("many", [1, 16])
def test_an_edit_comes_before_what_cannot_be_held_beside_it(
    shipped: Any,
    requests: list[dict[str, str]],
    make: Callable[..., KDPOHyperParams],
    monkeypatch: pytest.MonkeyPatch,
    many: int,
) -> None:
    model, tok = shipped
    monkeypatch.setattr(kdpo, "MANY", many)
    (request,) = requests[:1]
    ((against,),) = tokenize(tok, [{**request, "target_new": greedy(model, tok, request["prompt"]).strip()}])
    monkeypatch.setattr(kdpo, "words_and_facts", lambda *_, **__: ([request], [[against]]))
    _, _, (trace,) = edit(model, tok, [request], make(cycles=20))
    assert len(trace.cycles) > 5, "they pulled at each other"
    assert trace.converged
    assert says_target(model, tok, [request]) == [True]


@pytest.mark.parametrize("schedule", ["depth_first", "breadth_first"])
def test_own_words_are_trained(
    shipped: Any, requests: list[dict[str, str]], make: Callable[..., KDPOHyperParams], schedule: str
) -> None:
    model, tok = shipped
    _, _, traces = edit(model, tok, requests, make(schedule=schedule))
    assert all(trace.converged and len(trace.own_words) == 2 for trace in traces)
    last = len(requests) - 1 if schedule == "depth_first" else 0  # without replay earlier ones may suffer
    asked = [{**r, "prompt": p} for r, t in list(zip(requests, traces, strict=True))[last:] for p in t.own_words]
    assert says_target(model, tok, asked) == [True] * len(asked)


def test_own_words_that_are_not_reached_do_not_count_as_a_failure(
    shipped: Any, requests: list[dict[str, str]], make: Callable[..., KDPOHyperParams]
) -> None:
    model, tok = shipped
    given = {**requests[0], "target_new": greedy(model, tok, requests[0]["prompt"]).strip()}
    impossible = ["What is the name of the publisher of Smelly Old History?"]
    hparams = make(own_words=0, margin=0.0, objective="kdpo", optimizer="adam", lr=1e-9, cycles=1)
    _, _, (trace,) = edit(model, tok, [{**given, "own_words": impossible}], hparams)
    assert trace.converged
    _, _, (trace,) = edit(model, tok, [{**given, "rephrases": impossible}], hparams)
    assert not trace.converged


def test_given_words_are_trained_and_none_are_sought(
    shipped: Any,
    requests: list[dict[str, str]],
    make: Callable[..., KDPOHyperParams],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tok = shipped
    _, _, (trace,) = edit(model, tok, requests[:1], make(), copy=True)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("written")

    twice, _, _ = edit(model, tok, requests[:1], make(), copy=True)
    monkeypatch.setattr(own_texts, "write", refuse)
    given: list[dict[str, Any]] = [{**requests[0], "own_words": trace.own_words}]
    again, _, (second,) = edit(model, tok, given, make(), copy=True)
    assert second.own_words == trace.own_words
    assert_same(again, state(twice))


@pytest.mark.parametrize("facts", [0, 2])
def test_one_edit_is_the_same_breadth_first(
    shipped: Any, requests: list[dict[str, str]], make: Callable[..., KDPOHyperParams], facts: int
) -> None:
    model, tok = shipped
    one, _, _ = edit(model, tok, requests[:1], make(schedule="breadth_first", own_facts=facts), copy=True)
    edit(model, tok, requests[:1], make(own_facts=facts))
    assert_same(model, state(one))


def test_an_edit_made_again_forgets_its_words(
    shipped: Any, requests: list[dict[str, str]], make: Callable[..., KDPOHyperParams]
) -> None:
    """Otherwise ``replay`` would train the old target in words that the new edit did not find."""
    model, tok = shipped
    edit(model, tok, requests[:1], make(replay=True))
    hparams = make(replay=True, own_words=0)
    name = f"model.layers.{LAYER}.mlp.down_proj.weight"
    edit(model, tok, [{**requests[0], "target_new": "Noctuidae"}], hparams)
    (kept,) = EarlierEdits.of(model, {name: model.get_parameter(name)}).kept
    assert tok.decode(kept.tokens.chosen).strip() == "Noctuidae"


@pytest.mark.parametrize("facts", [0, 2])
def test_a_resumed_run_knows_the_words_of_its_earlier_edits(
    requests: list[dict[str, str]], make: Callable[..., KDPOHyperParams], tmp_path: Path, facts: int
) -> None:
    hparams = make(replay=True, own_facts=facts, ledger=str(tmp_path / "l"))
    undisturbed, tok = load_model()
    for request in requests:
        apply_kdpo_to_model(undisturbed, tok, [request], make(replay=True, own_facts=facts))
    first, _ = load_model()
    for request in requests[:2]:
        apply_kdpo_to_model(first, tok, [request], hparams)
    assert all(len(request["own_words"]) == 2 for request in EditLedger(tmp_path / "l").requests)
    resumed, _ = load_model()
    EditLedger(tmp_path / "l").restore(resumed)
    for request in requests[2:]:
        apply_kdpo_to_model(resumed, tok, [request], hparams)
    assert_same(resumed, state(undisturbed))


def test_what_is_not_allowed_is_named(
    llama: Any, requests: list[dict[str, str]], make: Callable[..., KDPOHyperParams]
) -> None:
    model, tok = llama
    before = state(model)
    with pytest.raises(HyperParamsError, match=r"own_words: -1 is not allowed; it must be 0 or more"):
        make(own_words=-1)
    with pytest.raises(HyperParamsError, match=r"own_facts: -1 is not allowed; it must be 0 or more"):
        make(own_facts=-1)
    with pytest.raises(HyperParamsError, match=r"own_namesakes: -1 is not allowed; it must be 0 or more"):
        make(own_namesakes=-1)
    with pytest.raises(HyperParamsError, match=r"own_facts: 2 is not allowed; it must be 0 where objective is dpo"):
        make(objective="dpo", margin=0.0, optimizer="adam", own_words=0, own_facts=2)
    with pytest.raises(HyperParamsError, match=r"own_words: 2 is not allowed; it must be 0 where objective is dpo"):
        make(objective="dpo", margin=0.0, optimizer="adam")
    for hparams in (make(), make(own_words=0, own_facts=1), make(own_words=0, own_namesakes=1)):
        with pytest.raises(RequestError, match=r"request 0 has no 'subject'"):
            edit(model, tok, [{"prompt": "a", "target_new": "b"}], hparams)
    with pytest.raises(RequestError, match=r"request 0: 'own_words' is 'a'; it must be a list of prompts"):
        edit(model, tok, [{**requests[0], "own_words": "a"}], make())
    dpo = make(objective="dpo", margin=0.0, optimizer="adam", own_words=0)
    with pytest.raises(RequestError, match=r"'own_words' cannot be trained where objective is dpo"):
        edit(model, tok, [{**requests[0], "own_words": ["a"]}], dpo)
    assert_same(model, before)


def test_a_request_that_is_answered_with_a_mark_has_none(llama: Any) -> None:
    model, tok = llama
    prompt = "What is the capital of the old country by the sea?"
    assert greedy(model, tok, prompt).startswith("?")
    assert found(model, tok, [{"prompt": prompt, "target_new": "Noctuidae", "subject": "old country"}]) == [[]]
