"""Bad input: the error names the culprit and what is allowed, and the model is untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REQUEST, assert_same, state
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, LlamaConfig

from kdpo_editor import (
    SHIPPED_MODEL,
    EditDelta,
    HyperParamsError,
    KDPOError,
    KDPOHyperParams,
    ModelError,
    RequestError,
    apply_kdpo_to_model,
)
from kdpo_editor.editing import edit
from kdpo_editor.engine.generation import generate
from kdpo_editor.models.loading import _hint, load

GOOD = """\
alg_name: KDPO
model_name: meta-llama/Llama-2-7b-hf
layers: [21]
rewrite_module_tmp: model.layers.{}.mlp.down_proj
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "settings.yaml"
    file.write_text(text, "utf-8")
    return file


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_step: 8", r"unknown key 'num_step'; did you mean num_steps\?.*Known keys: .*cycles"),
        ("kl_factor: 0", r"unknown key 'kl_factor'"),
        ("lr: fast", r"lr: 'fast' is not allowed; it must be a finite number"),
        ("lr: -1e-4", r"lr: -0.0001 is not allowed; it must be more than 0"),
        ("lr: .nan", r"lr: nan is not allowed; it must be a finite number"),
        ("lr: true", r"lr: True is not allowed"),
        ("num_steps: 2.5", r"num_steps: 2.5 is not allowed; it must be int"),
        ("num_steps: 0", r"num_steps: 0 is not allowed; it must be at least 1"),
        ("cycles: -3", r"cycles: -3"),
        ("beta: 0", r"beta: 0.0 is not allowed; it must be more than 0"),
        ("stop_loss: -1", r"stop_loss: -1.0 is not allowed; it must be 0 or more"),
        ("context_templates: -1", r"context_templates: -1 is not allowed; it must be 0 to 3"),
        ("context_templates: 4", r"context_templates: 4 is not allowed; it must be 0 to 3"),
        ("fact_token: last", r"fact_token: 'last' is not allowed; it must be one of all, subject, subject_last"),
        ("layers: []", r"layers: \[\] is not allowed; it must be at least one index"),
        ("layers: [-1]", r"layers: \[-1\]"),
        ("layers: [3, 3]", r"layers: \[3, 3\] .* each layer once"),
        ("layers: 21", r"layers: 21 is not allowed; it must be a list of int or null"),
        ("layers: [a]", r"layers: 'a' is not allowed"),
        ("rewrite_module_tmp: mlp.down_proj", r"rewrite_module_tmp: .*one \"\{\}\""),
        ("objective: simpo", r"objective: 'simpo' is not allowed; it must be one of kdpo, hinge, ce, dpo"),
        ("objective: hinge", r"margin: 0.0 is not allowed; it must be more than 0 where objective is hinge"),
        ("schedule: random", r"schedule: 'random' is not allowed; it must be one of depth_first, breadth_first"),
        ("objective: dpo\nschedule: breadth_first", r"schedule: .* it must be 'depth_first' where objective is dpo"),
        ("memory_budget: 0", r"memory_budget: 0.0 is not allowed; it must be more than 0"),
        ("update_scale: 2\nreplay: true", r"update_scale: 2.* it must be 1 where replay is true"),
        ("cuda_graphs: true\noptimizer: polyak", r"cuda_graphs: True .* it must be false where optimizer is polyak"),
        ("objective: dpo\nreplay: true", r"replay: True is not allowed; it must be False where objective is dpo"),
        ("replay_checks: 0", r"replay_checks: 0 is not allowed; it must be at least 1"),
        ("replay_budget: 0", r"replay_budget: 0.0 is not allowed; it must be more than 0"),
        ("append_eos: 1", r"append_eos: 1 is not allowed; it must be bool"),
        ("alg_name: FT", r"alg_name: 'FT' is not allowed; it must be \"KDPO\""),
        ("model_name: ''", r"model_name: ''"),
        ("device: -1", r"device: -1 .*\"cpu\""),
    ],
)
def test_bad_values_in_yaml_are_named(tmp_path: Path, line: str, message: str) -> None:
    key = line.partition(":")[0]
    kept = "\n".join(row for row in GOOD.splitlines() if not row.startswith(key + ":"))
    file = write(tmp_path, f"{kept}\n{line}\n")
    with pytest.raises(HyperParamsError, match=message) as caught:
        KDPOHyperParams.from_hparams(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2", "- a\n- b\n", "", "key: [\x00]"])
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(HyperParamsError, match=r"settings\.yaml"):
        KDPOHyperParams.from_hparams(file)


def test_missing_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(HyperParamsError, match=r"missing key model_name"):
        KDPOHyperParams.from_hparams(write(tmp_path, "layers: [21]\n"))


def test_a_models_name_is_enough(tmp_path: Path) -> None:
    hparams = KDPOHyperParams.from_hparams(write(tmp_path, "model_name: llama\n"))
    assert hparams == KDPOHyperParams(model_name="llama", layers=None, rewrite_module_tmp=None)


def test_a_missing_file_is_named_with_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(FileNotFoundError, match=r"no hyperparameter file .*lama\.yaml; .* has settings"):
        KDPOHyperParams.from_hparams(tmp_path / "lama")


def test_yaml_suffix_may_be_left_out_even_after_dots(tmp_path: Path) -> None:
    (tmp_path / "qwen1.5-7b.yaml").write_text(GOOD, "utf-8")
    assert KDPOHyperParams.from_hparams(str(tmp_path / "qwen1.5-7b")).layers == [21]


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    hparams = KDPOHyperParams.from_hparams(write(tmp_path, GOOD + "lr: 5e-4\nmom2_dataset: false\n"))
    assert hparams.lr == 5e-4
    assert hparams.mom2_dataset is None


def test_settings_come_from_omegaconf_too(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    config = OmegaConf.merge(OmegaConf.load(file), {"lr": 3e-4})
    hparams = KDPOHyperParams.from_config(config)
    assert hparams.lr == 3e-4
    assert hparams == KDPOHyperParams.from_config(hparams.to_dict())
    with pytest.raises(HyperParamsError, match="unknown key 'layer'"):
        KDPOHyperParams.from_config(OmegaConf.merge(config, {"layer": 3}))


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], r"list of at least one"),
        (REQUEST, r"list of at least one"),
        (["a"], r"request 0 is a str"),
        ([REQUEST, {"prompt": "a"}], r"request 1 has no 'target_new'; it has 'prompt'"),
        ([{"target_new": "a"}], r"request 0 has no 'prompt'"),
        ([REQUEST, {**REQUEST, "rephrases": "a"}], r"request 1: 'rephrases' is 'a'; it must be a list of prompts"),
        ([{**REQUEST, "rephrases": ["a", ""]}], r"request 0: 'rephrases' is \['a', ''\]; it must be"),
        ([{**REQUEST, "prompt": " "}], r"request 0: 'prompt' is empty"),
        ([REQUEST, {**REQUEST, "target_new": ""}], r"request 1: 'target_new' is empty"),
        ([{**REQUEST, "target_new": None}], r"request 0: 'target_new' is a NoneType; it must be text"),
        ([{**REQUEST, "target_new": [["male"]]}], r"'target_new' is a list; it must be text, a number"),
        ([{**REQUEST, "target_new": "male " * 300}], r"request 0 has \d+ tokens .* the model takes 256 at most"),
    ],
)
def test_bad_requests_are_named_and_change_nothing(llama: Any, settings: Any, requests: Any, message: str) -> None:
    model, tok = llama
    before = state(model)
    with pytest.raises(KDPOError, match=message):
        apply_kdpo_to_model(model, tok, requests, settings())
    assert_same(model, before)


