"""An edit as an object: exact, kept on disk, merged, made small, given to PEFT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import PARAMETER, REQUEST, assert_same, load, state
from small import NAME, Small, change
from torch import nn

from kdpo_editor import (
    SHIPPED_MODEL,
    CompressionError,
    DamagedFileError,
    EditDelta,
    EditDiverged,
    FingerprintError,
    KDPOHyperParams,
    StorageError,
    apply_kdpo_to_model,
    edited,
    original,
)
from kdpo_editor.edits.manifest import state_hash
from kdpo_editor.engine.generation import generate, says_target
from kdpo_editor.hparams import settings_folder
from kdpo_editor.testbed import load_model, load_records

SECOND = {"prompt": "Which family does Epaspidoceras belong to?", "target_new": "Noctuidae"}


def made(seed: int = 1, names: tuple[str, ...] = (NAME,)) -> tuple[Small, EditDelta]:
    """A small model that was changed, and the change."""
    model = Small()
    originals = {}
    for name in names:
        originals |= change(model, seed, name)
    return model, EditDelta.of(model, originals, [{"prompt": "a", "target_new": "b"}])


@pytest.fixture(scope="module")
def shipped_once() -> tuple[Any, Any]:
    return load_model()


@pytest.fixture
def shipped(shipped_once: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """The shipped model, unedited, and its tokenizer."""
    before = state(shipped_once[0])
    yield shipped_once
    shipped_once[0].load_state_dict(before)


def shipped_settings(**overrides: Any) -> KDPOHyperParams:
    hparams = KDPOHyperParams.from_hparams(settings_folder() / "KDPO" / SHIPPED_MODEL)
    return KDPOHyperParams(**{**hparams.to_dict(), **overrides})


# Exact --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_reverting_and_applying_are_bit_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Small().to(dtype)
    before = state(model)
    delta = EditDelta.of(model, change(model, 1))
    after = state(model)
    delta.save(tmp_path / "d")
    for one in (delta, EditDelta.load(tmp_path / "d")):
        one.revert(model)
        assert_same(model, before)
        one.apply(model)
        assert_same(model, after)


def test_it_is_made_of_what_easyedit_returns(llama: Any, settings: Any) -> None:
    model, tok = llama
    before = state(model)
    _, weights_copy = apply_kdpo_to_model(model, tok, [REQUEST], settings(), return_orig_weights=True)
    delta = EditDelta.of(model, weights_copy, [REQUEST], settings())
    delta.revert(model)
    assert_same(model, before)


def test_the_manifest_says_what_was_done(llama: Any, settings: Any, tmp_path: Path) -> None:
    model, tok = llama
    delta = EditDelta.make(model, tok, [REQUEST], settings())
    size = delta.save(tmp_path / "d")
    assert size == sum(f.stat().st_size for f in (tmp_path / "d").iterdir())
    found = EditDelta.load(tmp_path / "d")
    assert found.info == delta.info
    assert found.info.requests == [REQUEST]
    assert found.info.outcomes[0]["converged"] is True
    assert found.info.hparams == settings().to_dict()
    assert found.info.versions["torch"] == torch.__version__
    assert found.config["model_type"] == "llama"
    assert list(found.changes) == [PARAMETER]
    assert found.nbytes == delta.nbytes == 2 * model.get_parameter(PARAMETER).nbytes
    assert {f.suffix for f in (tmp_path / "d").iterdir()} == {".json", ".safetensors"}


FRESH = """
import sys, torch
from conftest import load
from kdpo_editor import EditDelta
model, tok = load("llama")
EditDelta.load(sys.argv[1]).apply(model)
with torch.no_grad():
    torch.save(model(torch.arange(40).view(2, 20)).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_a_fresh_process_gets_bit_identical_logits(llama: Any, settings: Any, tmp_path: Path) -> None:
    model, tok = llama
    EditDelta.make(model, tok, [REQUEST, SECOND], settings()).save(tmp_path / "d")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            logits = model(torch.arange(40).view(2, 20)).logits
    finally:
        torch.set_num_threads(threads)
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "d"), str(tmp_path / "logits")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)},
        check=True,
        capture_output=True,
    )
    assert torch.equal(torch.load(tmp_path / "logits"), logits)


