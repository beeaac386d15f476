"""What is found out about a model from its structure, and the settings that are derived from it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import REQUEST, assert_same, load, state
from test_cached_forward import ARCHITECTURES, LLAMA_LIKE, parameter_at, skip_without_stacks
from torch import nn

from kdpo_editor import EditDelta, EditLedger, HyperParamsError, KDPOHyperParams, ModelError, edit
from kdpo_editor.derived import complete, default_layers
from kdpo_editor.engine.structure import Structure, editable_layers, room, structure_of
from kdpo_editor.engine.weights import find_matrices
from kdpo_editor.hparams import settings_folder

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,  # more than the language model has
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {**LLAMA_LIKE, "vocab_size": 1024, "head_dim": 8, "sliding_window": 4}


# What normalises the matrix's output before adding it can turn an answer only where there are enough directions.
WIDER = {name: {"hidden_size": 128} for name in ("gemma2", "gemma3", "olmo3", "glm4")}


def build(family: str, **settings: Any) -> Any:
    """A small random model."""
    kind = getattr(transformers, f"{family}Config", None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(kind(**settings)).eval()


def random_model(name: str) -> Any:
    """A small random model of an architecture, with room for the small Llama's vocabulary and blocks that matter."""
    if name == "gemma3_multimodal":
        model = build("Gemma3", text_config=TEXT, vision_config=VISION)
    else:
        family, _, matrix, settings, _ = ARCHITECTURES[name]
        if ".experts." in matrix:
            skip_without_stacks()
        model = build(family, **{**settings, "vocab_size": 1024, **WIDER.get(name, {})})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3) if p.ndim == 2 else p.add_(0.1 * torch.randn(p.shape))
    return model


MATRICES = {name: f"{blocks}.{{}}.{matrix}" for name, (_, blocks, matrix, _, _) in ARCHITECTURES.items()}
MATRICES["gemma3_multimodal"] = "model.language_model.layers.{}.mlp.down_proj"


@pytest.mark.parametrize("name", MATRICES)
def test_an_edit_with_derived_settings_is_won(name: str) -> None:
    """The matrix is the last that writes into the residual stream, and the model then says what it was to say."""
    model, (_, tok) = random_model(name), load("llama")
    before = state(model)
    hparams = KDPOHyperParams(model_name=name, lr=1e-2)
    found = complete(hparams, model)
    assert (found.layers, found.rewrite_module_tmp) == ([3], MATRICES[name])
    _, originals, (trace,) = edit(model, tok, [REQUEST], hparams)
    assert trace.converged
    assert trace.steps > 0
    assert list(originals) == [parameter_at(model, MATRICES[name].format(3))[1]]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(originals)
    prompt = tok(REQUEST["prompt"], return_tensors="pt")["input_ids"]
    answer = tok(f"{REQUEST['prompt']} {REQUEST['target_new']}")["input_ids"][prompt.shape[1] :]
    assert model(input_ids=prompt).logits[0, -1].argmax() == answer[0]


# What is found -------------------------------------------------------------------------------------------------


def llama(**settings: Any) -> Any:
    return build("Llama", **{**LLAMA_LIKE, "vocab_size": 1024, **settings})


