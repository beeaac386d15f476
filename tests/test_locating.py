"""Causal tracing: where a model recalls its facts, and that edits go there."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, load, no_file_longer_than, state
from test_cached_forward import ARCHITECTURES, IDS, tiny

from kdpo_editor import SHIPPED_MODEL, KDPOHyperParams, ModelError, RequestError, StorageError
from kdpo_editor.cli.main import main
from kdpo_editor.compare.run.schemas import Record
from kdpo_editor.derived import complete
from kdpo_editor.lifelong import located, locating
from kdpo_editor.lifelong.locating import SUBJECT_LAST, TOKENS, CausalTrace, trace
from kdpo_editor.models.loading import outline, whole_name
from kdpo_editor.requests.tokens import EditTokens, tokenize

FACTS = [
    {"prompt": "What species is ZIC3 specific to?", "subject": "ZIC3", "target_new": "male"},
    {"prompt": "Which family does Epaspidoceras belong to?", "subject": "Epaspidoceras", "target_new": "Noctuidae"},
]
NAME = "llama-mini"
SETTINGS = KDPOHyperParams(model_name=NAME, fact_token="subject_last", margin=1.0)


def test_only_a_layer_that_writes_has_an_effect(llama: tuple[Any, Any]) -> None:
    model, tok = llama
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            if layer != 3:
                block.mlp.down_proj.weight.zero_()
    effects = trace(model, tok, FACTS, SETTINGS).effects
    window = max(1, round(10 / 48 * len(model.model.layers)))
    assert effects.shape == (len(TOKENS), len(model.model.layers))
    far = [layer for layer in range(effects.shape[1]) if not layer - window < 3 < layer + window]
    assert effects[SUBJECT_LAST, 3].abs() > 0
    assert (effects[:, far].nan_to_num() == 0).all()


def by_hand(model: Any, matrix: torch.nn.Module, tokens: EditTokens) -> tuple[float, float, float]:
    """The answer's probability as it is, with noise, and with what ``matrix`` gave at the subject's end put back."""
    begin, end = tokens.subject
    table = model.get_input_embeddings()
    drawn = torch.randn(1, end - begin, table.weight.shape[1], generator=torch.Generator().manual_seed(0))
    written: list[torch.Tensor] = []

    def probability(*hooks: tuple[torch.nn.Module, Any]) -> float:
        handles = [module.register_forward_hook(hook) for module, hook in hooks]
        with torch.no_grad():
            logits = model(tokens.prompt[None]).logits[0, -1]
        for handle in handles:
            handle.remove()
        return float(logits.softmax(-1)[tokens.chosen[0]])

    def noisy(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.zeros_like(output)
        noise[:, begin:end] = 3 * table.weight.std() * drawn
        return output + noise

    def restored(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., end - 1, :] = written[0][..., end - 1, :]
        return output

    clean = probability((matrix, lambda _, __, output: written.append(output)))
    return clean, probability((table, noisy)), probability((table, noisy), (matrix, restored))


def test_an_effect_is_the_probability_that_an_output_brings_back(llama: tuple[Any, Any]) -> None:
    """Asked once more with hooks of its own. Of six layers the outputs of one are restored at a time."""
    model, tok = llama
    fact = {**FACTS[1], "target_new": "Aspidoceratidae"}
    ((tokens,),) = tokenize(tok, [fact], with_subject=True)
    clean, corrupted, brought_back = by_hand(model, model.model.layers[3].mlp.down_proj, tokens)
    found = trace(model, tok, [fact], SETTINGS)
    assert (found.clean, found.corrupted) == pytest.approx((clean, corrupted), abs=1e-6)
    effect = brought_back - corrupted
    assert effect != 0
    assert found.effects[SUBJECT_LAST, 3].item() == pytest.approx(effect, rel=1e-2)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if ".experts." not in ARCHITECTURES[name][2]])
def test_blocks_below_those_restored_need_not_run_again(name: str, monkeypatch: Any) -> None:
    """The layer's effect is that of the whole model, by hand, on every architecture."""
    model, blocks, matrix = tiny(name, torch.float64)
    model.config._experts_implementation = "eager"  # the others know no fp64
    matrices = [model.get_submodule(f"{blocks}.{i}.{matrix}") for i in range(4)]
    with torch.no_grad():
        for module in matrices:
            module.weight.mul_(20)  # so that what is restored shows
        best = model(IDS[:1]).logits[0, -1].argmax()
    tokens = EditTokens(IDS[0], best[None], (7, 10))
    monkeypatch.setattr(locating, "tokenize", lambda *_, **__: [[tokens]])
    settings = replace(SETTINGS, rewrite_module_tmp=f"{blocks}.{{}}.{matrix}", layers=[0])
    runs = [0] * 4
    for i, block in enumerate(model.get_submodule(blocks)):
        monkeypatch.setattr(block, "forward", counted(block.forward, runs, i))
    found = trace(model, None, [{}], settings)
    assert runs == [2 + i for i in range(1, 5)]  # once as it is, once with noise, and for each layer from its own down
    effects = []
    for layer, module in enumerate(matrices):
        clean, corrupted, brought_back = by_hand(model, module, tokens)
        assert (found.clean, found.corrupted) == pytest.approx((clean, corrupted), abs=1e-6)
        effects.append(brought_back - corrupted)
        assert found.effects[SUBJECT_LAST, layer].item() == pytest.approx(effects[-1], abs=2e-8)
    assert max(map(abs, effects)) > 4e-7