# Within a with statement --------------------------------------------------------------------------------------


def test_edited_is_exact_also_on_exceptions() -> None:
    model, delta = made()
    after = state(model)
    delta.revert(model)
    before = state(model)
    with edited(model, delta) as inside:
        assert inside is model
        assert_same(model, after)
    assert_same(model, before)
    with pytest.raises(KeyboardInterrupt), edited(model, delta):
        raise KeyboardInterrupt
    assert_same(model, before)


def test_original_is_exact_also_on_exceptions_and_through_several_edits() -> None:
    before = state(Small())
    model, _ = made()
    EditDelta.of(model, change(model, 2))
    EditDelta.of(model, change(model, 3, "b.weight"))
    after = state(model)
    with original(model):
        assert_same(model, before)
    assert_same(model, after)
    with pytest.raises(KeyboardInterrupt), original(model):
        raise KeyboardInterrupt
    assert_same(model, after)


def test_original_within_edited() -> None:
    model, delta = made()
    delta.revert(model)
    before = state(model)
    with edited(model, delta):
        after = state(model)
        with original(model):
            assert_same(model, before)
        assert_same(model, after)
    with original(model):
        assert_same(model, before)


def test_original_after_a_look_at_what_was_before_a_delta() -> None:
    before = state(Small())
    model, delta = made()
    with delta.before(model):
        assert_same(model, before)
    with original(model):
        assert_same(model, before)


def test_original_of_given_weights(llama: Any, settings: Any) -> None:
    model, tok = llama
    before = state(model)
    _, weights_copy = apply_kdpo_to_model(model, tok, [REQUEST], settings(), return_orig_weights=True)
    after = state(model)
    with original(model, weights_copy):
        assert_same(model, before)
    assert_same(model, after)


def test_original_says_when_it_does_not_know() -> None:
    with pytest.raises(FingerprintError, match="nothing is known of this model"), original(Small()):
        pass
    delta, model = made()[1], Small()
    with edited(model, delta):  # after which nothing more is known of it than before
        pass
    change(model, 5)
    with pytest.raises(FingerprintError, match="nothing is known of this model"), original(model):
        pass
    model, _ = made()
    change(model, 5)
    after = state(model)
    with pytest.raises(FingerprintError, match=r"a\.weight was changed by something else"), original(model):
        pass
    assert_same(model, after)


# The wrong model ----------------------------------------------------------------------------------------------


def test_a_model_in_another_state_is_refused_unless_forced() -> None:
    _, delta = made()
    model = Small()
    change(model, 9)
    before = state(model)
    with pytest.raises(FingerprintError, match=r"a\.weight is not as it was before this edit: it hashes to .* force"):
        delta.apply(model)
    assert_same(model, before)
    delta.apply(model, force=True)
    assert torch.equal(model.get_parameter(NAME), before[NAME] + delta.change()[NAME])


def test_applying_twice_and_reverting_what_is_not_applied_are_refused() -> None:
    model, delta = made()
    with pytest.raises(FingerprintError, match="is applied to this model already"):
        delta.apply(model)
    delta.revert(model)
    with pytest.raises(FingerprintError, match="is not applied to this model"):
        delta.revert(model)


def test_a_model_of_another_size_is_refused_even_if_forced() -> None:
    _, delta = made()
    model = Small(rows=6)
    before = state(model)
    for force in (False, True):
        with pytest.raises(FingerprintError, match=r"a\.weight is 6 x 3 F32 here, 4 x 3 F32 there"):
            delta.apply(model, force=force)
    with pytest.raises(FingerprintError, match=r"a\.weight, which this Linear does not have"):
        delta.apply(torch.nn.Linear(3, 4))
    assert_same(model, before)


