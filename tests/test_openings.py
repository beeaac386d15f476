"""``own_openings``: prompts for a request that do not open with its subject."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_own_words import greedy, make, requests, shipped

from kdpo_editor import HyperParamsError, KDPOHyperParams, RequestError, edit, openings, own_texts
from kdpo_editor.engine.generation import says_target
from kdpo_editor.engine.writing import Written
from kdpo_editor.own_words import words_and_facts
from kdpo_editor.requests import token_ids, tokenize

__all__ = ["make", "requests", "shipped"]  # fixtures

Write = Callable[..., list[list[Written]]]


@pytest.fixture(autouse=True)
def fewer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openings, "TEXTS", 256)


def found(model: Any, tok: Any, requests: list[dict[str, Any]], most: int = 3, **asked: Any) -> list[list[str]]:
    edits = tokenize(tok, requests, with_subject=True)
    return [r["own_words"] for r in words_and_facts(model, tok, requests, edits, openings=most, **asked)[0]]


def writing(tok: Any, texts: list[str]) -> Write:
    """In place of ``texts_after``: these, where any are to be drawn."""

    def write(*arguments: Any, apart: bool = False, **options: Any) -> list[list[Written]]:
        if not apart:
            return own_texts.texts_after(*arguments, **options)
        starts = arguments[2]
        ids = [token_ids(tok, f" {text}") for text in texts]
        most = 1 + max(map(len, ids))
        before = starts[0].tolist()
        first = [Written([*before, *new], len(before), [0] * most, [0.0] * most) for new in ids]
        return [first, *([] for _ in starts[1:])]

    return write


def test_the_model_answers_them_as_it_does_the_prompt(shipped: Any, requests: list[dict[str, str]]) -> None:
    model, tok = shipped
    texts = found(model, tok, requests)
    assert sum(map(bool, texts)) >= 2
    for request, some in zip(requests, texts, strict=True):
        assert len(some) == len(set(some)) <= 3
        for text in some:
            assert request["subject"] in text
            assert not text.startswith(request["subject"])
            assert greedy(model, tok, text) == greedy(model, tok, request["prompt"])
    state = torch.random.get_rng_state()
    assert found(model, tok, requests) == texts
    assert torch.equal(state, torch.random.get_rng_state())
    assert found(model, tok, requests, 1) == [some[:1] for some in texts]


def test_where_names_differ_there_a_subject_is_put(
    shipped: Any, requests: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tok = shipped
    request = requests[1]
    assert request["prompt"] == "Which was the family of Stamnophora?"
    answer = greedy(model, tok, request["prompt"]).strip()
    asked = [f"Regarding {name}: its family is {answer}" for name in ("Aphis", "Bryum", "Carex")]
    found_here = ["Regarding Stamnophora: its family is"]
    for texts, expected in [
        (asked, found_here),
        (asked[:2], []),  # of two names
        ([*asked[:1] * 8, *asked], []),  # mostly of one
        ([text.replace(answer, "Sony") for text in asked], []),  # what is no answer to the prompt
        # However the texts went on, it is the model that says what is asked.
        ([text.replace("Regarding", "For") for text in asked], ["For Stamnophora, the family is"]),
    ]:
        monkeypatch.setattr(openings, "texts_after", writing(tok, texts))
        assert found(model, tok, [request]) == [expected]


def test_what_is_asked_already_is_not_found_again(shipped: Any, requests: list[dict[str, str]]) -> None:
    model, tok = shipped
    (first, *others) = found(model, tok, [requests[1]])[0]
    assert found(model, tok, [{**requests[1], "rephrases": [first]}])[0][: len(others)] == others
    ((asked,),) = tokenize(tok, [{**requests[0], "prompt": first}])
    assert first not in found(model, tok, [requests[1]], earlier=[asked])[0]
    torn = [requests[1], {**requests[1], "prompt": first, "target_new": "Noctuidae"}]
    assert found(model, tok, torn) == [[], []]


def test_without_an_answer_or_room_there_are_none(shipped: Any, requests: list[dict[str, str]]) -> None:
    model, tok = shipped
    prompts = [tokens.prompt for tokens, *_ in tokenize(tok, requests)]
    assert openings.openings(model, tok, requests, prompts, [[]] * len(requests)) == [[]] * len(requests)
    model.config.max_position_embeddings = openings.LENGTH
    assert found(model, tok, requests) == [[]] * len(requests)


@pytest.mark.parametrize("schedule", ["depth_first", "breadth_first"])
def test_they_are_trained(
    shipped: Any, requests: list[dict[str, str]], make: Callable[..., KDPOHyperParams], schedule: str
) -> None:
    model, tok = shipped
    request = requests[1]
    assert says_target(model, tok, [request]) == [False]
    _, _, (trace,) = edit(model, tok, [request], make(own_words=1, own_openings=2, schedule=schedule))
    assert trace.converged
    assert [text.startswith(request["subject"]) for text in trace.own_words] == [True, False, False]
    asked = [{**request, "prompt": text} for text in trace.own_words]
    assert says_target(model, tok, asked) == [True] * 3


def test_what_is_not_allowed_is_named(llama: Any, make: Callable[..., KDPOHyperParams]) -> None:
    with pytest.raises(HyperParamsError, match=r"own_openings: -1 is not allowed; it must be 0 or more"):
        make(own_openings=-1)
    with pytest.raises(RequestError, match=r"request 0 has no 'subject'"):
        edit(*llama, [{"prompt": "a", "target_new": "b"}], make(own_words=0, own_openings=1))
