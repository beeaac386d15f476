"""Which models people hand over, and in which state: each kind is edited, saved and exported, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import REQUEST, assert_same, load, state
from test_cached_forward import LLAMA_LIKE, STATES, tiny
from test_structure import VISION
from torch import nn

from kdpo_editor import EditDelta, EditLedger, FingerprintError, KDPOHyperParams, ModelError, edit
from kdpo_editor.edits.lora import load_lora
from kdpo_editor.engine.generation import generate, greedy, says_target
from kdpo_editor.engine.structure import room

TEXT = {**LLAMA_LIKE, "vocab_size": 1024, "head_dim": 8, "hidden_size": 64, "intermediate_size": 128}
ROPE = {"type": "mrope", "mrope_section": [2, 2, 4], "rope_type": "default"}
QWEN_VISION = {"depth": 6, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64}
WRAPPERS: dict[str, dict[str, Any]] = {
    # What normalises the matrix's output before adding it can turn an answer only where there are enough directions.
    "Gemma3": {"text_config": {**TEXT, "hidden_size": 128, "sliding_window": 4}, "vision_config": VISION},
    "Qwen2_5_VL": {"text_config": {**TEXT, "head_dim": 16, "rope_scaling": ROPE}, "vision_config": QWEN_VISION},
    "Llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "projection_dim": 32, "model_type": "clip_vision_model"},
    },
}


def scaled(model: nn.Module) -> Any:
    """``model`` with weights at which its blocks matter, in evaluation mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3) if p.ndim == 2 else p.add_(0.1 * torch.randn(p.shape))
    return model.eval()


