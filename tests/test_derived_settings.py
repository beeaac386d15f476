"""Settings of the compared methods for a model that has no files: complete, of its own names, and they edit it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from conftest import GOLDEN, assert_same, load, state

from kdpo_editor import KDPOHyperParams
from kdpo_editor.compare.run import statistics
from kdpo_editor.compare.run.datasets import Record
from kdpo_editor.compare.run.derived_settings import derive, fill, is_template, run_at_same_depth, same_depth
from kdpo_editor.easyedit.import_hook import VARIABLE
from kdpo_editor.errors import DataError, HyperParamsError
from kdpo_editor.hparams import settings_folder

TEMPLATES = sorted(settings_folder().glob("*/auto.yaml"))
RIVALS = [file.parent.name for file in TEMPLATES if is_template(yaml.safe_load(file.read_text("utf-8")))]
SMALL = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 8, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", {"vocab_size": 1024, "n_embd": 32, "n_layer": 6, "n_head": 4}),
    "gpt_neox": ("GPTNeoXConfig", {**SMALL, "intermediate_size": 48}),
    "gemma3": ("Gemma3TextConfig", {**LLAMA, "head_dim": 8, "sliding_window": 8}),
}
# So that a test takes no longer than it must; what is tested is that they run.
SHORT = {"num_steps": 2, "n_iter": 2, "v_num_grad_steps": 2}
RECORD = Record("ZIC3", "What species is ZIC3 specific to?", "male", "human", (), {}, {}, 0)

needs_easyedit = pytest.mark.skipif(
    importlib.util.find_spec("easyeditor") is None and not os.environ.get(VARIABLE),
    reason="no form of EasyEdit is installed",
)


def build(family: str) -> Any:
    """A small random model of a family."""
    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def modules_named(settings: dict[str, Any]) -> list[str]:
    """Every module that ``settings`` name in full."""
    named = [settings[key] for key in ("ln_f_module", "lm_head_module") if key in settings]
    for key in (k for k in settings if k.endswith("_module_tmp")):
        named += [settings[key].removesuffix(".weight").format(layer) for layer in settings["layers"]]
    for parameter in settings.get("inner_params", []):
        named.append(parameter.removesuffix(".weight").replace("[", ".").replace("]", ""))
    return named


@pytest.mark.parametrize("method", RIVALS)
def test_every_module_that_is_named_is_there(model: Any, method: str) -> None:
    settings = derive(method, model, "any")
    named = modules_named(settings)
    assert named or settings["target_modules"]
    for name in named:
        model.get_submodule(name)
    for leaf in settings.get("target_modules", []):
        assert any(name.endswith(f".{leaf}") for name, _ in model.named_modules())


@needs_easyedit
@pytest.mark.parametrize("method", RIVALS)
def test_derived_settings_are_complete_for_the_frameworks_class(model: Any, method: str) -> None:
    from kdpo_editor import easyedit

    settings = derive(method, model, "any")
    if settings["alg_name"] not in easyedit.methods():
        pytest.skip(f"this form of EasyEdit has no {method}")
    hparams, _ = easyedit.settings(settings)
    assert hparams.model_name == "any"


@needs_easyedit
@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize("family", ["gpt_neox", "gemma3"])
def test_a_method_edits_a_model_of_another_family_and_undoes_it(family: str, method: str, tmp_path: Path) -> None:
    from kdpo_editor.compare.run.editing import Editing, available

    model, (_, tok) = build(family).requires_grad_(False), load("llama")
    model.config._name_or_path = "any"
    settings = derive(method, model, "any")
    if not available(settings):
        pytest.skip(f"this form of EasyEdit has no {method}")
    settings |= {key: value for key, value in SHORT.items() if key in settings}
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"What species is ZIC{n} specific to? human" for n in range(40)), "utf-8")
    statistics.ensure(model, tok, settings, str(text), None, tmp_path)
    before, logits = state(model), model(torch.arange(4)[None]).logits
    editing = Editing(model, tok, settings, seed=0, folder=tmp_path, unrelated=["The capital is"], sequence=False)
    editing.edit([RECORD])
    # GRACE keeps its edit beside the weights, under the last token's key.
    prompt = tok(RECORD.prompt, return_tensors="pt")["input_ids"]
    assert not torch.equal(editing.model(input_ids=prompt).logits, logits) or method == "GRACE"
    editing.undo()
    assert_same(model, before)
    torch.testing.assert_close(model(torch.arange(4)[None]).logits, logits, rtol=0, atol=0)


@needs_easyedit
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_wises_side_memory_begins_as_the_matrix_with_its_bias(family: str, tmp_path: Path) -> None:
    from kdpo_editor import easyedit
    from kdpo_editor.compare.run.editing import Editing

    if "WISE" not in easyedit.methods():
        pytest.skip("this form of EasyEdit has no WISE")
    model, (_, tok) = build(family).requires_grad_(False), load("llama")
    settings = {**derive("WISE", model, "any"), "n_iter": 2}
    name = modules_named(settings)[0]
    matrix: Any = model.get_submodule(name)
    with torch.no_grad():
        matrix.bias.normal_()
    inputs = torch.randn(2, 3, 48 if family == "gpt_neox" else 128)
    wanted = matrix(inputs)
    editing = Editing(model, tok, settings, seed=0, folder=tmp_path, unrelated=["The capital is"], sequence=False)
    editing.edit([RECORD])
    side: Any = model.get_submodule(name)
    side.new_weight = side.layer.weight
    torch.testing.assert_close(side.new_weight_forward(inputs), wanted)


def test_the_head_of_tied_embeddings_is_the_embeddings() -> None:
    settings = derive("MEMIT", build("qwen3"), "any")
    assert settings["lm_head_module"] == "model.embed_tokens"
    assert derive("MEMIT", build("llama"), "any")["lm_head_module"] == "lm_head"


@pytest.mark.parametrize(
    ("family", "wanted"), [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"]), ("gpt_neox", ["query_key_value"])]
)
def test_lora_adapts_queries_and_values(family: str, wanted: list[str]) -> None:
    assert derive("LoRA", build(family), "any")["target_modules"] == wanted


@pytest.mark.parametrize("depth", range(2, 81))
def test_layers_are_within_the_model_whatever_its_depth(depth: int) -> None:
    for of in (28, 30, 32):
        places = [same_depth(layer, of, depth) for layer in range(of)]
        assert places == sorted(places)
        assert places[0] == 0
        assert places[-1] < depth
    run = run_at_same_depth(4, 8, 30, depth)
    assert run == list(range(run[0], run[-1] + 1))
    assert len(run) == min(5, depth - 1)
    assert run[0] >= 0
    assert run[-1] < depth - 1


@pytest.mark.parametrize("depth", [28, 30, 32])
def test_layers_are_those_of_easyedits_files_for_models_as_deep(depth: int) -> None:
    assert same_depth(5, 30, depth) == 5
    assert run_at_same_depth(4, 8, 30, depth) == [4, 5, 6, 7, 8]


def test_blocks_without_the_matrix_are_passed_over() -> None:
    model = build("llama")
    model.model.layers[4].mlp = torch.nn.Identity()
    (layer,) = derive("FT-L", model, "any")["layers"]
    assert layer in (3, 5)
    model.model.layers[0].mlp = torch.nn.Identity()
    assert 0 not in derive("MEMIT", model, "any")["layers"]


def test_settings_without_marks_stay_as_they_are() -> None:
    file = settings_folder() / "ROME" / "qwen2.5-7b.yaml"
    settings = yaml.safe_load(file.read_text("utf-8"))
    assert not is_template(settings)
    assert fill(settings, build("llama"), "any") == settings


def test_an_unknown_mark_is_named() -> None:
    with pytest.raises(HyperParamsError, match="rewrite_module_tmp: <matrices> is not allowed"):
        fill({"alg_name": "ROME", "rewrite_module_tmp": "<matrices>"}, build("llama"), "any")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.parent.name)
def test_a_models_own_file_leaves_nothing_of_the_template(template: Path) -> None:
    keys = set(yaml.safe_load(template.read_text("utf-8")))
    for file in template.parent.glob("*.yaml"):
        assert keys <= set(yaml.safe_load(file.read_text("utf-8"))), file


def composed(folder: Path, *overrides: str) -> Any:
    pytest.importorskip("hydra")
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    import kdpo_editor.compare.run.app  # noqa: F401  (registers the schema)

    with initialize_config_module("kdpo_editor.compare.conf", version_base="1.3"):
        return OmegaConf.to_object(compose("config", [f"out={folder}", f"cache={folder}/cache", *overrides]))


@pytest.mark.parametrize("method", ["ft_l", "ft_m", "lora", "adalora", "dpo", "rome", "memit", "alphaedit", "wise"])
def test_a_file_for_the_model_goes_before_the_template(tmp_path: Path, method: str) -> None:
    config = composed(tmp_path, f"method={method}", "model=kdpo-llama-knowedit")
    assert not is_template(config.method.hparams)
    assert is_template(composed(tmp_path, f"method={method}", "model=any", "model.name=x").method.hparams)


@pytest.mark.parametrize("method", ["kdpo", "kdpo_l", "kdpo_l_bf", "kdpo_dpo", "ft_bf"])
def test_the_packages_own_methods_take_any_model_too(tmp_path: Path, method: str) -> None:
    from kdpo_editor.compare.run.cell import _filled

    config = composed(tmp_path, f"method={method}", "model=any", f"model.name={GOLDEN / 'llama-mini'}")
    hparams = KDPOHyperParams.from_config(_filled(config, config.method.hparams))
    assert hparams.layers
    assert hparams.rewrite_module_tmp == "model.layers.{}.mlp.down_proj"


@needs_easyedit
def test_a_cell_of_any_model_records_what_was_derived(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    told = ["model=any", f"model.name={GOLDEN / 'llama-mini'}", "method=ft_l", "method.hparams.lr=1e-3", "n_edits=1"]
    told += ["protocol=single", "protocol.known=0", "protocol.perplexity=false"]
    cell = run(composed(tmp_path, *told))
    manifest = cell.manifest()
    assert manifest["status"] == "complete", (cell.folder / "run.log").read_text("utf-8")
    settings = yaml.safe_load((cell.folder / "config.yaml").read_text("utf-8"))["method"]["hparams"]
    assert manifest["settings"] == settings
    assert settings["rewrite_module_tmp"] == "model.layers.{}.mlp.down_proj.weight"
    assert settings["lr"] == 1e-3
    again = run(composed(tmp_path, *told))
    assert again.folder == cell.folder
    assert again.manifest() == manifest


def test_second_moments_of_too_little_text_are_refused(tmp_path: Path) -> None:
    model, tok = load("llama")
    text = tmp_path / "short.txt"
    text.write_text("What species is ZIC3 specific to? human", "utf-8")
    with pytest.raises(DataError, match="as it has inputs"):
        statistics.ensure(model, tok, derive("MEMIT", model, "any"), str(text), None, tmp_path)
    assert not list(tmp_path.glob("**/*.npz"))


def test_second_moments_are_of_as_many_tokens_as_asked(tmp_path: Path, text: str) -> None:
    import numpy as np

    model, tok = load("llama")
    settings = derive("MEMIT", model, "any")
    statistics.ensure(model, tok, settings, text, None, tmp_path, tokens_per_input=1)
    counts = [int(np.load(file)["mom2.count"]) for file in tmp_path.glob("**/*.npz")]
    assert set(counts) == {model.config.intermediate_size}


def test_first_tokens_count_as_they_do_in_easyedits_own(tmp_path: Path, text: str) -> None:
    import numpy as np

    model, tok = load("llama")
    statistics.ensure(model, tok, derive("MEMIT", model, "any"), text, None, tmp_path)
    documents = statistics.read_text(text)
    counts = [int(np.load(file)["mom2.count"]) for file in tmp_path.glob("**/*.npz")]
    assert set(counts) == {sum(len(tok(document)["input_ids"]) for document in documents)}


def test_moments_of_another_text_lie_elsewhere(tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.txt"
    other.write_text(Path(text).read_text("utf-8") + "one more", "utf-8")
    assert statistics.text_digest(text, None, 4) != statistics.text_digest(str(other), None, 4)
    assert statistics.text_digest(text, None, 4) != statistics.text_digest(text, None, 8)
