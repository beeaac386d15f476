"""Greedy generation: one rule for where an answer ends and one for when it is right, whatever the model's settings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from kdpo_editor.engine.generation import answers, batches, end_tokens, generate, greedy, says_target
from kdpo_editor.errors import RequestError
from kdpo_editor.requests.answers import begins_with, is_answer
from kdpo_editor.requests.tokens import token_ids
from kdpo_editor.testbed import load_model, load_records

PROMPTS = [record["prompt"] for record in load_records()[:8]]


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load_model()


@pytest.fixture
def own_settings(shipped: tuple[Any, Any]) -> Any:
    """The shipped model's ``generation_config``, to be changed and put back."""
    model = shipped[0]
    kept = copy.deepcopy(model.generation_config)
    yield model.generation_config
    model.generation_config = kept


def by_hand(model: Any, prompt: list[int], length: int) -> list[int]:
    ids = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_most_likely_tokens_up_to_the_end(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    prompts = [token_ids(tok, prompt) for prompt in PROMPTS]
    assert len({len(prompt) for prompt in prompts}) > 1, "none would be padded"
    for prompt, said in zip(prompts, greedy(model, tok, prompts, 12), strict=True):
        expected = by_hand(model, prompt, 12)
        assert said.stopped == (tok.eos_token_id in expected)
        end = expected.index(tok.eos_token_id) if said.stopped else 12
        assert said.ids == expected[:end]


def test_the_end_can_be_ignored(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    prompt = token_ids(tok, PROMPTS[0])
    (said,) = greedy(model, tok, [prompt], 12, ignore_end=True)
    assert said.ids == by_hand(model, prompt, 12)
    assert tok.eos_token_id in said.ids
    assert not said.stopped


def test_batches_do_not_change_what_is_said(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    prompts = [token_ids(tok, prompt) for prompt in PROMPTS]
    together = greedy(model, tok, prompts, 12)
    assert greedy(model, tok, prompts, 12, rows=1) == together
    assert greedy(model, tok, prompts, 12, rows=3) == together
    assert greedy(model, tok, prompts, 12, alike=True) == together
    assert greedy(model, tok, [], 12) == []


@pytest.mark.parametrize("form", [int, list])
def test_each_of_the_models_end_tokens_ends_an_answer(shipped: tuple[Any, Any], own_settings: Any, form: type) -> None:
    """Behind the first token that the model says: where that is an end token too, nothing is left of the answer."""
    model, tok = shipped
    prompt = token_ids(tok, PROMPTS[0])
    first, second = greedy(model, tok, [prompt], 12)[0].ids[:2]
    own_settings.eos_token_id = second if form is int else [tok.eos_token_id, second]
    assert end_tokens(model, tok) == sorted({tok.eos_token_id, second})
    (said,) = greedy(model, tok, [prompt], 12)
    assert said.ids == [first]
    assert said.stopped


def test_a_model_without_an_end_token_has_the_tokenizers(shipped: tuple[Any, Any], own_settings: Any) -> None:
    model, tok = shipped
    before = answers(model, tok, PROMPTS)
    own_settings.eos_token_id = None
    assert end_tokens(model, tok) == [tok.eos_token_id]
    assert answers(model, tok, PROMPTS) == before


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 50.0},
        {"do_sample": True, "temperature": 9.0, "top_k": 1000},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [5, 6, 7, 8, 9]},
        {"num_beams": 4},
        {"min_new_tokens": 20},
        {"forced_eos_token_id": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_models_own_settings_have_no_influence(
    shipped: tuple[Any, Any], own_settings: Any, settings: dict[str, Any]
) -> None:
    model, tok = shipped
    prompts = [token_ids(tok, prompt) for prompt in PROMPTS]
    before = greedy(model, tok, prompts, 8, ignore_end=True), greedy(model, tok, prompts, 8)
    for name, value in settings.items():
        setattr(own_settings, name, value)
    after = greedy(model, tok, prompts, 8, ignore_end=True), greedy(model, tok, prompts, 8)
    assert after == before
    assert model.generation_config is own_settings
    assert all(getattr(own_settings, name) == value for name, value in settings.items())


def test_a_wrapper_around_a_model_generates(shipped: tuple[Any, Any]) -> None:
    """As EasyEdit's WISE and GRACE wrap one: without an embedding or a configuration of its own."""

    class Wrapper(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return self.model.generate(*args, **kwargs)

    model, tok = shipped
    prompts = [token_ids(tok, prompt) for prompt in PROMPTS]
    assert greedy(Wrapper(model), tok, prompts, 8) == greedy(model, tok, prompts, 8)


@pytest.fixture
def training(shipped: tuple[Any, Any]) -> Iterator[nn.Dropout]:
    """The model in training mode, all but its last block, with dropout that leaves hardly anything of an answer."""
    model, _ = shipped
    dropout = nn.Dropout(0.9)
    handle = model.model.layers[0].register_forward_hook(lambda module, args, out: dropout(out))
    model.add_module("dropout", dropout)
    model.train()
    model.model.layers[-1].eval()
    yield dropout
    handle.remove()
    del model.dropout
    model.eval()


def test_a_model_in_training_mode_says_the_same_and_stays_in_it(shipped: tuple[Any, Any], training: nn.Dropout) -> None:
    model, tok = shipped
    said = generate(model, tok, PROMPTS[0])
    assert training.training
    assert not model.model.layers[-1].training
    model.eval()
    assert generate(model, tok, PROMPTS[0]) == said


def test_a_model_in_training_mode_is_asked_for_targets_as_it_would_be_served(
    shipped: tuple[Any, Any], training: nn.Dropout
) -> None:
    model, tok = shipped
    said = [{"prompt": prompt, "target_new": generate(model, tok, prompt)} for prompt in PROMPTS]
    assert says_target(model, tok, said) == [True] * len(PROMPTS)
    assert training.training
    assert not model.model.layers[-1].training


def test_an_answer_that_is_cut_off_is_marked(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    whole = generate(model, tok, PROMPTS[0])
    assert not whole.endswith(" ...")
    cut = generate(model, tok, PROMPTS[0], 1)
    assert cut.endswith(" ...")
    assert whole.startswith(cut.removesuffix(" ..."))


def test_a_prompt_without_tokens_is_refused(shipped: tuple[Any, Any]) -> None:
    with pytest.raises(RequestError, match="'' gives no tokens"):
        generate(*shipped, "")


def test_batches_hold_similar_lengths_within_their_bounds() -> None:
    lengths = [9, 1, 5, 1, 30, 5, 2]
    made = list(batches(lengths, rows=3, tokens=20))
    assert sorted(i for group in made for i in group) == list(range(7))
    assert [[lengths[i] for i in group] for group in made] == [[1, 1, 2], [5, 5], [9], [30]]
    alike = list(batches(lengths, rows=3, tokens=20, kinds=[0, 1, 0, 1, 1, 0, 0]))
    assert [[lengths[i] for i in group] for group in alike] == [[2, 5, 5], [9], [1, 1], [30]]


@pytest.mark.parametrize(
    ("text", "answer", "begins"),
    [
        ("Paris", "Paris", True),
        ("Paris, which", "Paris", True),
        ("paris\nLondon", "PARIS", True),
        ("Parisian", "Paris", False),
        ("Paris-based", "Paris", False),
        ("Paris—the city", "Paris", True),
        ("Paris's river", "Paris", True),
        ("Paris\u2019 river", "Paris", True),
        ("in Paris", "Paris", False),
        ("", "Paris", False),
        ("Par", "Paris", False),
        (' "Paris" is', "Paris", True),
        ("**Paris**", "Paris", True),
        ("the Noctuidae.", "Noctuidae", True),
        ("Noctuidae", "the Noctuidae", True),
        ("The", "The", True),
        ("A", "A", True),
        ("A, which is", "A", True),
        ("A positive", "A", True),
        ("An", "A", False),
        ("The Who", "The Who", True),
        ("vitamin C", "Vitamin A", False),
        ("New  York City", "New York", True),
        ("New Yorkers", "New York", False),
        ("US Army is", "U.S. Army", True),
        ("Washington, D.C. is", "Washington D.C.", True),
        ("Coca-Cola", "Coca", False),
        ("O\u2019Brien said", "O'Brien", True),
        ("O'Brien", "O", False),
        ("AT&T", "AT", False),
        ("C++ and", "C", False),
        ("C++ and", "C++", True),
        ("C# is", "C", False),
        ("3.5 m", "3", False),
        ("3. Then", "3", True),
        ("35", "3.5", False),
        ("1,000 men", "1000", True),
        ("1,000", "1", False),
        ("5%", "5", False),
        ("naïveté", "naïve", False),
        ("Cafe\u0301 X", "Café", True),
        ("Москва, столица", "Москва", True),
        ("Москвы", "Москва", False),
        ("東京都", "東京", True),
        ("東京。", "東京", True),
        ("กรุงเทพมหานคร", "กรุงเทพ", True),
        ("Parisです", "Paris", True),
        ("大阪", "東京", False),
        ("!!", "!", True),
        ("", "", False),
        ("anything", " ", False),
    ],
)
def test_a_text_begins_with_an_answer_at_a_words_end(text: str, answer: str, begins: bool) -> None:
    assert begins_with(text, answer) is begins


def test_an_answer_is_all_that_is_said() -> None:
    assert is_answer(" The Noctuidae. ", "noctuidae")
    assert not is_answer("Noctuidae, moths", "noctuidae")
    assert not is_answer("", "")
    assert is_answer("!", "!")
    assert not is_answer("?", "!")
