"""``mom2_weight``: steps preconditioned by the second moments of a matrix's inputs, which are computed once."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARAMETER, REQUEST, assert_same, load, state
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from kdpo_editor import EditDelta, EditLedger, HyperParamsError, apply_kdpo_to_model, edit
from kdpo_editor.compare.run.scorer import HELD_OUT
from kdpo_editor.engine.generation import says_target
from kdpo_editor.engine.steps import run_cycle
from kdpo_editor.lifelong import loop, second_moments
from kdpo_editor.lifelong.contexts import TEMPLATES
from kdpo_editor.lifelong.names import name_windows, names_in
from kdpo_editor.lifelong.preconditioning import Preconditioner, _with_start, damping
from kdpo_editor.lifelong.second_moments import GENERAL_TEXT, Spectrum, fingerprint, remember_copy, spectra

SECOND = {"prompt": "Which family does Epaspidoceras belong to?", "target_new": "Noctuidae"}
SETTINGS = {"mom2_weight": 10.0, "lr": 3e-3, "margin": 1.0}
MODULE = PARAMETER.removesuffix(".weight")


def moments(width: int) -> torch.Tensor:
    keys = torch.randn(200, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(1, -1, width)
    return keys.T @ keys / 200


def inverse_root(strength: float, moment: torch.Tensor) -> torch.Tensor:
    values, directions = torch.linalg.eigh(torch.eye(len(moment)) + strength * moment / moment.diagonal().mean())
    return directions @ torch.diag(values.rsqrt()) @ directions.T


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# What steps are made of ---------------------------------------------------------------------------------------


def test_with_all_directions_it_is_the_inverse_root() -> None:
    found = damping(Spectrum.of(moments(12)), 3.0, matrix(1))
    torch.testing.assert_close(found(matrix(5, 12)), matrix(5, 12) @ inverse_root(3.0, moments(12)))


def test_few_directions_are_a_low_rank_change() -> None:
    found = Spectrum.of(moments(12), rank=4)
    few = damping(found, 3.0, matrix(1))
    assert few.right is not None
    assert few.right.shape == (4, 12)
    rest = torch.eye(12) - found.directions @ found.directions.T
    factors = (1 + 3.0 * found.values / found.mean).rsqrt()
    expected = found.directions @ torch.diag(factors[:-1]) @ found.directions.T + factors[-1] * rest
    torch.testing.assert_close(few(matrix(5, 12)), matrix(5, 12) @ expected, rtol=1e-4, atol=1e-5)


def test_equal_moments_change_nothing() -> None:
    same = damping(Spectrum.of(2.0 * torch.eye(6)), 3.0, matrix(1))
    torch.testing.assert_close(same(matrix(4, 6)), matrix(4, 6) / 2)  # 1 / sqrt(1 + 3)


def test_an_update_is_damped_however_its_matrix_is_stored() -> None:
    inputs = damping(Spectrum.of(moments(12)), 3.0, matrix(1))
    update, keys = matrix(5, 12), torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(2))
    plain, transposed = Preconditioner(inputs, False), Preconditioner(inputs, True)
    expected = update @ inverse_root(3.0, moments(12))
    torch.testing.assert_close(plain.change(update), expected)
    torch.testing.assert_close(transposed.change(update.T), expected.T)
    torch.testing.assert_close(plain.product(plain.before(keys), update), keys @ expected.T)
    torch.testing.assert_close(transposed.product(keys, update.T), plain.product(keys, update))


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_of_many_tokens_a_matrix_makes_what_it_makes_of_few(transposed: bool, bias: bool, constant: bool) -> None:
    module: Any = Conv1D(5, 12) if transposed else torch.nn.Linear(12, 5, bias=bias)
    with torch.no_grad():
        module.weight.copy_(matrix(*module.weight.shape))
        if module.bias is not None:
            module.bias.copy_(matrix(5))
    start = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(3))
    inputs = damping(Spectrum.of(moments(12)), 3.0, matrix(1))
    forward = _with_start(module, Preconditioner(inputs, transposed), start)
    keys = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(2)).requires_grad_(not constant)
    for _ in range(2):
        # Twelve tokens at a time, and each alone; the matrix has five outputs.
        many = forward(keys)
        few = torch.stack([forward(row) for row in keys.flatten(0, 1)]).view_as(many)
        torch.testing.assert_close(many, few)
        gradients = [torch.autograd.grad(output.square().sum(), module.weight)[0] for output in (many, few)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(forward(keys), many)
            module.weight.sub_(0.01 * gradients[0])


# Edits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [{"lr": 3e-3, "stop_loss": 0.0}, {"optimizer": "polyak", "lr": 1.2, "objective": "hinge"}],
    ids=["adam", "polyak"],
)
def test_many_edits_of_two_layers_hold_without_what_they_were_trained_by(
    llama: Any, settings: Any, text: str, optimizer: dict[str, Any]
) -> None:
    model, tok = llama
    requests = [{**REQUEST, "prompt": f"What species is ZIC{n} specific to?"} for n in range(40)]
    own = {**SETTINGS, **optimizer, "layers": [2, 4], "schedule": "breadth_first", "mom2_dataset": text}
    _, _, traces = edit(model, tok, requests, settings(**own))
    assert all(trace.converged for trace in traces)
    assert sum(trace.steps for trace in traces) >= len(requests)
    assert says_target(model, tok, requests) == [True] * len(requests)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hardly_any_weight_is_hardly_different(name: str, settings: Any, text: str) -> None:
    template = {"llama": "model.layers.{}.mlp.down_proj", "gpt2": "transformer.h.{}.mlp.c_proj"}[name]
    model, tok = load(name)
    edits = []
    for strength in (0.0, 1e-9):
        hparams = settings(rewrite_module_tmp=template, mom2_weight=strength, mom2_dataset=text, cycles=1)
        edited, originals, _ = edit(copy.deepcopy(model), tok, [REQUEST], hparams)
        edits += [edited.get_parameter(n).detach() - before for n, before in originals.items()]
    torch.testing.assert_close(edits[1], edits[0], rtol=0.02, atol=1e-5)


def test_common_inputs_see_less_of_an_edit(llama: Any, settings: Any, text: str) -> None:
    model, tok = llama
    (found,) = spectra(model, tok, [PARAMETER], text, 1000).values()

    def seen(**options: Any) -> float:
        edited, originals, (trace,) = edit(copy.deepcopy(model), tok, [REQUEST], settings(**options))
        assert trace.converged
        change = edited.get_parameter(PARAMETER).detach() - originals[PARAMETER]
        return float((change @ found.directions[:, :8]).norm() / change.norm())

    assert seen(**SETTINGS, mom2_dataset=text) < 0.7 * seen(margin=1.0)


@pytest.mark.parametrize("layers", [[4], [3, 4]])
def test_the_biased_conv1d_of_gpt2_is_edited_too(gpt2: Any, settings: Any, text: str, layers: list[int]) -> None:
    model, tok = gpt2
    own = {"layers": layers, "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj", "mom2_dataset": text}
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.bias.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    _, _, (trace,) = edit(model, tok, [REQUEST], settings(**{**SETTINGS, **own}))
    assert trace.converged
    assert says_target(model, tok, [REQUEST]) == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_trained_is_what_stands(llama: Any, settings: Any, text: str, dtype: torch.dtype) -> None:
    """Two layers, whose inputs are constant or not, and a batch: the full forward agrees with the trace."""
    model, tok = llama
    model.to(dtype)
    requests = [REQUEST, SECOND]
    own = {"layers": [3, 4], "schedule": "breadth_first", "objective": "hinge", "margin": 2.0, "lr": 1e-3}
    _, originals, traces = edit(model, tok, requests, settings(**{**SETTINGS, **own, "mom2_dataset": text}))
    assert all(trace.converged for trace in traces)
    assert says_target(model, tok, requests) == [True, True]
    for name, before in originals.items():
        assert not torch.equal(model.get_parameter(name), before)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_failure_leaves_the_model_as_it_was(
    llama: Any, settings: Any, text: str, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    model, tok = llama
    before = state(model)

    def failing(*args: Any) -> None:
        run_cycle(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "run_cycle", failing)
    with pytest.raises(KeyboardInterrupt):
        edit(model, tok, [REQUEST], settings(**SETTINGS, mom2_dataset=text, layers=[3, 4], bf16=bf16))
    assert_same(model, before)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_bad_text_is_named_before_anything_changes(llama: Any, settings: Any, tmp_path: Path) -> None:
    model, tok = llama
    before = state(model)
    with pytest.raises(HyperParamsError, match=r"nowhere\.txt cannot be read"):
        edit(model, tok, [REQUEST], settings(mom2_weight=1.0, mom2_dataset=str(tmp_path / "nowhere.txt")))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(HyperParamsError, match=r"empty\.txt holds no text"):
        edit(model, tok, [REQUEST], settings(mom2_weight=1.0, mom2_dataset=str(tmp_path / "empty.txt")))
    assert_same(model, before)


# Moments ------------------------------------------------------------------------------------------------------


def test_neither_padding_nor_first_tokens_count(llama: Any) -> None:
    model, tok = llama
    windows = [torch.tensor(tok(p["prompt"])["input_ids"]) for p in (REQUEST, SECOND)]
    assert len(windows[0]) != len(windows[1])
    together, count = second_moments.second_moments(model, [MODULE], windows)[MODULE]
    keys: list[torch.Tensor] = []
    handle = model.get_submodule(MODULE).register_forward_pre_hook(lambda _, args: keys.append(args[0][0, 1:]))
    with torch.no_grad():
        for ids in windows:
            model(ids[None])
    handle.remove()
    rows = torch.cat(keys)
    assert count == len(rows)
    torch.testing.assert_close(together.float(), rows.T @ rows, rtol=1e-4, atol=1e-6)


def test_a_pass_ends_with_the_last_matrix_asked_for(llama: Any) -> None:
    model, _ = llama
    later: list[int] = []
    model.model.layers[5].register_forward_pre_hook(lambda *_: later.append(1))
    found = second_moments.second_moments(model, [MODULE.replace("4", "2"), MODULE], [torch.arange(9)])
    assert {count for _, count in found.values()} == {8}
    assert later == []


def test_the_number_of_tokens_is_bounded(llama: Any) -> None:
    _, tok = llama
    lines = GENERAL_TEXT.read_text("utf-8").splitlines()
    windows = second_moments._windows(tok, lines, 1000)
    assert 990 <= sum(map(len, windows)) <= 1000


def test_the_general_text_has_nothing_of_what_perplexity_is_measured_on() -> None:
    held_out = HELD_OUT.read_text("utf-8")
    lines = GENERAL_TEXT.read_text("utf-8").splitlines()
    assert len(lines) == 640
    sentences = {s.strip() for line in lines for s in line.split(". ") if len(s) > 40}
    assert not [s for s in sentences if s in held_out]


def test_of_a_name_only_its_last_token_counts(llama: Any) -> None:
    model, _ = llama
    windows = [torch.arange(9), torch.arange(20, 24), torch.arange(5, 12)]
    sums, count = second_moments.second_moments(model, [MODULE], windows, "last")[MODULE]
    expected = torch.zeros_like(sums)
    for ids in windows:
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(MODULE).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(ids[None])
        handle.remove()
        expected += torch.outer(seen[0][0, -1], seen[0][0, -1]).double()
    assert count == 3
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-6)


def test_first_tokens_are_read_by_themselves(llama: Any) -> None:
    model, _ = llama
    windows = [torch.tensor([5]), torch.tensor([20, 7, 9])]
    sums, count = second_moments.second_moments(model, [MODULE], windows, "first")[MODULE]
    alone, _ = second_moments.second_moments(model, [MODULE], [torch.tensor([5]), torch.tensor([20])], "first")[MODULE]
    assert count == 2
    torch.testing.assert_close(sums, alone, rtol=1e-4, atol=1e-6)
    others, _ = second_moments.second_moments(model, [MODULE], windows)[MODULE]
    every, count = second_moments.second_moments(model, [MODULE], windows, "all")[MODULE]
    assert count == 4
    torch.testing.assert_close(every, sums + others, rtol=1e-4, atol=1e-6)


def test_first_tokens_are_spared_without_making_others_look_rare() -> None:
    rare = torch.eye(12)[11]
    moments, first = torch.diag(torch.tensor([1.0] * 11 + [0.0])), 1e4 * torch.outer(rare, rare)
    without, found = Spectrum.of(moments), Spectrum.of(moments, first=first)
    torch.testing.assert_close(found.mean, without.mean)
    before, after = (damping(spectrum, 3.0, rare) for spectrum in (without, found))
    torch.testing.assert_close(before(rare), rare)
    assert after(rare).norm() < 0.01
    common = torch.eye(12)[:11]
    torch.testing.assert_close(after(common), before(common))


def test_an_edit_spares_the_first_tokens_of_its_text(llama: Any, settings: Any, text: str) -> None:
    model, tok = llama
    found = spectra(model, tok, [PARAMETER], text, 500)[PARAMETER]
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(MODULE).register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 0]))
    with torch.no_grad():
        for line in Path(text).read_text("utf-8").splitlines():
            model(torch.tensor([tok(line)["input_ids"][:1]]))
    handle.remove()
    firsts = torch.stack(seen)
    damped = damping(found, 100.0, firsts)(firsts)
    assert (damped.norm(dim=-1) < 0.5 * firsts.norm(dim=-1)).all()


def test_names_count_as_much_as_all_other_tokens(llama: Any, tmp_path: Path) -> None:
    model, tok = llama
    text = tmp_path / "text.txt"
    text.write_text("We met Anna Berg in Ulm. Then it rained.\nSoon Paul of Ulm came.\n", "utf-8")
    found = spectra(model, tok, [PARAMETER], str(text), 500)[PARAMETER]
    lines = text.read_text("utf-8").splitlines()
    assert names_in(lines) == ["Anna Berg", "Ulm", "Paul of Ulm"]
    windows = [torch.tensor(tok(line)["input_ids"]) for line in lines]
    means = [
        sums / count
        for sums, count in (
            second_moments.second_moments(model, [MODULE], windows)[MODULE],
            second_moments.second_moments(
                model, [MODULE], name_windows(tok, names_in(lines), second_moments.LONGEST), "last"
            )[MODULE],
        )
    ]
    torch.testing.assert_close(found.mean, (means[0] + means[1]).float().trace() / len(means[0]))
    assert all(mean.trace() > 0 for mean in means)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("Vienna is a city. It lies on the Danube.", ["Danube"]),
        ("the river Élbe and the Lake of the Woods", ["Élbe", "Lake of the Woods"]),
        ("nothing here is a name", []),
        ("他住在维也纳", []),
    ],
)
def test_names_are_words_with_capitals_inside_a_sentence(line: str, names: list[str]) -> None:
    assert names_in([line]) == names


def test_names_are_read_alone_and_behind_a_context(llama: Any) -> None:
    _, tok = llama
    texts = [tok.decode(ids) for ids in name_windows(tok, ["Anna Berg", "Lake of the Woods"], 64)]
    assert sorted(texts) == sorted(
        ["Anna Berg", TEMPLATES[0].format("Anna Berg"), "Lake of the Woods", TEMPLATES[1].format("Lake of the Woods")]
    )


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The state of the model at each computation of moments, from now on."""
    states: list[dict[str, torch.Tensor]] = []
    own: Callable[..., Any] = second_moments.second_moments

    def noted(model: Any, names: Any, windows: Any, *which: Any) -> Any:
        if not which:  # those of names and of first tokens go with it
            states.append(state(model))
        return own(model, names, windows, *which)

    monkeypatch.setattr(second_moments, "second_moments", noted)
    return states


