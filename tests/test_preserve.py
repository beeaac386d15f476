"""Updates that spare what a model usually does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARAMETER, REQUEST, assert_same, load, state
from transformers.pytorch_utils import Conv1D

from kdpo_editor import EditLedger, HyperParamsError, ModelError, apply_kdpo_to_model, edit
from kdpo_editor.engine.generation import says_target
from kdpo_editor.lifelong.preserve import Preconditioner, Spectrum, _with_start, lead_moments, second_moments, spectra

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
    (named,) = spectra(model, tok, [PARAMETER], "kdpo-llama-pararel").values()
    (given,) = spectra(model, tok, [PARAMETER], text).values()
    assert torch.equal(named.values, given.values)


def moments(width: int) -> torch.Tensor:
    keys = torch.randn(200, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(1, -1, width)
    return keys.T @ keys / 200


def inverse_root(strength: float, moment: torch.Tensor) -> torch.Tensor:
    values, directions = torch.linalg.eigh(torch.eye(len(moment)) + strength * moment / moment.diagonal().mean())
    return directions @ torch.diag(values.rsqrt()) @ directions.T


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_with_all_directions_it_is_the_inverse_root() -> None:
    damping = Spectrum.of(moments(12)).damping(3.0, matrix(1))
    torch.testing.assert_close(damping(matrix(5, 12)), matrix(5, 12) @ inverse_root(3.0, moments(12)))


def test_few_directions_are_a_low_rank_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdpo_editor.lifelong.preserve.RANK", 4)
    found = Spectrum.of(moments(12))
    few = found.damping(3.0, matrix(1))
    assert few.right is not None
    assert few.right.shape == (4, 12)
    rest = torch.eye(12) - found.directions @ found.directions.T
    factors = (1 + 3.0 * found.values / found.mean).rsqrt()
    expected = found.directions @ torch.diag(factors[:-1]) @ found.directions.T + factors[-1] * rest
    torch.testing.assert_close(few(matrix(5, 12)), matrix(5, 12) @ expected, rtol=1e-4, atol=1e-5)


def test_an_update_is_damped_on_both_sides_however_its_matrix_is_stored() -> None:
    inputs, outputs = (Spectrum.of(moments(width)).damping(3.0, matrix(1)) for width in (12, 5))
    update, keys = matrix(5, 12), torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(2))
    plain, transposed = Preconditioner(inputs, outputs, False), Preconditioner(inputs, outputs, True)
    expected = inverse_root(3.0, moments(5)) @ update @ inverse_root(3.0, moments(12))
    torch.testing.assert_close(plain.change(update), expected)
    torch.testing.assert_close(transposed.change(update.T), expected.T)
    torch.testing.assert_close(transposed.product(keys, update.T), plain.product(keys, update))
    torch.testing.assert_close(outputs(plain.product(plain.before(keys), update)), keys @ expected.T)
    torch.testing.assert_close(Preconditioner(inputs, None, False).change(update), inputs(update))
    torch.testing.assert_close(Preconditioner(None, outputs, False).change(update), outputs(update.T).T)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_of_many_tokens_a_matrix_makes_what_it_makes_of_few(
    monkeypatch: pytest.MonkeyPatch, transposed: bool, bias: bool
) -> None:
    inputs, outputs = (Spectrum.of(moments(width)).damping(3.0, matrix(1)) for width in (12, 5))
    module: Any = Conv1D(5, 12) if transposed else torch.nn.Linear(12, 5, bias=bias)
    with torch.no_grad():
        module.weight.copy_(matrix(*module.weight.shape))
        if module.bias is not None:
            module.bias.copy_(matrix(5))
    start = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(3))
    forward = _with_start(module, Preconditioner(inputs, outputs, transposed), start)
    keys = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(2))
    made: list[int] = []
    change = Preconditioner.change
    monkeypatch.setattr(Preconditioner, "change", lambda *args: made.append(1) or change(*args))
    for step in (1, 2):
        # Six tokens at a time, and each alone; the matrix has five outputs.
        many = torch.cat([forward(keys[:2]), forward(keys[2:])])
        few = torch.stack([forward(row) for row in keys.flatten(0, 1)]).view_as(many)
        torch.testing.assert_close(many, few)
        gradients = [torch.autograd.grad(output.square().sum(), module.weight)[0] for output in (many, few)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(forward(keys), many)
            assert len(made) == 2 * step, "with gradient and without"
            module.weight.sub_(0.01 * gradients[0])


@pytest.mark.parametrize(
    "optimizer", [{"lr": 3e-3, "stop_loss": 0.0}, {"optimizer": "polyak", "lr": 1.2}], ids=["adam", "polyak"]
)
def test_a_matrix_is_made_anew_after_each_step(llama: Any, settings: Any, optimizer: dict[str, Any]) -> None:
    """Of so many tokens that it is made at all; what is edited then holds without it."""
    model, tok = llama
    requests = [{**REQUEST, "prompt": f"What species is ZIC{n} specific to?"} for n in range(40)]
    hparams = settings(**{**SPARE, **optimizer, "layers": [2, 4], "schedule": "breadth_first", "margin": 1.0})
    _, _, traces = edit(model, tok, requests, hparams)
    assert all(trace.converged and trace.steps > 1 for trace in traces)
    assert says_target(model, tok, requests) == [True] * len(requests)


def test_equal_moments_change_nothing() -> None:
    same = Spectrum.of(2.0 * torch.eye(6)).damping(3.0, matrix(1))
    torch.testing.assert_close(same(matrix(4, 6)), matrix(4, 6) / 2)  # 1 / sqrt(1 + 3)


def test_moments_of_leads_are_those_of_single_gradients(llama: Any) -> None:
    """Those of something added to each token's output, one text at a time."""
    model, tok = llama
    model.requires_grad_(False)
    module = model.get_submodule(PARAMETER.removesuffix(".weight"))
    windows = [torch.tensor(tok(p["prompt"])["input_ids"]) for p in (REQUEST, SECOND)]
    (found,) = lead_moments(model, [PARAMETER.removesuffix(".weight")], windows, skip=1, batch=1).values()
    assert not any(p.requires_grad for p in model.parameters())
    signs = torch.Generator().manual_seed(0)
    expected = torch.zeros(module.out_features, module.out_features, dtype=torch.float64)
    for ids in windows:
        shift = torch.zeros(len(ids), module.out_features, requires_grad=True)
        handle = module.register_forward_hook(lambda m, a, out, shift=shift: out + shift)
        logits = model(input_ids=ids.unsqueeze(0)).logits[0].float()
        handle.remove()
        sign = 2.0 * torch.randint(0, 2, (1, len(ids)), generator=signs)[0] - 1
        top = logits.topk(2).values
        lead = logits.detach().softmax(-1).amax(-1) * (top[:, 0] - top[:, 1])
        (g,) = torch.autograd.grad((sign * lead)[1:].sum(), shift)
        expected += (g[1:].T @ g[1:]).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_padding_does_not_count(llama: Any) -> None:
    model, tok = llama
    names = [PARAMETER.removesuffix(".weight")]
    windows = [torch.tensor(tok(p["prompt"])["input_ids"]) for p in (REQUEST, SECOND)]
    assert len(windows[0]) != len(windows[1])
    (together, count), (one_by_one, same) = (second_moments(model, names, windows, batch=n)[names[0]] for n in (2, 1))
    assert count == same == sum(map(len, windows))
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["preserve", "preserve_outputs"])
def test_hardly_sparing_is_hardly_different(name: str, settings: Any, text: str, side: str) -> None:
    template = {"llama": "model.layers.{}.mlp.down_proj", "gpt2": "transformer.h.{}.mlp.c_proj"}[name]
    model, tok = load(name)
    edits = []
    for strength in (0.0, 1e-9):
        hparams = settings(rewrite_module_tmp=template, **{side: strength}, preserve_text=text, cycles=1)
        edited, originals, _ = edit(copy.deepcopy(model), tok, [REQUEST], hparams)
        edits += [edited.get_parameter(n).detach() - before for n, before in originals.items()]
    torch.testing.assert_close(edits[1], edits[0], rtol=0.02, atol=1e-5)


