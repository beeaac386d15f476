"""Steps as a GPU takes them: the host never waits, and every step is the same work in the same memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import PARAMETER, REQUEST, assert_same, state

from kdpo_editor import edit
from kdpo_editor.engine import steps
from kdpo_editor.engine.batches import make_batches, unfinished
from kdpo_editor.engine.cached_forward import CachedForward
from kdpo_editor.engine.optimizers import Stepper
from kdpo_editor.engine.steps import Steps
from kdpo_editor.requests.tokens import tokenize

SECOND = {"prompt": "Which family does Epaspidoceras belong to?", "target_new": "Noctuidae"}
OPTIONS = [{}, {"objective": "hinge", "margin": 2.0}, {"objective": "ce"}]


@pytest.mark.parametrize("options", [*OPTIONS, {"cuda_graphs": True}], ids=str)
def test_steps_masked_on_the_device_equal_steps_not_taken(
    llama: Any, settings: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    model, tok = llama
    hparams = settings(schedule="breadth_first", stop_loss=0.05, **options)
    waited, _, first = edit(copy.deepcopy(model), tok, [SECOND, REQUEST], hparams)
    monkeypatch.setattr(steps, "host_waits", lambda device, optimizer: False)
    masked, _, second = edit(model, tok, [SECOND, REQUEST], hparams)
    assert first == second
    if options.get("objective") != "ce":  # whose losses do not get so low
        assert any(len(c.losses) < 8 for t in first for c in t.cycles), "no step was ever masked"
    assert_same(waited, state(masked))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_reads_and_writes_the_same_memory_each_time(
    llama: Any, settings: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """What a CUDA graph needs; and that the host learns nothing from it, which would end a recording."""
    model, tok = llama
    model.to(dtype).requires_grad_(False)
    weight = model.get_parameter(PARAMETER).requires_grad_(True)
    hparams = settings(**options)
    forward = CachedForward.above(model, [PARAMETER], hparams)
    edits = [one for (one,) in tokenize(tok, [SECOND, REQUEST])]
    monkeypatch.setattr(steps, "host_waits", lambda device, optimizer: False)
    (rounds,) = unfinished(make_batches(forward, edits, hparams))
    optimizer = Stepper([weight], settings(lr=1e-3))
    taking = Steps(rounds, optimizer, hparams)

    def memory() -> list[int]:
        (current,) = rounds
        assert current.batch.cache.inner is not None
        held = [
            weight,
            *optimizer.masters,
            *(t for state in optimizer.optimizer.state.values() for t in state.values()),
        ]
        held += [current.batch.cache.hidden, current.batch.cache.inner, current.pair, current.batch.mask]
        if options.get("objective") != "ce":
            assert current.head_rows is not None
            held += [current.head_rows.weight, current.lost, current.reference_pairs]
        return [tensor.data_ptr() for tensor in held]

    taking.take()
    taking.take()
    places, before = memory(), weight.detach().clone()
    for name in ("item", "tolist", "__bool__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *args: pytest.fail("the host waits for the device"))
    for _ in range(3):
        taking.take()
    monkeypatch.undo()
    assert memory() == places
    assert not torch.equal(weight, before)
    assert [len(current.history) for current in rounds] == [5]


def test_in_half_precision_many_edits_step_as_in_full(llama: Any, settings: Any) -> None:
    """Where there are many, their attention is another one than the model's own."""
    model, tok = llama
    hparams = settings(schedule="breadth_first", cycles=1, num_steps=4, stop_loss=0.0)
    requests = [{"prompt": f"What species is ZIC{n} specific to?", "target_new": "male"} for n in range(3, 13)]
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        _, _, traces = edit(copy.deepcopy(model).to(dtype), tok, requests, hparams)
        losses.append([loss for trace in traces for loss in trace.cycles[0].losses])
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_recorded_steps_equal_steps_taken(llama: Any, settings: Any, options: dict[str, Any]) -> None:
    model, tok = llama
    model.cuda()
    hparams = settings(schedule="breadth_first", **options)
    eager, _, first = edit(copy.deepcopy(model), tok, [SECOND, REQUEST], hparams)
    recorded, _, second = edit(model, tok, [SECOND, REQUEST], settings(**{**hparams.to_dict(), "cuda_graphs": True}))
    for one, other in zip(first, second, strict=True):
        assert [cycle.rejected for cycle in one.cycles] == [cycle.rejected for cycle in other.cycles]
        for cycle, again in zip(one.cycles, other.cycles, strict=True):
            assert again.losses == pytest.approx(cycle.losses, abs=1e-4)
    torch.testing.assert_close(recorded.get_parameter(PARAMETER), eager.get_parameter(PARAMETER), atol=1e-5, rtol=0)
