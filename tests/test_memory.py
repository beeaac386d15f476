"""A call of many requests stays within ``memory_budget``: inputs, keys and values, graphs and logits together."""

from __future__ import annotations

import gc
import weakref
from itertools import chain
from typing import Any

import pytest
import torch
from conftest import PARAMETER
from live_bytes import peak_bytes

from kdpo_editor import edit
from kdpo_editor.engine.cached_forward import CachedForward
from kdpo_editor.engine.grouping import group
from kdpo_editor.engine.steps import run_cycle
from kdpo_editor.lifelong import loop
from kdpo_editor.requests.tokens import EditTokens
from kdpo_editor.testbed import load_model, load_records

LIFELONG = {"objective": "hinge", "margin": 2.0, "optimizer": "polyak", "lr": 1.2, "layers": [0, 1]}
MANY = {"context_templates": 3, "schedule": "breadth_first", "cycles": 1, "num_steps": 2}


@pytest.mark.parametrize(
    ("budget", "requests", "fact_token", "frozen", "bf16"),
    [
        (7e7, 16, "subject_last", True, False),
        (6e7, 24, "subject_last", True, False),
        (5e7, 16, "subject_last", True, True),
        (3e7, 24, "subject_last", False, False),
        (3e7, 24, "all", False, False),
    ],
    ids=["keys-and-values", "keys-and-values-to-the-full", "copy-in-bfloat16", "whole-rows", "all-tokens"],
)
def test_a_call_of_many_stays_within_its_budget(
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    budget: float,
    requests: int,
    fact_token: str,
    frozen: bool,
    bf16: bool,
) -> None:
    """Whole rows would take three times the budget and more. They are run where keys and values would take too much of
    it."""
    model, tok = load_model()
    records = [{key: r[key] for key in ("prompt", "target_new", "subject")} for r in load_records()[: requests + 1]]
    hparams = settings(**LIFELONG, **MANY, fact_token=fact_token, memory_budget=budget, bf16=bf16)
    edit(model, tok, records[:1], hparams)  # the first edit of a model examines it
    captured: list[bool] = []
    capture = CachedForward.capture_frozen

    def noted(self: CachedForward, *args: Any) -> Any:
        found = capture(self, *args)
        captured.append(found[1] is not None)
        return found

    monkeypatch.setattr(CachedForward, "capture_frozen", noted)
    assert peak_bytes(lambda: edit(model, tok, records[1:], hparams)) <= budget
    assert any(captured) is frozen


@pytest.mark.parametrize("many", [4, 16])
def test_mini_batches_are_as_large_as_the_budget_lets_them_be(llama: Any, settings: Any, many: int) -> None:
    """Half of it is for what is captured, which is held twice of those that are trained."""
    model, _ = llama
    forward = CachedForward.above(model, [PARAMETER], settings())
    edits = [EditTokens(torch.zeros(7, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)) for _ in range(16)]
    row = 2 * edits[0].length * sum(model.get_parameter(PARAMETER).shape) * 4
    batches, _ = group(forward, edits, 2 * many * row)
    assert [sum(map(len, parts)) for parts in batches] == [many] * (16 // many)


def test_a_cycle_leaves_nothing_to_the_garbage_collector(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the batches of several cycles would be in memory side by side."""
    model, tok = load_model()
    records = [{key: r[key] for key in ("prompt", "target_new", "subject")} for r in load_records()[:16]]
    trained: list[weakref.ref[Any]] = []
    left: list[int] = []

    def noted(work: Any, *args: Any) -> None:
        run_cycle(work, *args)
        left.append(sum(batch() is not None for batch in trained))
        trained[:] = [weakref.ref(pairs.batch) for pairs in chain(*work)]

    monkeypatch.setattr(loop, "run_cycle", noted)
    hparams = settings(**LIFELONG, **{**MANY, "cycles": 4}, fact_token="subject_last")
    gc.disable()
    try:
        edit(model, tok, records, hparams)
    finally:
        gc.enable()
    assert left == [0, 0, 0, 0]
    assert trained