def test_common_inputs_see_less_of_an_edit(llama: Any, settings: Any, text: str) -> None:
    model, tok = llama
    (found,) = spectra(model, tok, [PARAMETER], text).values()

    def seen(**options: Any) -> float:
        edited, originals, (trace,) = edit(copy.deepcopy(model), tok, [REQUEST], settings(**options))
        assert trace.converged
        change = edited.get_parameter(PARAMETER).detach() - originals[PARAMETER]
        return float((change @ found.directions[:, :8]).norm() / change.norm())

    assert seen(**SPARE, preserve_text=text) < 0.7 * seen(margin=1.0)


@pytest.mark.parametrize("outputs", [0.0, 3.0])
@pytest.mark.parametrize("layers", [[4], [3, 4]])
def test_the_biased_conv1d_of_gpt2_is_edited_too(
    gpt2: Any, settings: Any, text: str, layers: list[int], outputs: float
) -> None:
    model, tok = gpt2
    own = {"layers": layers, "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj", "preserve_text": text}
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.bias.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    _, _, (trace,) = edit(model, tok, [REQUEST], settings(**{**SPARE, **own}, preserve_outputs=outputs))
    assert trace.converged
    assert says_target(model, tok, [REQUEST]) == [True]


def test_what_predictions_hang_on_moves_less(llama: Any, settings: Any, text: str) -> None:
    model, tok = llama
    (found,) = spectra(model, tok, [PARAMETER], text, ["outputs"]).values()

    def moved(**options: Any) -> float:
        edited, originals, (trace,) = edit(copy.deepcopy(model), tok, [REQUEST], settings(**options))
        assert trace.converged
        change = edited.get_parameter(PARAMETER).detach() - originals[PARAMETER]
        return float((found.directions[:, :4].T @ change).norm() / change.norm())

    assert moved(preserve_outputs=10.0, lr=3e-3, margin=1.0, preserve_text=text) < 0.7 * moved(margin=1.0)