def test_another_config_is_refused_by_name(llama: Any, settings: Any) -> None:
    model, tok = llama
    delta = EditDelta.make(model, tok, [REQUEST], settings())
    delta.revert(model)
    model.config.rope_theta = model.config.rms_norm_eps = 0.5
    with pytest.raises(FingerprintError, match=r"made on another model: rms_norm_eps is 0\.5 here, 1e-06 there"):
        delta.apply(model)
    delta.apply(model, force=True)


def test_another_dtype_is_refused_unless_forced() -> None:
    _, delta = made()
    model = Small().half()
    with pytest.raises(FingerprintError, match=r"a\.weight is 4 x 3 F16 here, 4 x 3 F32 there"):
        delta.apply(model)
    delta.apply(model, force=True)
    assert model.get_parameter(NAME).dtype == torch.float16


def test_nan_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = Small()
    originals = change(model, 1)
    with torch.no_grad():
        model.get_parameter(NAME)[0, 0] = float("nan")
    with pytest.raises(EditDiverged, match=r"NaN or infinite numbers into a\.weight"):
        EditDelta.of(model, originals)
    _, delta = made()
    huge = Small().half()
    with torch.no_grad():
        huge.get_parameter(NAME).fill_(65504)
    before = state(huge)
    tensors = delta.tensors()
    tensors[f"after:{NAME}"].add_(1e5)
    delta = EditDelta._full({}, {NAME: tensors[f"before:{NAME}"]}, {NAME: tensors[f"after:{NAME}"]}, delta.info)
    with pytest.raises(EditDiverged, match="NaN or infinite"):
        delta.apply(huge, force=True)
    assert_same(huge, before)


# Merging ------------------------------------------------------------------------------------------------------


def test_a_chain_merges_exactly() -> None:
    model = Small()
    before = state(model)
    deltas = [EditDelta.of(model, change(model, i, name)) for i, name in enumerate((NAME, "b.weight", NAME))]
    after = state(model)
    merged = EditDelta.merge(deltas)
    merged.revert(model)
    assert_same(model, before)
    merged.apply(model)
    assert_same(model, after)


def test_edits_made_side_by_side_add_up() -> None:
    (one, first), (_, second) = made(1), made(2)
    merged = EditDelta.merge([first, second])
    model = Small()
    merged.apply(model)
    wanted = one.get_parameter(NAME) + second.change()[NAME]
    assert torch.equal(model.get_parameter(NAME), wanted)
    assert len(merged.info.requests) == 2


def test_what_does_not_fit_together_is_not_merged() -> None:
    _, first = made(1)
    other = Small()
    change(other, 8)
    second = EditDelta.of(other, change(other, 9))
    with pytest.raises(FingerprintError, match=r"a\.weight: one delta does not begin where another"):
        EditDelta.merge([first, second])
    merged = EditDelta.merge([first, second], force=True)
    torch.testing.assert_close(merged.change()[NAME], first.change()[NAME] + second.change()[NAME])
    second.config = {**second.config, "hidden_size": 1}
    with pytest.raises(FingerprintError, match="different configs"):
        EditDelta.merge([first, second])
    with pytest.raises(ValueError, match="at least one"):
        EditDelta.merge([])


# Making small -------------------------------------------------------------------------------------------------


@pytest.fixture
def one_fact(shipped: tuple[Any, Any]) -> EditDelta:
    """An edit of the shipped model, taken back again."""
    model, tok = shipped
    record = load_records()[1]
    delta = EditDelta.make(model, tok, [record], shipped_settings())
    delta.revert(model)
    return delta


def low_rank(seed: int) -> EditDelta:
    model = Small()
    delta = EditDelta.of(model, change(model, seed))
    delta.revert(model)
    return delta.compress(model, None, rank=3)


def test_a_look_at_what_was_before_does_not_take_away_the_way_back() -> None:
    model, delta = Small(), low_rank(1)
    before = state(model)
    delta.apply(model)
    with delta.before(model):
        assert_same(model, before)
    delta.revert(model)
    assert_same(model, before)