def counted(forward: Any, runs: list[int], place: int) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        runs[place] += 1
        return forward(*args, **kwargs)

    return run


def test_the_window_is_around_its_layer_at_the_first_layers_too(llama: tuple[Any, Any], monkeypatch: Any) -> None:
    """Of a window of four layers the first has two, itself and the one above it; the third has all four."""
    model, tok = llama
    monkeypatch.setattr(locating, "WINDOW", 4 / 6)
    restored: list[int] = []
    hook = torch.nn.Module.register_forward_hook
    matrices = [layer.mlp.down_proj for layer in model.model.layers]

    def counted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        restored.extend(i for i, matrix in enumerate(matrices) if matrix is module)
        return hook(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", counted)
    trace(model, tok, FACTS[:1], SETTINGS)
    # Each matrix is hooked once when it is written down, and once for each window that it is in.
    assert restored == [*range(6), 0, 1, 0, 1, 2, 0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5, 3, 4, 5]


def test_restoring_what_noise_did_not_reach_has_no_effect(llama: tuple[Any, Any], monkeypatch: Any) -> None:
    """Without noise there is nothing to restore, and the answer is as likely as ever."""
    model, tok = llama
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(0.1)  # no spread, so no noise
    found = trace(model, tok, FACTS, SETTINGS)
    assert found.corrupted == pytest.approx(found.clean, abs=1e-6)
    assert found.effects.nan_to_num().abs().max() < 1e-6


def test_a_traced_model_is_left_as_it_was(llama: tuple[Any, Any]) -> None:
    model, tok = llama
    before, model.training = state(model), True
    trace(model, tok, FACTS, SETTINGS)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_without_the_matrix_in_each_block_is_refused(llama: tuple[Any, Any]) -> None:
    model, tok = llama
    model.model.layers[2].mlp.down_proj = torch.nn.Identity()
    del model.model.layers[2].mlp.down_proj
    with pytest.raises(ModelError, match=r"no module model\.layers\.2\.mlp\.down_proj; only models"):
        trace(model, tok, FACTS, replace(SETTINGS, rewrite_module_tmp="model.layers.{}.mlp.down_proj", layers=[1]))


def test_the_layers_end_where_the_effect_is_largest() -> None:
    effects = torch.zeros(len(TOKENS), 30)
    effects[SUBJECT_LAST, 8] = 0.3
    effects[TOKENS.index("last of the prompt"), 20] = 0.9
    assert CausalTrace(effects, 0.9, 0.1, 20, "h.{}.mlp").layers == [2, 4, 6, 8]


def test_where_the_effect_is_largest_at_the_bottom_the_layers_begin_there() -> None:
    effects = torch.zeros(len(TOKENS), 30)
    effects[SUBJECT_LAST, 1] = 0.3
    assert CausalTrace(effects, 0.9, 0.1, 20, "h.{}.mlp").layers == [0, 2, 4, 6]


def test_the_last_layer_is_never_named() -> None:
    """A subject's tokens there reach no answer."""
    effects = torch.zeros(len(TOKENS), 6)
    effects[SUBJECT_LAST, 5] = 1.0
    assert CausalTrace(effects, 0.9, 0.1, 20, "h.{}.mlp").layers == [3, 4]


def test_a_fact_without_its_subject_is_refused(llama: tuple[Any, Any]) -> None:
    model, tok = llama
    with pytest.raises(RequestError, match="Zeus"):
        trace(model, tok, [{**FACTS[0], "subject": "Zeus"}], SETTINGS)
    with pytest.raises(RequestError, match="no facts"):
        trace(model, tok, [], SETTINGS)


def test_what_was_located_is_what_is_edited_in_whatever_form_the_model_is(llama: tuple[Any, Any]) -> None:
    """Edited since, in half precision, or without its weights, as the comparison and ``kdpo settings`` look at it."""
    model, _ = llama
    matrix = complete(SETTINGS, model).place[1]
    assert complete(SETTINGS, model).layers != [0, 3]
    located.keep(NAME, matrix, [0, 3])
    assert complete(SETTINGS, model).layers == [0, 3]
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.add_(0.01)
    for form in (model, model.bfloat16(), outline(str(GOLDEN / NAME))):
        assert complete(SETTINGS, form).layers == [0, 3]
    assert complete(replace(SETTINGS, model_name="gpt2-mini"), model).layers != [0, 3]


def test_a_folder_is_the_same_by_whatever_path_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    located.keep(str(GOLDEN / NAME), "h.{}.mlp", [1])
    monkeypatch.chdir(GOLDEN)
    assert located.layers_of(f"./{NAME}", "h.{}.mlp") == [1]
    assert located.layers_of("gpt2-mini", "h.{}.mlp") is None
    (tmp_path / SHIPPED_MODEL).mkdir()
    monkeypatch.chdir(tmp_path)
    assert whole_name(SHIPPED_MODEL) == SHIPPED_MODEL, "a folder of that name is not what is loaded"


def test_layers_that_a_model_of_this_name_does_not_have_are_passed_over(llama: tuple[Any, Any]) -> None:
    model, _ = llama
    wanted = complete(SETTINGS, model)
    located.keep(NAME, wanted.place[1], [0, 99])
    assert complete(SETTINGS, model).layers == wanted.layers


def test_layers_that_cannot_be_kept_leave_those_kept_before(llama: tuple[Any, Any]) -> None:
    model, _ = llama
    matrix = complete(SETTINGS, model).place[1]
    located.keep(NAME, matrix, [0, 3])
    with no_file_longer_than(5), pytest.raises(StorageError, match="cannot write"):
        located.keep(NAME, matrix, [1])
    assert located.layers_of(NAME, matrix) == [0, 3]


def test_a_damaged_file_is_said_and_passed_over(llama: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    model, _ = llama
    matrix = complete(SETTINGS, model).place[1]
    located.keep(NAME, matrix, [0]).write_text("{", "utf-8")
    with caplog.at_level(logging.WARNING):
        assert complete(SETTINGS, model).layers != [0]
    assert "damaged" in caplog.text


def test_the_command_prints_draws_and_keeps_what_it_found(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = [Record(f["subject"], f["prompt"], "", f["target_new"], (), {}, {}, i) for i, f in enumerate(FACTS)]
    monkeypatch.setattr("kdpo_editor.compare.run.known.known_facts", lambda *_: facts)
    name, picture, settings = str(GOLDEN / "llama-mini"), tmp_path / "map.png", tmp_path / "kept.yaml"
    assert main(["locate", "--model", name, "--picture", str(picture), "--to", str(settings)]) == 0
    out = capsys.readouterr().out
    kept = KDPOHyperParams.from_hparams(settings)
    assert f"Layers {', '.join(map(str, kept.place[0]))}. " in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    model, _ = load("llama")
    assert complete(replace(kept, layers=None), model).layers == kept.layers