@pytest.mark.parametrize(
    "options", [{"margin": 2.0}, {"margin": 4.0, "preserve_outputs": 3.0, "cycles": 40}], ids=["inputs", "both"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_trained_is_what_stands(
    llama: Any, settings: Any, text: str, dtype: torch.dtype, options: dict[str, float]
) -> None:
    """Two layers, whose inputs are constant or not, and a batch: the full forward agrees with the trace."""
    model, tok = llama
    model.to(dtype)
    requests = [REQUEST, SECOND]
    common = {"layers": [3, 4], "schedule": "breadth_first", "objective": "margin", "lr": 1e-3, "preserve_text": text}
    _, originals, traces = edit(model, tok, requests, settings(**{**SPARE, **common, **options}))
    assert all(trace.converged for trace in traces)
    assert says_target(model, tok, requests) == [True, True]
    for name, before in originals.items():
        assert not torch.equal(model.get_parameter(name), before)


@pytest.mark.parametrize("side", ["preserve", "preserve_outputs"])
def test_a_failure_leaves_the_model_as_it_was(
    side: str, llama: Any, settings: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tok = llama
    before = state(model)
    spare = {"lr": 3e-3, "margin": 1.0, side: 10.0}

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kdpo_editor.kdpo._record", fail)
    with pytest.raises(KeyboardInterrupt):
        edit(model, tok, [REQUEST], settings(**spare, preserve_text=text, layers=[3, 4]))
    assert_same(model, before)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_model_writes_its_own_text_and_is_left_as_it_was(llama: Any, settings: Any) -> None:
    model, tok = llama
    model.train()
    before, random = state(model), torch.random.get_rng_state()
    (first,) = spectra(model, tok, [PARAMETER], None).values()
    assert model.training
    assert torch.equal(random, torch.random.get_rng_state())
    assert_same(model, before)
    again, _ = load("llama")
    torch.manual_seed(5)
    torch.testing.assert_close(spectra(again, tok, [PARAMETER], None)[PARAMETER, "inputs"].values, first.values)
    _, _, (trace,) = edit(model, tok, [REQUEST], settings(**SPARE))
    assert trace.converged
    assert spectra(model, tok, [PARAMETER], None)[PARAMETER, "inputs"] is first, (
        "they are those of the model before its edits"
    )


@pytest.mark.parametrize("outputs", [0.0, 3.0])
def test_a_resumed_run_spares_what_the_unedited_model_did(settings: Any, tmp_path: Path, outputs: float) -> None:
    hparams = settings(**SPARE, preserve_outputs=outputs, replay=True, ledger=str(tmp_path / "one"))
    undisturbed, tok = load("llama")
    for request in (REQUEST, SECOND):
        apply_kdpo_to_model(undisturbed, tok, [request], hparams)
    hparams = settings(**SPARE, preserve_outputs=outputs, replay=True, ledger=str(tmp_path / "two"))
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
        ({"preserve_outputs": -1.0}, "preserve_outputs: -1.0 .* 0 or more"),
        ({"preserve_outputs": 1.0, "weight_decay": 0.1}, "weight_decay: 0.1 .* 0 where preserve_outputs"),
        ({"preserve_outputs": 1.0, "objective": "dpo"}, "preserve_outputs: 1.0 .* 0 where objective is dpo"),
        ({"preserve_outputs": 1.0, "norm_constraint": 0.1}, "norm_constraint: 0.1 .* null where preserve_outputs"),
    ],
)
def test_what_cannot_be_combined_is_named(settings: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HyperParamsError, match=message):
        settings(**options)


def test_outputs_that_nothing_depends_on_are_named(llama: Any, settings: Any, text: str) -> None:
    model, tok = llama
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(ModelError, match=r"preserve: nothing depends on the outputs of model\.layers\.4"):
        edit(model, tok, [REQUEST], settings(preserve_outputs=1.0, preserve_text=text))


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