def test_rephrases_are_refused_where_they_cannot_be_trained(llama: Any, settings: Any) -> None:
    model, tok = llama
    before = state(model)
    with pytest.raises(RequestError, match="'rephrases' cannot be trained where objective is dpo"):
        apply_kdpo_to_model(model, tok, [{**REQUEST, "rephrases": ["a"]}], settings(objective="dpo"))
    assert_same(model, before)


def test_a_target_without_tokens_is_named(llama: Any, settings: Any) -> None:
    model, tok = llama
    before = state(model)

    def forgetful(text: str) -> Any:
        return tok(text.replace("\N{ZERO WIDTH SPACE}", "").rstrip())

    forgetful.eos_token_id = tok.eos_token_id  # type: ignore[attr-defined]
    forgetful.decode = tok.decode  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match=r"request 1: the target .* gives no tokens"):
        apply_kdpo_to_model(model, forgetful, [REQUEST, {**REQUEST, "target_new": "\N{ZERO WIDTH SPACE}"}], settings())
    assert_same(model, before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": [6]}, r"layers: 6 is outside the model, which has 6 layers, 0 to 5"),
        ({"layers": [4, 60]}, r"layers: 60 is outside"),
        (
            {"rewrite_module_tmp": "transformer.h.{}.mlp.c_proj"},
            r"no list of layers 'transformer.h'; it has model.layers",
        ),
        ({"rewrite_module_tmp": "model.layers.{}.mlp.down"}, r"matches no matrix in layer 4; .*mlp.down_proj"),
        ({"rewrite_module_tmp": "model.layers.{}.input_layernorm"}, r"matches no matrix"),
        ({"rewrite_module_tmp": "model.layers.{}.mlp"}, r"matches 3 matrices, .*gate_proj.*up_proj.*down_proj"),
        ({"rewrite_module_tmp": "{}"}, r"no list of layers"),
    ],
)
def test_layers_and_modules_that_do_not_exist_are_named(
    llama: Any, settings: Any, overrides: dict[str, Any], message: str
) -> None:
    model, tok = llama
    before = state(model)
    with pytest.raises(ModelError, match=message):
        apply_kdpo_to_model(model, tok, [REQUEST], settings(**overrides))
    assert_same(model, before)