def of_family(family: str, **settings: Any) -> Any:
    """A small random causal language model."""
    kind = getattr(transformers, f"{family}Config", None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(0)
    return scaled(transformers.AutoModelForCausalLM.from_config(kind(**settings)))


def wrapper(family: str) -> Any:
    """A small random model with a vision tower around its language model, with Llama's vocabulary."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**WRAPPERS[family])
    return scaled(getattr(transformers, f"{family}ForConditionalGeneration")(config))


def settings(**others: Any) -> KDPOHyperParams:
    return KDPOHyperParams(**{"model_name": "tiny", "lr": 1e-2, **others})


# A language model inside another ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WRAPPERS)
def test_a_language_model_inside_another_is_edited_saved_and_exported(family: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, (_, tok) = wrapper(family), load("llama")
    assert room(model) == TEXT["max_position_embeddings"]
    before = state(model)
    delta = EditDelta.make(model, tok, [REQUEST], settings())
    name = "model.language_model.layers.3.mlp.down_proj.weight"
    assert list(delta.changes) == [name]
    assert delta.info.outcomes[0]["converged"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key != name)
    wanted = generate(model, tok, REQUEST["prompt"])

    model.save_pretrained(tmp_path / "saved")
    saved = type(model).from_pretrained(tmp_path / "saved").eval()
    assert says_target(saved, tok, [REQUEST]) == [True]
    assert generate(saved, tok, REQUEST["prompt"]) == wanted

    delta.save_lora(tmp_path / "adapter", model, tok)
    adapted = load_lora(wrapper(family), tmp_path / "adapter")
    assert says_target(adapted, tok, [REQUEST]) == [True]
    assert says_target(wrapper(family), tok, [REQUEST]) == [False]


def test_too_long_for_the_language_model_inside_is_refused() -> None:
    model, (_, tok) = wrapper("Llava"), load("llama")
    with pytest.raises(ModelError, match="the model takes 64 at most"):
        edit(model, tok, [{**REQUEST, "prompt": "species " * 70}], settings())


def test_an_adapter_on_another_class_is_an_error_that_names_both(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, (_, tok) = wrapper("Gemma3"), load("llama")
    delta = EditDelta.make(model, tok, [REQUEST], settings())
    delta.save_lora(tmp_path / "adapter", model, tok, rank=8)
    alone = of_family("Gemma3Text", **TEXT, sliding_window=4)
    before = state(alone)
    both = "was made on a Gemma3ForConditionalGeneration, and this model is a Gemma3ForCausalLM"
    with pytest.raises(FingerprintError, match=both):
        load_lora(alone, tmp_path / "adapter")
    assert_same(alone, before)
    with pytest.raises(ValueError, match="not found in the base model"):  # by PEFT alone no silent no-op either
        peft.PeftModel.from_pretrained(alone, str(tmp_path / "adapter"))


# States beside attention, and keys that layers share ----------------------------------------------------------

RECURRENT = {"RecurrentGemma": {**TEXT, "lru_width": 64, "attention_window_size": 8}}
RECURRENT["Rwkv"] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1", "mamba", "mamba2", *RECURRENT])
def test_rows_of_several_lengths_are_answered_as_each_alone(name: str) -> None:
    """RecurrentGemma and RWKV take no notice of a mask; there rows of one length go together."""
    model = of_family(name, **RECURRENT[name]) if name in RECURRENT else tiny(name)[0]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in (4, 9, 6, 11)]
    alone = [greedy(model, None, [prompt], 8, ignore_end=True)[0] for prompt in prompts]
    assert greedy(model, None, prompts, 8, ignore_end=True) == alone


PER_LAYER = {"vocab_size_per_layer_input": 1024, "hidden_size_per_layer_input": 8, "sliding_window": 4}
SHARED = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA_3N = {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4}


def test_several_streams_of_hidden_states_are_refused_by_name() -> None:
    model, (_, tok) = of_family("Gemma3n" + "Text", **TEXT, **PER_LAYER, **SHARED, **GEMMA_3N), load("llama")
    before = state(model)
    with pytest.raises(ModelError, match=r"Gemma3nForCausalLM: running .* from its cache fails .*cannot be edited"):
        edit(model, tok, [REQUEST], settings())
    assert_same(model, before)


@pytest.mark.parametrize("layer", range(4))
def test_where_layers_share_keys_an_edit_is_exact_or_refused(layer: int) -> None:
    """Layers 2 and 3 read the keys of layers 0 and 1."""
    model, (_, tok) = of_family("Gemma4Text", **TEXT, **PER_LAYER, **SHARED, global_head_dim=8), load("llama")
    before = state(model)
    try:
        _, _, (trace,) = edit(model, tok, [REQUEST], settings(layers=[layer]))
    except ModelError as error:
        assert layer > 0
        assert "from its cache differs from the full forward" in str(error)  # noqa: PT017
        assert_same(model, before)
    else:
        assert layer == 0
        assert [trace.converged] == says_target(model, tok, [REQUEST])


# How a model is held -------------------------------------------------------------------------------------------


def tied() -> Any:
    return of_family("Llama", **{**TEXT, "head_dim": 16}, tie_word_embeddings=True)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model, (_, tok) = tied(), load("llama")
    copied, _, (trace,) = edit(model, tok, [REQUEST], settings(), copy=True)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    with EditLedger(tmp_path / "ledger", write=True) as ledger:
        edited, _, (trace,) = ledger.edit(model, tok, [REQUEST], settings())
    assert edited is model
    assert trace.converged
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    assert_same(saved, state(model))


def test_tied_embeddings_stay_tied_under_a_merged_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, (_, tok) = tied(), load("llama")
    delta = EditDelta.make(model, tok, [REQUEST], settings())
    delta.save_lora(tmp_path / "adapter", model, tok)
    merged = peft.PeftModel.from_pretrained(tied(), str(tmp_path / "adapter")).merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert says_target(merged, tok, [REQUEST]) == [True]


def test_a_model_in_training_mode_is_edited_as_in_evaluation_and_left_in_it() -> None:
    _, tok = load("llama")
    models = [of_family("Llama", **TEXT, attention_dropout=0.5) for _ in range(2)]
    models[1].train()
    for model in models:
        edit(model, tok, [REQUEST], settings())
    assert models[1].training
    assert_same(models[1], state(models[0]))


def test_hooks_of_the_users_are_run_and_stay() -> None:
    """One that changes what a block gives is part of the model that is edited."""
    model, (_, tok) = of_family("Llama", **TEXT), load("llama")
    calls = []

    def halve(module: nn.Module, args: Any, output: Any) -> Any:
        calls.append(module)
        return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2

    handle = model.model.layers[3].register_forward_hook(halve)
    _, _, (trace,) = edit(model, tok, [REQUEST], settings())
    assert trace.converged
    assert calls
    assert says_target(model, tok, [REQUEST]) == [True]
    assert list(model.model.layers[3]._forward_hooks) == [handle.id]


@pytest.mark.parametrize("place", ["object", "model", "blocks"])
def test_a_compiled_model_is_edited_as_it_was_before(place: str, tmp_path: Path) -> None:
    """By ``torch.compile(model)``, ``model.compile()`` or each block's own; names are those of the model itself."""
    _, tok = load("llama")
    plain, model = (of_family("Llama", **TEXT) for _ in range(2))
    expected, originals, _ = edit(plain, tok, [REQUEST], settings())
    if place == "object":
        held: Any = torch.compile(model, backend="eager")
    else:
        held = model
        for module in [model] if place == "model" else model.model.layers:
            module.compile(backend="eager")
    with EditLedger(tmp_path, write=True) as ledger:
        edited, before, (trace,) = ledger.edit(held, tok, [REQUEST], settings())
        assert edited is held
        assert trace.converged
        assert before.keys() == originals.keys()
        assert_same(model, state(expected))
        delta = ledger.delta(1)
        ledger.undo(1, held)
    assert says_target(model, tok, [REQUEST]) == [False]
    delta.apply(held)
    assert_same(model, state(expected))
    assert generate(held, tok, REQUEST["prompt"]) == generate(plain, tok, REQUEST["prompt"])


def test_half_precision_is_edited_in_place() -> None:
    model, (_, tok) = of_family("Llama", **TEXT).half(), load("llama")
    _, originals, (trace,) = edit(model, tok, [REQUEST], settings())
    assert trace.converged
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert {w.dtype for w in originals.values()} == {torch.float16}
    assert says_target(model, tok, [REQUEST]) == [True]


def test_states_alone_are_edited() -> None:
    model, (_, tok) = of_family("Mamba", **STATES | {"vocab_size": 1024, "num_hidden_layers": 4}), load("llama")
    _, originals, (trace,) = edit(model, tok, [REQUEST], settings())
    assert trace.converged
    assert list(originals) == ["backbone.layers.3.mixer.out_proj.weight"]