STRUCTURES = {
    "gpt2": Structure(
        blocks="transformer.h",
        depth=4,
        matrix="transformer.h.{}.mlp.c_proj",
        mlp="transformer.h.{}.mlp",
        attention="transformer.h.{}.attn",
        final_norm="transformer.ln_f",
        head="transformer.wte",
        embeddings="transformer.wte",
    ),
    "opt": Structure(
        blocks="model.decoder.layers",
        depth=4,
        matrix="model.decoder.layers.{}.fc2",
        mlp="model.decoder.layers.{}",
        attention="model.decoder.layers.{}.self_attn",
        final_norm="model.decoder.final_layer_norm",
        head="model.decoder.embed_tokens",
        embeddings="model.decoder.embed_tokens",
    ),
    "bloom": Structure(  # a norm after the embeddings too
        blocks="transformer.h",
        depth=4,
        matrix="transformer.h.{}.mlp.dense_4h_to_h",
        mlp="transformer.h.{}.mlp",
        attention="transformer.h.{}.self_attention",
        final_norm="transformer.ln_f",
        head="transformer.word_embeddings",
        embeddings="transformer.word_embeddings",
    ),
    "gptj": Structure(
        blocks="transformer.h",
        depth=4,
        matrix="transformer.h.{}.mlp.fc_out",
        mlp="transformer.h.{}.mlp",
        attention="transformer.h.{}.attn",
        final_norm="transformer.ln_f",
        head="lm_head",
        embeddings="transformer.wte",
    ),
    "mamba": Structure(
        blocks="backbone.layers",
        depth=4,
        matrix="backbone.layers.{}.mixer.out_proj",
        mlp="backbone.layers.{}.mixer",
        attention=None,
        final_norm="backbone.norm_f",
        head="backbone.embeddings",
        embeddings="backbone.embeddings",
    ),
    "gemma3_multimodal": Structure(
        blocks="model.language_model.layers",
        depth=4,
        matrix="model.language_model.layers.{}.mlp.down_proj",
        mlp="model.language_model.layers.{}.mlp",
        attention="model.language_model.layers.{}.self_attn",
        final_norm="model.language_model.norm",
        head="model.language_model.embed_tokens",
        embeddings="model.language_model.embed_tokens",
    ),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_part_is_named(name: str) -> None:
    assert structure_of(random_model(name)) == STRUCTURES[name]


@pytest.mark.parametrize("name", ["gpt2", "gemma3_multimodal", "falcon_h1", "qwen3_moe", "deepseek_v2"])
def test_a_model_without_weights_will_do(name: str) -> None:
    with torch.device("meta"):
        outline = random_model(name)
    assert structure_of(outline) == structure_of(random_model(name))


class Unheard(nn.Module):
    """An MLP whose names say nothing, with a matrix as wide as the stream that is not its last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.omega = nn.Linear(2 * size, size)
        self.alpha = nn.Linear(size, size)
        self.beta = nn.Linear(size, 2 * size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.omega(self.beta(self.alpha(hidden)).relu())
        return output


def test_where_names_say_nothing_the_last_matrix_that_is_called_is_taken() -> None:
    model = llama()
    for block in model.model.layers:
        block.mlp = Unheard(LLAMA_LIKE["hidden_size"])
    assert structure_of(model).matrix == "model.layers.{}.mlp.omega"


def test_watching_leaves_a_model_as_it_was() -> None:
    model = random_model("bloom").train()
    before, seed = state(model), torch.get_rng_state()
    structure_of(model)
    assert_same(model, before)
    assert model.training
    assert torch.equal(torch.get_rng_state(), seed)
    assert not any(module._forward_hooks for module in model.modules())


def test_lengths_of_a_multimodal_model_are_its_language_models() -> None:
    assert room(random_model("gemma3_multimodal")) == LLAMA_LIKE["max_position_embeddings"]


# What is refused -----------------------------------------------------------------------------------------------


def test_quantised_weights_are_refused() -> None:
    model, (_, tok) = llama(), load("llama")
    model.is_quantized = True
    with pytest.raises(ModelError, match="was loaded quantised"):
        edit(model, tok, [REQUEST], KDPOHyperParams(model_name="llama"))


def test_encoder_decoders_are_refused() -> None:
    config = transformers.T5Config(vocab_size=97, d_model=32, num_layers=2, d_ff=64)
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        structure_of(transformers.T5ForConditionalGeneration(config))


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="LlamaModel has no language-model head"):
        structure_of(llama().model)


# What is derived -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "everywhere", "subject"),
    [
        (32, [21], [2, 4, 6, 9]),  # the paper's for Llama-2-7B
        (30, [20], [2, 4, 6, 8]),
        (18, [12], [1, 2, 4, 5]),
        (4, [3], [0, 1]),
        (2, [1], [0]),
        (1, [0], [0]),
    ],
)
def test_layers_go_by_depth(depth: int, everywhere: list[int], subject: list[int]) -> None:
    assert default_layers(depth, range(depth)) == everywhere
    assert default_layers(depth, range(depth), all_tokens=False) == subject


def test_blocks_of_a_hybrid_without_the_matrix_are_passed_over() -> None:
    kinds = ["mamba", "mlp", "mlp", "attention"]
    states = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
    settings = {**LLAMA_LIKE, **states, "vocab_size": 1024, "head_dim": 8, "layers_block_type": kinds}
    model, (_, tok) = build("NemotronH", **settings), load("llama")
    assert editable_layers(model, structure_of(model).matrix) == [1, 2]
    hparams = KDPOHyperParams(model_name="hybrid", lr=1e-2)
    found = complete(hparams, model)
    assert (found.layers, found.rewrite_module_tmp) == ([2], "model.layers.{}.mixer.down_proj")
    _, _, (trace,) = edit(model, tok, [REQUEST], hparams)
    assert trace.converged


def test_a_layer_that_was_chosen_is_not_passed_over() -> None:
    with pytest.raises(ModelError, match="layers: 7 is outside the model, which has 4 layers"):
        edit(llama(), load("llama")[1], [REQUEST], KDPOHyperParams(model_name="llama", layers=[7]))


def test_what_was_chosen_stays() -> None:
    model = llama()
    layers = complete(KDPOHyperParams(model_name="llama", layers=[1, 2], lr=0.5), model)
    assert (layers.layers, layers.rewrite_module_tmp, layers.lr) == ([1, 2], "model.layers.{}.mlp.down_proj", 0.5)
    template = complete(KDPOHyperParams(model_name="llama", rewrite_module_tmp="model.layers.{}.mlp.up_proj"), model)
    assert (template.layers, template.rewrite_module_tmp) == ([3], "model.layers.{}.mlp.up_proj")
    assert complete(template, model) is template


def test_a_template_that_names_no_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no list of layers 'transformer\.h'; it has model\.layers"):
        complete(KDPOHyperParams(model_name="llama", rewrite_module_tmp="transformer.h.{}.mlp.c_proj"), llama())


@pytest.mark.parametrize(("depth", "layers"), [(24, [21]), (4, [3])], ids=["its own depth", "too shallow"])
def test_the_papers_layers_win_over_the_depths(depth: int, layers: list[int]) -> None:
    model = build("Qwen2", **{**LLAMA_LIKE, "num_hidden_layers": depth})
    assert complete(KDPOHyperParams(model_name="Qwen/Qwen1.5-0.5B"), model).layers == layers


@pytest.mark.parametrize(
    "file",
    sorted(set((settings_folder() / "KDPO").glob("*.yaml")) - {settings_folder() / "KDPO" / "auto.yaml"}),
    ids=lambda f: f.stem,
)
def test_ready_made_settings_leave_nothing_to_derive(file: Path) -> None:
    hparams = KDPOHyperParams.from_hparams(file)
    assert complete(hparams, nn.Module()) is hparams


def test_what_is_derived_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    with caplog.at_level(logging.INFO, "kdpo_editor"):
        for _ in range(2):
            complete(KDPOHyperParams(model_name="some/llama"), model)
    assert caplog.messages == [
        "some/llama: derived layers: [3], rewrite_module_tmp: model.layers.{}.mlp.down_proj",
    ]


def test_settings_that_are_not_complete_say_what_completes_them() -> None:
    with pytest.raises(HyperParamsError, match=r"layers: not known yet; kdpo_editor\.derived\.complete"):
        find_matrices(llama(), KDPOHyperParams(model_name="llama"))


def test_ledgers_and_deltas_hold_what_was_derived(tmp_path: Path) -> None:
    hparams = KDPOHyperParams(model_name="llama", lr=1e-2)
    model, tok = load("llama")
    expected = complete(hparams, model).to_dict()
    assert EditDelta.make(load("llama")[0], tok, [REQUEST], hparams).info.hparams == expected
    with EditLedger(tmp_path, write=True) as ledger:
        ledger.edit(model, tok, [REQUEST], hparams)
        assert ledger.branch[-1].info.hparams == expected
