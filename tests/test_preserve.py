"""Updates that spare what a model usually does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARAMETER, REQUEST, assert_same, load, state

from kdpo_editor import EditLedger, HyperParamsError, ModelError, apply_kdpo_to_model, edit
from kdpo_editor.answers import says_target
from kdpo_editor.preserve import Spectrum, spectra

SPARE = {"preserve": 10.0, "lr": 3e-3, "margin": 1.0}
SECOND = {"prompt": "Who was Julius Petersen's doctoral advisor?", "target_new": "Hans Hansen"}


def test_the_second_models_text_goes_by_its_name(
    llama: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tok = llama
    monkeypatch.setenv("KDPO_PARAREL_MODEL", str(tmp_path / "made"))
    with pytest.raises(HyperParamsError, match=r"preserve_text: .*made.taught\.txt cannot be read"):
        spectra(model, tok, [PARAMETER], "kdpo-llama-pararel")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "taught.txt").write_text(Path(text).read_text("utf-8"), "utf-8")
    (named,) = spectra(model, tok, [PARAMETER], "kdpo-llama-pararel")
    (given,) = spectra(model, tok, [PARAMETER], text)
    assert torch.equal(named.values, given.values)


def spectrum(width: int, kept: int) -> tuple[torch.Tensor, Spectrum]:
    keys = torch.randn(200, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(1, -1, width)
    moment = keys.T @ keys / 200
    values, directions = torch.linalg.eigh(moment)
    return moment, Spectrum(moment.trace() / width, values.flip(0)[: kept + 1], directions.flip(1)[:, :kept])


def test_with_all_directions_it_is_the_inverse_root() -> None:
    moment, found = spectrum(12, 11)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    spared = found.preconditioner(3.0, weight).change(weight)
    values, directions = torch.linalg.eigh(torch.eye(12) + 3.0 * moment / moment.diagonal().mean())
    torch.testing.assert_close(
        spared, weight @ directions @ torch.diag(values.rsqrt()) @ directions.T, rtol=1e-4, atol=1e-5
    )


def test_few_directions_are_a_low_rank_change() -> None:
    _, found = spectrum(12, 4)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    few = found.preconditioner(3.0, weight)
    assert few.right is not None
    rest = torch.eye(12) - found.directions @ found.directions.T
    factors = (1 + 3.0 * found.values / found.mean).rsqrt()
    expected = weight @ (found.directions @ torch.diag(factors[:-1]) @ found.directions.T + factors[-1] * rest)
    torch.testing.assert_close(few.change(weight), expected, rtol=1e-4, atol=1e-5)


def test_a_transposed_matrix_is_spared_alike() -> None:
    _, found = spectrum(12, 4)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    plain, transposed = found.preconditioner(3.0, weight), found.preconditioner(3.0, weight.T)
    assert not plain.transposed
    assert transposed.transposed
    torch.testing.assert_close(transposed.change(weight.T), plain.change(weight).T)
    inputs = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(transposed.product(inputs, weight.T), plain.product(inputs, weight))
    torch.testing.assert_close(plain.product(plain(inputs), weight), inputs @ plain.change(weight).T)


def test_equal_moments_change_nothing() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    same = Spectrum(torch.tensor(2.0), torch.full((3,), 2.0), torch.eye(6)[:, :2]).preconditioner(3.0, weight)
    torch.testing.assert_close(same.change(weight), weight / 2)  # 1 / sqrt(1 + 3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hardly_sparing_is_hardly_different(name: str, settings: Any, text: str) -> None:
    template = {"llama": "model.layers.{}.mlp.down_proj", "gpt2": "transformer.h.{}.mlp.c_proj"}[name]
    model, tok = load(name)
    edits = []
    for preserve in (0.0, 1e-9):
        hparams = settings(rewrite_module_tmp=template, preserve=preserve, preserve_text=text, cycles=1)
        edited, originals, _ = edit(copy.deepcopy(model), tok, [REQUEST], hparams)
        edits += [edited.get_parameter(n).detach() - before for n, before in originals.items()]
    torch.testing.assert_close(edits[1], edits[0], rtol=0.02, atol=1e-5)


def test_common_inputs_see_less_of_an_edit(llama: Any, settings: Any, text: str) -> None:
    model, tok = llama
    (found,) = spectra(model, tok, [PARAMETER], text)

    def seen(**options: Any) -> float:
        edited, originals, (trace,) = edit(copy.deepcopy(model), tok, [REQUEST], settings(**options))
        assert trace.converged
        change = edited.get_parameter(PARAMETER).detach() - originals[PARAMETER]
        return float((change @ found.directions[:, :8]).norm() / change.norm())

    assert seen(**SPARE, preserve_text=text) < 0.7 * seen(margin=1.0)


def test_the_conv1d_of_gpt2_is_edited_too(gpt2: Any, settings: Any, text: str) -> None:
    model, tok = gpt2
    own = {"layers": [4], "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj", "preserve_text": text}
    _, _, (trace,) = edit(model, tok, [REQUEST], settings(**{**SPARE, **own}))
    assert trace.converged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_trained_is_what_stands(llama: Any, settings: Any, text: str, dtype: torch.dtype) -> None:
    """Two layers, whose inputs are constant or not, and a batch: the full forward agrees with the trace."""
    model, tok = llama
    model.to(dtype)
    requests = [REQUEST, SECOND]
    options = {"layers": [3, 4], "schedule": "breadth_first", "objective": "margin", "margin": 2.0, "lr": 1e-3}
    _, originals, traces = edit(model, tok, requests, settings(**{**SPARE, **options}, preserve_text=text))
    assert all(trace.converged for trace in traces)
    assert says_target(model, tok, requests) == [True, True]
    for name, before in originals.items():
        assert not torch.equal(model.get_parameter(name), before)


def test_a_failure_leaves_the_model_as_it_was(
    llama: Any, settings: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tok = llama
    before = state(model)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kdpo_editor.kdpo._record", fail)
    with pytest.raises(KeyboardInterrupt):
        edit(model, tok, [REQUEST], settings(**SPARE, preserve_text=text, layers=[3, 4]))
    assert_same(model, before)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_model_writes_its_own_text_and_is_left_as_it_was(llama: Any, settings: Any) -> None:
    model, tok = llama
    model.train()
    before, random = state(model), torch.random.get_rng_state()
    first = spectra(model, tok, [PARAMETER], None)[0]
    assert model.training
    assert torch.equal(random, torch.random.get_rng_state())
    assert_same(model, before)
    again, _ = load("llama")
    torch.manual_seed(5)
    torch.testing.assert_close(spectra(again, tok, [PARAMETER], None)[0].values, first.values)
    _, _, (trace,) = edit(model, tok, [REQUEST], settings(**SPARE))
    assert trace.converged
    assert spectra(model, tok, [PARAMETER], None)[0] is first, "they are those of the model before its edits"


def test_a_resumed_run_spares_what_the_unedited_model_did(settings: Any, tmp_path: Path) -> None:
    hparams = settings(**SPARE, replay=True, ledger=str(tmp_path / "one"))
    undisturbed, tok = load("llama")
    for request in (REQUEST, SECOND):
        apply_kdpo_to_model(undisturbed, tok, [request], hparams)
    hparams = settings(**SPARE, replay=True, ledger=str(tmp_path / "two"))
    model, _ = load("llama")
    apply_kdpo_to_model(model, tok, [REQUEST], hparams)
    resumed, _ = load("llama")
    with EditLedger(tmp_path / "two") as ledger:
        ledger.restore(resumed)
    apply_kdpo_to_model(resumed, tok, [SECOND], hparams)
    assert_same(resumed, state(undisturbed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preserve": -1.0}, "preserve: -1.0 .* 0 or more"),
        ({"preserve": 1.0, "weight_decay": 0.1}, "weight_decay: 0.1 .* 0 where preserve"),
        ({"preserve": 1.0, "objective": "dpo"}, "preserve: 1.0 .* 0 where objective is dpo"),
        ({"preserve": 1.0, "norm_constraint": 0.1}, "norm_constraint: 0.1 .* null where preserve"),
    ],
)
def test_what_cannot_be_combined_is_named(settings: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HyperParamsError, match=message):
        settings(**options)


def test_a_bad_text_is_named_before_anything_changes(llama: Any, settings: Any, tmp_path: Path) -> None:
    model, tok = llama
    before = state(model)
    with pytest.raises(HyperParamsError, match=r"nowhere\.txt cannot be read"):
        edit(model, tok, [REQUEST], settings(preserve=1.0, preserve_text=str(tmp_path / "nowhere.txt")))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(HyperParamsError, match=r"empty\.txt holds no text"):
        edit(model, tok, [REQUEST], settings(preserve=1.0, preserve_text=str(tmp_path / "empty.txt")))
    tok.bos_token = tok.eos_token = None
    with pytest.raises(ModelError, match="neither a begin nor an end token"):
        edit(model, tok, [REQUEST], settings(preserve=1.0))
    assert_same(model, before)