def test_mergers_of_other_low_rank_forms_are_told_apart() -> None:
    first, second, third = (low_rank(seed) for seed in range(3))
    hashes = {state_hash(EditDelta.merge(some).changes) for some in ([first, second], [third, second], [second])}
    assert len(hashes) == 3
    model = Small()
    before = state(model)
    merged = EditDelta.merge([first, second])
    merged.apply(model)
    torch.testing.assert_close(model.a.weight - before[NAME], first.change()[NAME] + second.change()[NAME])
    merged.revert(model)
    assert_same(model, before)


def test_a_merger_of_many_has_no_higher_rank_than_its_matrix_and_is_read_again(tmp_path: Path) -> None:
    deltas = [low_rank(seed) for seed in range(11)]
    merged = EditDelta.merge(deltas)
    assert merged.rank == 3
    merged.save(tmp_path / "d")
    loaded = EditDelta.load(tmp_path / "d")
    torch.testing.assert_close(loaded.change()[NAME], sum(delta.change()[NAME] for delta in deltas))


def test_a_save_that_fails_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    delta = EditDelta.of(model, change(model, 1))

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("kdpo_editor.edits.delta_file.write_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            delta.save(tmp_path / "d")
    assert list((tmp_path / "d").iterdir()) == []
    delta.save(tmp_path / "d")
    assert EditDelta.load(tmp_path / "d").changes == delta.changes


def test_a_low_rank_pair_that_cannot_be_taken_back_exactly_is_refused(
    shipped: tuple[Any, Any], one_fact: EditDelta, tmp_path: Path
) -> None:
    """What it changed is known to the object that applied it alone; sums are rounded."""
    model, tok = shipped
    small = one_fact.compress(model, tok, rank=16)
    small.save(tmp_path / "d")
    before = state(model)
    small.apply(model)
    after = state(model)
    with pytest.raises(FingerprintError, match="subtracting this low-rank delta does not give"):
        EditDelta.load(tmp_path / "d").revert(model)
    assert_same(model, after)
    small.revert(model)
    assert_same(model, before)


def test_a_low_rank_pair_that_holds_the_edit(shipped: tuple[Any, Any], one_fact: EditDelta, tmp_path: Path) -> None:
    model, tok = shipped
    before = state(model)
    small = one_fact.compress(model, tok, rank=16)
    assert_same(model, before)
    assert small.is_low_rank
    assert small.rank == 16
    assert small.nbytes == 16 * (192 + 768) * 4 < one_fact.nbytes / 10
    small.save(tmp_path / "d")
    loaded = EditDelta.load(tmp_path / "d")
    for delta in (small, loaded):
        delta.apply(model)
        assert says_target(model, tok, one_fact.info.requests) == [True]
        delta.revert(model)
        assert_same(model, before)
    with edited(model, loaded):
        after = state(model)
    small.apply(model)
    assert_same(model, after)
    small.revert(model)
    assert_same(model, before)


def test_the_tolerance_chooses_the_rank(shipped: tuple[Any, Any], one_fact: EditDelta) -> None:
    model, tok = shipped
    whole = one_fact.change()
    for tolerance in (0.3, 0.05):
        small = one_fact.compress(model, tok, tolerance=tolerance)
        (name,) = small.changes
        assert (small.change()[name] - whole[name]).norm() <= 1.001 * tolerance * whole[name].norm()
        assert small.rank is not None
        assert small.rank < 192


def test_a_rank_that_loses_the_edit_is_refused_by_its_request(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    before = state(model)
    records = load_records()[:8]
    delta = EditDelta.make(model, tok, records, shipped_settings())
    after = state(model)
    with pytest.raises(CompressionError, match=r"rank 1 does not hold the edit: after ['\"].* the model says"):
        delta.compress(model, tok, rank=1)
    assert_same(model, after)
    delta.revert(model)
    assert_same(model, before)


def test_what_a_delta_does_is_that_of_the_model_in_evaluation_mode(
    shipped: tuple[Any, Any], one_fact: EditDelta
) -> None:
    model, tok = shipped
    dropout = nn.Dropout(0.9)
    handle = model.model.layers[0].register_forward_hook(lambda module, args, out: dropout(out))
    model.add_module("dropout", dropout.train())
    try:
        ((held, said),) = one_fact.behaviour(model, tok)
        assert held
        assert said == one_fact.info.requests[0]["target_new"]
        assert one_fact.compress(model, tok, rank=16).rank == 16
        assert dropout.training
    finally:
        handle.remove()
        del model.dropout


def test_compression_asks_for_one_of_rank_and_tolerance(shipped: tuple[Any, Any], one_fact: EditDelta) -> None:
    for given in ({}, {"rank": 1, "tolerance": 0.1}, {"rank": 0}, {"tolerance": 1.0}, {"tolerance": -0.1}):
        with pytest.raises(ValueError, match=r"rank|tolerance"):
            one_fact.compress(*shipped, **given)


def test_low_rank_forms_merge_into_one(shipped: tuple[Any, Any], one_fact: EditDelta) -> None:
    model, tok = shipped
    other = EditDelta.make(model, tok, [load_records()[4]], shipped_settings())
    other.revert(model)
    small = [delta.compress(model, tok, tolerance=0.05) for delta in (one_fact, other)]
    merged = EditDelta.merge(small)
    assert merged.rank == sum(delta.rank or 0 for delta in small)
    (name,) = merged.changes
    wanted = sum(delta.change()[name] for delta in small)
    assert torch.allclose(merged.change()[name], wanted, atol=1e-6)
    with pytest.raises(ValueError, match="full and low-rank"):
        EditDelta.merge([one_fact, small[0]])


# For PEFT -----------------------------------------------------------------------------------------------------


def test_peft_loads_the_adapter_and_says_the_same(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tok = shipped
    before = state(model)
    flags = [p.requires_grad for p in model.parameters()]
    records = load_records()[:5]
    delta = EditDelta.make(model, tok, records, shipped_settings())
    wanted = [generate(model, tok, r["prompt"]) for r in records]
    delta.revert(model)
    rank = delta.save_lora(tmp_path / "adapter", model, tok)
    assert_same(model, before)
    assert flags == [p.requires_grad for p in model.parameters()], "PEFT left its marks"
    assert rank in (8, 16, 32, 64, 128, 256)
    fresh, _ = load_model()
    unedited = [generate(fresh, tok, r["prompt"]) for r in records]
    adapted = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    assert [generate(adapted, tok, r["prompt"]) for r in records] == wanted
    assert wanted != unedited
    assert {f.suffix for f in (tmp_path / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}


def test_gpt2s_turned_matrices_are_exported_too(gpt2: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tok = gpt2
    hparams = KDPOHyperParams(
        model_name="gpt2-mini", layers=[3, 4], rewrite_module_tmp="transformer.h.{}.mlp.c_proj", lr=1e-3
    )
    delta = EditDelta.make(model, tok, [REQUEST], hparams)
    wanted = generate(model, tok, REQUEST["prompt"])
    assert wanted != generate(load("gpt2")[0], tok, REQUEST["prompt"])
    rank = delta.save_lora(tmp_path / "adapter", model, tok, rank=64)
    adapted = peft.PeftModel.from_pretrained(load("gpt2")[0], str(tmp_path / "adapter"))
    assert generate(adapted, tok, REQUEST["prompt"]) == wanted
    assert rank == 64


def test_an_adapter_that_does_not_hold_the_edit_is_not_written(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, tok = shipped
    delta = EditDelta.make(model, tok, load_records()[:8], shipped_settings())
    delta.revert(model)
    with pytest.raises(CompressionError, match="an adapter of rank 1 does not hold the edit"):
        delta.save_lora(tmp_path / "adapter", model, tok, rank=1)
    assert list(tmp_path.iterdir()) == []


# Files that are not to be trusted -----------------------------------------------------------------------------


def rewrite(folder: Path, **fields: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest.update(fields)
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", "x.pt", "", "a\0.safetensors"]
)
def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path, name: str) -> None:
    _, delta = made()
    delta.save(tmp_path / "d")
    (tmp_path / "elsewhere.safetensors").write_bytes(next((tmp_path / "d").glob("*.safetensors")).read_bytes())
    rewrite(tmp_path / "d", file=name)
    with pytest.raises(DamagedFileError, match="must name a safetensors file in that folder"):
        EditDelta.load(tmp_path / "d")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    _, delta = made()
    delta.save(tmp_path / "d")
    file = next((tmp_path / "d").glob("*.safetensors"))
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedFileError, match="is a link"):
        EditDelta.load(tmp_path / "d")


def test_sizes_are_compared_before_anything_is_read(tmp_path: Path) -> None:
    """A manifest and a header that agree on a matrix of 4 TB, in a file as long as that, most of it a hole."""
    _, delta = made()
    delta.save(tmp_path / "d")
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text("utf-8"))
    for values in (*manifest["changes"][NAME].values(), *manifest["stored"].values()):
        values["shape"] = [1 << 20, 1 << 20]
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    size = 1 << 42
    header = {
        key: {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [i * size, (i + 1) * size]}
        for i, key in enumerate(manifest["stored"])
    }
    data = json.dumps(header).encode()
    with open(tmp_path / "d" / manifest["file"], "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + 2 * size)
    loaded = EditDelta.load(tmp_path / "d")
    with pytest.raises(FingerprintError, match=r"a\.weight is 4 x 3 F32 here, 1048576 x 1048576 F32 there"):
        loaded.apply(Small())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "is damaged: .*not fully cover"),
        (lambda data: data + b"\0", "is damaged: .*not fully cover"),
        (lambda data: (1 << 60).to_bytes(8, "little") + data[8:], "is damaged: .*header"),
        (lambda data: data[:4], "is damaged: .*header"),
        (lambda data: data.replace(b"F32", b"I32"), "is 4 x 3 I32; it must be 4 x 3 F32"),
        (lambda data: safetensors.torch.save({"other": torch.zeros(1)}), "holds other, not"),
    ],
)
def test_a_damaged_tensor_file_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    _, delta = made()
    delta.save(tmp_path / "d")
    file = next((tmp_path / "d").glob("*.safetensors"))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DamagedFileError, match=message) as caught:
        EditDelta.load(tmp_path / "d")
    assert file.name in str(caught.value)


