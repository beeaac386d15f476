"""What was tried once of a model is known to the next process that has one built alike, and to no other."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cached_forward import ARCHITECTURES, POSITIONS, change, forward_of, full, padded, tiny
from test_prefix import BEGIN, TRAINED, trained_forward
from torch import nn
from transformers import LlamaForCausalLM

from kdpo_editor.engine import examination
from kdpo_editor.engine.findings import Findings


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and from then on a model that is tried fails the test."""

    def fail(*args: Any) -> Any:
        raise AssertionError("a model was tried again")

    def forbid() -> None:
        for name in ("_begin", "find_narrow", "_freezes"):
            monkeypatch.setattr(examination, name, fail)

    return forbid


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_another_model_built_alike_is_not_tried_and_exact(name: str, untried: Any) -> None:
    """With other weights, as another checkpoint or the same after edits has them."""
    ids, mask = padded()
    _, first, _ = trained_forward(name)
    first.capture_frozen(ids, POSITIONS, TRAINED)
    untried()
    model, forward, weights = trained_forward(name)
    for parameter in model.parameters():
        change(parameter)
    cache, frozen, _ = forward.capture_frozen(ids, POSITIONS, TRAINED)
    for weight in weights:
        change(weight)
    expected = full(model, ids, mask)
    torch.testing.assert_close(forward.logits(forward.from_cache(cache)), expected, atol=1e-4, rtol=1e-4)
    if frozen is not None:
        again = forward.freeze(cache)
        assert again is not None
        read = BEGIN[:, None] <= POSITIONS
        torch.testing.assert_close(
            forward.logits(forward.from_cache(again[0]))[read], expected[read], atol=1e-4, rtol=1e-4
        )


class Renamed(LlamaForCausalLM):
    """The same by another name, whose code may be other."""


def other_class() -> Any:
    model, _, _ = tiny("llama")
    return Renamed(model.config).eval()


def other_dtype() -> Any:
    return tiny("llama", torch.bfloat16)[0]


def other_setting() -> Any:
    model, _, _ = tiny("llama")
    model.config.rms_norm_eps *= 2
    return model


def other_attention() -> Any:
    model, _, _ = tiny("llama")
    model.set_attn_implementation("eager")
    return model


def wrapped_matrix() -> Any:
    model, _, _ = tiny("llama")
    model.model.layers[0].mlp.down_proj = nn.Sequential(model.model.layers[0].mlp.down_proj)
    return model


@pytest.mark.parametrize("make", [other_class, other_dtype, other_setting, other_attention, wrapped_matrix])
def test_a_model_built_otherwise_is_tried_itself(make: Any) -> None:
    mine, others = Findings.of(tiny("llama")[0]), Findings.of(make())
    assert mine.file is not None
    assert others.file is not None
    assert mine.file != others.file


def test_what_has_a_hook_or_a_forward_of_its_own_is_not_kept_on_disk() -> None:
    hooked, _, _ = tiny("llama")
    hooked.model.norm.register_forward_hook(lambda module, args, output: output)
    patched, _, _ = tiny("llama")
    patched.model.norm.forward = patched.model.norm.forward
    assert Findings.of(hooked).file is None
    assert Findings.of(patched).file is None


def test_a_model_that_was_changed_since_has_findings_of_its_own() -> None:
    model, _, _ = tiny("llama")
    first = Findings.of(model)
    assert Findings.of(model) is first
    model.bfloat16()
    other = Findings.of(model)
    assert other.file != first.file
    model.float()
    assert Findings.of(model).file == first.file
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert Findings.of(model).file is None
    handle.remove()
    assert Findings.of(model).file == first.file


@pytest.mark.parametrize("damage", ["", "{", '{"checksum": "", "found": {}}', "[1]", "changed"])
def test_a_damaged_file_is_as_good_as_none(damage: str) -> None:
    _, forward, _ = forward_of("llama", 1)
    forward.capture(padded()[0], POSITIONS)
    file = forward.findings.file
    assert file is not None
    stored = json.loads(file.read_text("utf-8"))
    stored["found"][next(iter(stored["found"]))] = {"inside": False}
    file.write_text(json.dumps(stored) if damage == "changed" else damage, "utf-8")
    assert Findings(file).known == {}


def test_a_cache_that_cannot_be_written_to_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("KDPO_CACHE", str(tmp_path / "file"))
    _, forward, _ = forward_of("llama", 1)
    with caplog.at_level(logging.WARNING, "kdpo_editor"):
        forward.capture(padded()[0], POSITIONS)
    assert "cannot be kept" in caplog.text
    assert forward.findings.known