@pytest.mark.parametrize("enough", [True, False])
def test_too_little_text_for_a_matrix_is_said(
    text: str, enough: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tok = load("llama")
    _, inputs = model.get_parameter(PARAMETER).shape
    monkeypatch.setattr(second_moments, "ENOUGH", 400 / inputs if enough else 600 / inputs)
    with caplog.at_level(logging.WARNING, "kdpo_editor"):
        spectra(model, tok, [PARAMETER], text, 500)
    said = f"tokens for a matrix of {inputs} inputs, so edits spare too little"
    assert (said in caplog.text) is not enough


def test_they_are_computed_once_for_each_content_of_a_model(text: str, computed: list[Any]) -> None:
    model, tok = load("llama")
    first = spectra(model, tok, [PARAMETER], text, 500)[PARAMETER]
    again, _ = load("llama")
    other = spectra(again, tok, [PARAMETER], text, 500)[PARAMETER]
    assert len(computed) == 1
    assert torch.equal(first.values, other.values)
    assert torch.equal(first.directions, other.directions)
    third, _ = load("llama")
    with torch.no_grad():
        third.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    spectra(third, tok, [PARAMETER], text, 500)
    spectra(third, tok, [PARAMETER], text, 400)
    assert len(computed) == 3


@pytest.mark.slow
def test_another_process_computes_nothing(text: str, cache: Path) -> None:
    model, tok = load("llama")
    spectra(model, tok, [PARAMETER], text, 500)
    (kept,) = (cache / "second_moments").iterdir()
    written = kept.stat().st_mtime_ns
    script = (
        "import sys\n"
        "from conftest import PARAMETER, load\n"
        "from kdpo_editor.lifelong import second_moments\n"
        "model, tok = load('llama')\n"
        "model.model.forward = None\n"  # it cannot be run
        "second_moments.spectra(model, tok, [PARAMETER], sys.argv[1], 500)\n"
    )
    folder = Path(__file__).parent
    subprocess.run([sys.executable, "-c", script, text], check=True, cwd=folder)
    assert kept.stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", ["empty", "no tensors", "cut", "one bit", "another matrix's"])
def test_a_damaged_file_is_computed_again(
    text: str, cache: Path, damage: str, computed: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, tok = load("llama")
    first = spectra(model, tok, [PARAMETER], text, 500)[PARAMETER]
    (kept,) = (cache / "second_moments").iterdir()
    spectra(model, tok, [PARAMETER.replace("4", "3")], text, 500)
    (other,) = {*(cache / "second_moments").iterdir()} - {kept}
    data = kept.read_bytes()
    damaged = {
        "empty": b"",
        "no tensors": b"nothing of the kind",
        "cut": data[:-100],
        "another matrix's": other.read_bytes(),
    }
    damaged["one bit"] = data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]
    kept.write_bytes(damaged[damage])
    again, _ = load("llama")
    with caplog.at_level(logging.WARNING, "kdpo_editor"):
        found = spectra(again, tok, [PARAMETER], text, 500)[PARAMETER]
    assert len(computed) == 3
    assert f"{kept} is damaged" in caplog.text
    torch.testing.assert_close(found.values, first.values)
    assert kept.read_bytes() == data


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_what_is_made_of_moments_is_kept_beside_them(text: str, cache: Path, damaged: bool) -> None:
    model, tok = load("llama")
    made = damping(spectra(model, tok, [PARAMETER], text, 500)[PARAMETER], 3.0, model.get_parameter(PARAMETER))
    assert made.right is None
    (kept,) = (cache / "damping").iterdir()
    data = kept.read_bytes()
    if damaged:
        kept.write_bytes(data[:-100])
    written = kept.stat().st_mtime_ns
    again, _ = load("llama")
    same = damping(spectra(again, tok, [PARAMETER], text, 500)[PARAMETER], 3.0, again.get_parameter(PARAMETER))
    assert torch.equal(same.left, made.left)
    assert (kept.stat().st_mtime_ns == written) is not damaged
    assert kept.read_bytes() == data


def test_a_cache_that_cannot_be_written_to_costs_a_warning(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("KDPO_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "kdpo_editor"):
        assert spectra(*load("llama"), [PARAMETER], text, 500)
    assert "cannot be kept" in caplog.text


# Of edited models ---------------------------------------------------------------------------------------------


def test_a_resumed_ledger_has_the_moments_of_the_unedited_model(
    settings: Any, text: str, tmp_path: Path, cache: Path, computed: list[Any]
) -> None:
    """Also where nothing is kept on disk: they are computed of the model as it was."""
    hparams = settings(**SETTINGS, mom2_dataset=text, replay=True, ledger=str(tmp_path / "one"))
    undisturbed, tok = load("llama")
    for request in (REQUEST, SECOND):
        apply_kdpo_to_model(undisturbed, tok, [request], hparams)
    hparams = settings(**SETTINGS, mom2_dataset=text, replay=True, ledger=str(tmp_path / "two"))
    model, _ = load("llama")
    apply_kdpo_to_model(model, tok, [REQUEST], hparams)
    for file in (cache / "second_moments").iterdir():
        file.unlink()
    resumed, _ = load("llama")
    with EditLedger(tmp_path / "two", write=True) as ledger:
        ledger.restore(resumed)
    apply_kdpo_to_model(resumed, tok, [SECOND], hparams)
    assert len(computed) == 2
    assert all(torch.equal(computed[1][name], value) for name, value in computed[0].items())
    assert_same(resumed, state(undisturbed))


def test_an_exported_model_has_those_of_the_one_it_came_from_where_its_ledger_says_so(
    settings: Any, text: str, tmp_path: Path, computed: list[Any]
) -> None:
    plain = settings(ledger=str(tmp_path / "l"))
    model, tok = load("llama")
    before = state(model)
    apply_kdpo_to_model(model, tok, [REQUEST], plain)
    exported, _ = load("llama")
    exported.load_state_dict(state(model))
    hparams = settings(**SETTINGS, mom2_dataset=text, ledger=str(tmp_path / "l"))
    apply_kdpo_to_model(exported, tok, [SECOND], hparams)
    (seen,) = computed
    assert all(torch.equal(seen[name], value) for name, value in before.items())


def test_a_model_with_a_delta_has_those_of_the_one_before(settings: Any, text: str, computed: list[Any]) -> None:
    model, tok = load("llama")
    delta = EditDelta.make(model, tok, [REQUEST], settings())
    fresh, _ = load("llama")
    before = state(fresh)
    delta.apply(fresh)
    edit(fresh, tok, [SECOND], settings(**SETTINGS, mom2_dataset=text))
    (seen,) = computed
    assert all(torch.equal(seen[name], value) for name, value in before.items())


@pytest.mark.parametrize("asked", ["made", "asked before it was made", "in a ledger"])
def test_a_model_that_a_delta_was_made_on_has_those_of_the_one_before(
    settings: Any, text: str, computed: list[Any], tmp_path: Path, asked: str
) -> None:
    model, tok = load("llama")
    before = state(model)
    if asked != "made":
        spectra(model, tok, [PARAMETER.replace(".4.", ".1.")], text, 500)
        computed.clear()
    if asked == "in a ledger":
        with EditLedger(tmp_path / "l", write=True) as ledger:
            ledger.edit(model, tok, [REQUEST], settings())
    else:
        EditDelta.make(model, tok, [REQUEST], settings())
    spectra(model, tok, [PARAMETER], text, 500)
    (seen,) = computed
    assert all(torch.equal(seen[name], value) for name, value in before.items())


def test_a_text_that_was_written_anew_is_read_anew(tmp_path: Path, computed: list[Any]) -> None:
    model, tok = load("llama")
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"What species is ZIC{n} specific to? human" for n in range(1, 40)), "utf-8")
    first = spectra(model, tok, [PARAMETER], str(file), 500)[PARAMETER]
    assert spectra(model, tok, [PARAMETER], str(file), 500)[PARAMETER] is first
    file.write_text("\n".join(f"Which family does number {n} belong to?" for n in range(1, 40)), "utf-8")
    other = spectra(model, tok, [PARAMETER], str(file), 500)[PARAMETER]
    assert len(computed) == 2
    assert not torch.equal(first.values, other.values)


def test_a_copy_comes_from_what_its_model_came_from(text: str, computed: list[Any]) -> None:
    model, tok = load("llama")
    first = spectra(model, tok, [PARAMETER], text, 500)[PARAMETER]
    copied = copy.deepcopy(model)
    remember_copy(copied, model)
    with torch.no_grad():
        copied.get_parameter(PARAMETER).mul_(2)
    assert spectra(copied, tok, [PARAMETER], text, 500)[PARAMETER] is first
    assert len(computed) == 1


def test_a_fingerprint_sees_an_edit(llama: Any, settings: Any) -> None:
    model, tok = llama
    before = fingerprint(model)
    _, originals, _ = edit(model, tok, [REQUEST], settings())
    assert fingerprint(model) != before
    with torch.no_grad():
        model.get_parameter(PARAMETER).copy_(originals[PARAMETER])
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", PARAMETER, "model.layers.4.input_layernorm.weight"])
def test_a_fingerprint_sees_each_entry(llama: Any, name: str) -> None:
    model, _ = llama
    before, weight = fingerprint(model), model.get_parameter(name).detach().view(-1)
    for entry in (0, len(weight) // 2 + 1, len(weight) - 1):
        kept = weight[entry].clone()
        weight[entry] = torch.nextafter(kept, kept + 1)
        assert fingerprint(model) != before
        weight[entry] = kept
    assert fingerprint(model) == before


def test_what_a_model_was_is_said_where_it_is_no_longer_known(
    settings: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, tok = load("llama")
    EditDelta.make(model, tok, [REQUEST], settings()).revert(model)
    with torch.no_grad():
        for name in (PARAMETER, PARAMETER.replace(".4.", ".2.")):
            model.get_parameter(name).mul_(1.1)
    with caplog.at_level(logging.WARNING, "kdpo_editor"):
        found = spectra(model, tok, [PARAMETER], text, 500)[PARAMETER]
    assert "are those of an edited model" in caplog.text
    assert found.file is None
    fresh, tok = load("llama")
    kept = spectra(fresh, tok, [PARAMETER], text, 500)[PARAMETER]
    assert not torch.equal(kept.values, found.values), "the edited model's are kept as the unedited one's"


def test_a_model_that_takes_few_tokens_is_given_no_more(gpt2: Any, tmp_path: Path) -> None:
    _, tok = gpt2
    config = GPT2Config(vocab_size=1024, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    (tmp_path / "long.txt").write_text("What species is ZIC3 specific to? " * 20, "utf-8")
    spectra(GPT2LMHeadModel(config), tok, ["transformer.h.1.mlp.c_proj.weight"], str(tmp_path / "long.txt"), 500)