def test_a_flipped_bit_is_found_before_the_model_is_changed(tmp_path: Path) -> None:
    _, delta = made()
    delta.save(tmp_path / "d")
    file = next((tmp_path / "d").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    model = Small()
    before = state(model)
    with pytest.raises(DamagedFileError, match="bytes do not match its hash"):
        EditDelta.load(tmp_path / "d").apply(model)
    assert_same(model, before)


def test_a_folder_with_something_else_is_not_overwritten(tmp_path: Path) -> None:
    _, delta = made()
    (tmp_path / "thesis.tex").write_text("...", "utf-8")
    with pytest.raises(StorageError, match="exists and is not a saved delta"):
        delta.save(tmp_path)
    with pytest.raises(StorageError, match=r"cannot read .*manifest\.json"):
        EditDelta.load(tmp_path)


def test_saving_again_replaces_the_delta_and_leaves_nothing(tmp_path: Path) -> None:
    _, first = made(1)
    _, second = made(2)
    first.save(tmp_path / "d")
    second.save(tmp_path / "d")
    assert len(list((tmp_path / "d").iterdir())) == 2
    assert EditDelta.load(tmp_path / "d").changes == second.changes


def test_without_requests_the_adapter_is_the_whole_change(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, tok = shipped
    _, originals = apply_kdpo_to_model(model, tok, load_records()[:1], shipped_settings(), return_orig_weights=True)
    delta = EditDelta.of(model, originals)
    assert delta.save_lora(tmp_path / "adapter", model, tok) == 256  # of 192, and zeros


def test_a_change_of_nothing_makes_no_adapter(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(CompressionError, match="changed no weight"):
        EditDelta.of(shipped[0], {}).save_lora(tmp_path / "adapter", *shipped)
