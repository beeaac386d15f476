"""Texts that a model writes: those of transformers' ``generate``, on every architecture people edit."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_replay import ARCHITECTURES, tiny

from kdpo_editor.engine.writing import Written, write

END = 2
TOK = SimpleNamespace(eos_token_id=END)
STARTS = torch.tensor([[5, 9, 11, 30, 6], [7, 7, 8, 90, 41], [12, 3, 55, 2, 20]])
LENGTH = 12
DRAWS = 4


def model_that_ends(name: str) -> Any:
    """Its texts are of many lengths."""
    model, _, _ = tiny(name)
    forward = model.forward

    def more_ends(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        logits = 0.3 * output.logits
        logits[..., END] = logits.logsumexp(-1) - 1.5
        output.logits = logits
        return output

    more_ends.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = more_ends
    return model


def generated(model: Any, greedy: bool) -> list[list[int]]:
    rows = STARTS.repeat_interleave(DRAWS, 0)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        texts = model.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            do_sample=not greedy,
            top_k=0,
            max_new_tokens=LENGTH,
            eos_token_id=END,
            pad_token_id=END,
        )
    start = STARTS.shape[1]
    return [text[: text.index(END, start)] if END in text[start:] else text for text in texts.tolist()]


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_texts_are_those_of_generate(name: str, greedy: bool) -> None:
    model = model_that_ends(name)
    texts = write(model, TOK, STARTS, LENGTH, draws=DRAWS, greedy=greedy, seed=3)
    assert [text.ids for text in texts] == generated(model, greedy)
    if not greedy:
        assert len({len(text.ids) for text in texts}) > 2
        assert any(text.ended for text in texts)
    for text in texts:
        check(model, text, greedy)


@torch.no_grad()
def check(model: Any, text: Written, greedy: bool) -> None:
    """What is noted of each token is what the whole text gives without a cache."""
    assert text.ended or len(text.new) == LENGTH
    logits = model(torch.tensor([text.ids])).logits[0, text.start - 1 :].float()
    values, tokens = logits[: len(text.choices)].topk(2)
    assert text.choices == tokens[:, 0].tolist()
    torch.testing.assert_close(torch.tensor(text.leads), values[:, 0] - values[:, 1], atol=1e-3, rtol=1e-3)
    if greedy:
        assert text.choices == text.new + [END] * text.ended


def test_a_model_without_a_cache_writes_the_same() -> None:
    model = model_that_ends("llama")
    texts = write(model, TOK, STARTS, LENGTH, draws=DRAWS, seed=3)
    forward = model.forward

    def uncached(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, "use_cache": False})

    uncached.__signature__ = forward.__signature__  # type: ignore[attr-defined]
    model.forward = uncached
    again = write(model, TOK, STARTS, LENGTH, draws=DRAWS, seed=3)
    assert [text.ids for text in again] == [text.ids for text in texts]
