"""Where there is a GPU: an edit there beside the same edit on the CPU, with every kind of setting."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import PARAMETER, REQUEST, assert_same, state

from kdpo_editor import EditDiverged, KDPOHyperParams, apply_kdpo_to_model, edit
from kdpo_editor.engine.generation import says_target
from kdpo_editor.engine.weights import find_matrices, restore
from kdpo_editor.hparams import settings_folder
from kdpo_editor.lifelong.replay import ReplayBuffer
from kdpo_editor.testbed import load_model, load_records

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

REQUESTS = [
    {**REQUEST, "subject": "ZIC3"},
    {
        "prompt": "Which family does Epaspidoceras belong to?",
        "target_new": "Noctuidae",
        "subject": "Epaspidoceras",
        "rephrases": ["What family are Epaspidoceras?"],
    },
]
LIFELONG = {"objective": "hinge", "margin": 2.0, "append_eos": True, "optimizer": "polyak", "lr": 1.5}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"schedule": "breadth_first"},
    {"schedule": "breadth_first", "cuda_graphs": True},
    {"objective": "ce", "lr": 3e-4, "cycles": 3},
    {"layers": [1, 2], "fact_token": "subject"},
    {"update_scale": 2.0},
    {**LIFELONG},
    {**LIFELONG, "schedule": "breadth_first", "replay": True},
    {**LIFELONG, "layers": [1, 2], "fact_token": "subject_last", "replay": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_edit_on_a_gpu_is_the_edit_on_a_cpu(llama: Any, settings: Any, options: dict[str, Any]) -> None:
    model, tok = llama
    there = copy.deepcopy(model).cuda()
    hparams = settings(**options)
    for requests in [[request] for request in REQUESTS] if hparams.replay else [REQUESTS]:
        model, _, first = edit(model, tok, requests, hparams)
        there, _, second = edit(there, tok, requests, hparams)
        for one, other in zip(first, second, strict=True):
            assert one.converged == other.converged
            assert [c.rejected for c in one.cycles] == [c.rejected for c in other.cycles]
            for cycle, again in zip(one.cycles, other.cycles, strict=True):
                assert again.losses == pytest.approx(cycle.losses, abs=2e-3)
    for layer in hparams.layers:
        name = PARAMETER.replace("4", str(layer))
        torch.testing.assert_close(there.get_parameter(name).cpu(), model.get_parameter(name), atol=1e-3, rtol=0)
    if hparams.replay:
        kept = ReplayBuffer.of(there, find_matrices(there, hparams)).entries
        assert len(kept) == 3
        assert {one.hidden.device.type for one in kept} == {"cuda"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", ["KDPO", "KDPO-L"])
def test_a_shipped_recipe_edits_on_a_gpu(recipe: str, dtype: torch.dtype) -> None:
    model, tok = load_model("cuda")
    model.to(dtype)
    hparams = KDPOHyperParams.from_hparams(settings_folder() / recipe / "kdpo-llama-knowedit")
    requests = [{k: r[k] for k in ("prompt", "target_new", "subject")} for r in load_records()[:8]]
    before = state(model)
    model, originals = apply_kdpo_to_model(model, tok, requests, hparams, return_orig_weights=True)
    held = says_target(model, tok, requests)
    assert sum(held) >= (7 if recipe == "KDPO" else 8), held
    assert {original.device.type for original in originals.values()} == {"cuda"}
    restore(find_matrices(model, hparams), originals)
    assert_same(model, before)


def test_a_failure_on_a_gpu_leaves_the_model_as_it_was(llama: Any, settings: Any) -> None:
    model, tok = llama
    model.cuda()
    before = state(model)
    with pytest.raises(EditDiverged, match=r"loss became|NaN or infinite|times its norm"):
        edit(model, tok, REQUESTS, settings(lr=1e30, cycles=20))
    assert_same(model, before)