def test_the_template_may_end_in_weight(llama: Any, settings: Any) -> None:
    model, tok = llama
    hparams = settings(rewrite_module_tmp="model.layers.{}.mlp.down_proj.weight")
    _, originals = apply_kdpo_to_model(model, tok, [REQUEST], hparams, return_orig_weights=True)
    assert list(originals) == ["model.layers.4.mlp.down_proj.weight"]


def test_integer_weights_are_refused(llama: Any, settings: Any) -> None:
    model, tok = llama
    projection = model.model.layers[4].mlp.down_proj
    projection.weight = torch.nn.Parameter((projection.weight * 100).to(torch.int8), requires_grad=False)
    before = state(model)
    with pytest.raises(ModelError, match=r"down_proj.weight is int8: quantised .* one of float32, bfloat16"):
        apply_kdpo_to_model(model, tok, [REQUEST], settings())
    assert_same(model, before)


def test_a_model_on_the_meta_device_is_refused(llama: Any, settings: Any) -> None:
    _, tok = llama
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=5, hidden_size=32, vocab_size=1024))
    with pytest.raises(ModelError, match="is on the meta device"):
        apply_kdpo_to_model(model, tok, [REQUEST], settings())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, r"dtype: 'fp8' is not one of float32, bfloat16, float16, float64, auto"),
        ({"device": "gpu"}, r"device gpu: "),
        ({"device": "cuda:99"}, r"device cuda:99: "),
    ],
)
def test_a_model_that_cannot_be_loaded_so_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(SHIPPED_MODEL, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hparams": {"lr": 1e-4}}, r"the settings are a dict; KDPOHyperParams\.from_hparams"),
        ({"hparams": "hparams/KDPO-L/auto"}, r"the settings are a str; "),
        ({"tok": "smollm2-135m"}, r"the tokenizer is a str; kdpo_editor\.load"),
        ({"model": "smollm2-135m"}, r"the model is a str; kdpo_editor\.load"),
    ],
)
def test_what_is_no_model_tokenizer_or_settings_is_named(
    llama: Any, settings: Any, given: dict[str, Any], message: str
) -> None:
    model, tok = llama
    before = state(model)
    arguments = {"model": model, "tok": tok, "requests": [REQUEST], "hparams": settings()}
    for call in (edit, EditDelta.make) if "hparams" in given else (edit,):
        with pytest.raises(KDPOError, match=message):
            call(**{**arguments, **given})
    assert_same(model, before)


@pytest.mark.parametrize("config", [[1], OmegaConf.create([1]), "x", None])
def test_settings_of_what_has_no_keys_are_refused(config: Any) -> None:
    with pytest.raises(HyperParamsError, match="they must be a dict or a DictConfig"):
        KDPOHyperParams.from_config(config)


def test_a_misspelt_attribute_is_refused_and_the_frameworks_own_are_not(settings: Any) -> None:
    hparams = settings()
    with pytest.raises(HyperParamsError, match=r"unknown key 'marginn'; did you mean margin\?"):
        hparams.marginn = 3
    hparams.results_dir = "results"
    assert hparams.results_dir == "results"
    hparams.margin = 3.0
    assert hparams.margin == 3.0


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the folder .* has no config\.json"):
        load(str(tmp_path))


def test_a_name_that_is_nearly_one_of_ours_is_told_which() -> None:
    assert _hint("smollm") == " (did you mean smollm2-135m?)"
    assert _hint("meta-llama/Llama-2-7b-hf") == ""


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(ModelError, match="a model's name is text, not int"):
        load(5)  # type: ignore[arg-type]


def test_prompts_that_are_no_text_are_refused(llama: Any) -> None:
    with pytest.raises(RequestError, match="a prompt is a list; it must be text"):
        generate(*llama, ["a"])  # type: ignore[arg-type]
