"""The cached forward gives what the full forward gives, on every architecture people edit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from plain import plain_kdpo
from torch import nn

from kdpo_editor import KDPOHyperParams, ModelError, ReplayBuffer, edit
from kdpo_editor.engine.batches import make_batches
from kdpo_editor.engine.cached_forward import CachedForward
from kdpo_editor.engine.examination import find_narrow
from kdpo_editor.engine.generation import greedy
from kdpo_editor.lifelong.replay import entries_of
from kdpo_editor.requests.tokens import EditTokens

LLAMA_LIKE = {
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NO_GROUPS = {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}
GPT_LIKE = {"vocab_size": 97, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
WINDOW = {"head_dim": 8, "sliding_window": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
STATES = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32, "state_size": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
# Config class, list of blocks, edited matrix, settings, and whether replay begins at the matrix.
ARCHITECTURES: dict[str, tuple[str, str, str, dict[str, Any], bool]] = {
    "gpt2": ("GPT2", "transformer.h", "mlp.c_proj", GPT_LIKE, True),
    "gptj": ("GPTJ", "transformer.h", "mlp.fc_out", {**GPT_LIKE, "rotary_dim": 4}, True),
    "gpt_neox": ("GPTNeoX", "gpt_neox.layers", "mlp.dense_4h_to_h", NO_GROUPS, True),
    "gpt_neo": (
        "GPTNeo",
        "transformer.h",
        "mlp.c_proj",
        {
            "vocab_size": 97,
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
        True,
    ),
    "opt": ("OPT", "model.decoder.layers", "fc2", {**NO_GROUPS, "ffn_dim": 64, "word_embed_proj_dim": 16}, True),
    "bloom": (
        "Bloom",
        "transformer.h",
        "mlp.dense_4h_to_h",
        {"vocab_size": 97, "hidden_size": 32, "n_layer": 4, "n_head": 4},
        True,
    ),
    "falcon": ("Falcon", "transformer.h", "mlp.dense_4h_to_h", {**NO_GROUPS, "alibi": True}, True),
    "llama": ("Llama", "model.layers", "mlp.down_proj", LLAMA_LIKE, True),
    "mistral": ("Mistral", "model.layers", "mlp.down_proj", {**LLAMA_LIKE, "sliding_window": 4}, True),
    "qwen2": ("Qwen2", "model.layers", "mlp.down_proj", LLAMA_LIKE, True),
    "qwen3": ("Qwen3", "model.layers", "mlp.down_proj", {**LLAMA_LIKE, "head_dim": 8}, True),
    "gemma": ("Gemma", "model.layers", "mlp.down_proj", {**LLAMA_LIKE, "head_dim": 8}, True),
    "gemma2": ("Gemma2", "model.layers", "mlp.down_proj", {**LLAMA_LIKE, **WINDOW}, False),
    "gemma3": ("Gemma3Text", "model.layers", "mlp.down_proj", {**LLAMA_LIKE, **WINDOW}, False),
    "phi": ("Phi", "model.layers", "mlp.fc2", LLAMA_LIKE, True),
    "phi3": ("Phi3", "model.layers", "mlp.down_proj", LLAMA_LIKE, True),
    "stablelm": ("StableLm", "model.layers", "mlp.down_proj", LLAMA_LIKE, True),
    "olmo2": ("Olmo2", "model.layers", "mlp.down_proj", LLAMA_LIKE, False),
    "cohere": ("Cohere", "model.layers", "mlp.down_proj", LLAMA_LIKE, True),
    "granite": (
        "Granite",
        "model.layers",
        "mlp.down_proj",
        {**LLAMA_LIKE, "residual_multiplier": 0.3, "logits_scaling": 7.0},
        False,
    ),
    "smollm3": ("SmolLM3", "model.layers", "mlp.down_proj", {**LLAMA_LIKE, "no_rope_layer_interval": 2}, True),
    "olmo3": ("Olmo3", "model.layers", "mlp.down_proj", {**LLAMA_LIKE, "sliding_window": 4}, False),
    "glm4": ("Glm4", "model.layers", "mlp.down_proj", {**LLAMA_LIKE, "head_dim": 8}, False),
    "starcoder2": ("Starcoder2", "model.layers", "mlp.c_proj", LLAMA_LIKE, True),
    # Convolutions and states beside attention, or instead of it.
    "lfm2": (
        "Lfm2",
        "model.layers",
        "feed_forward.w2",
        {**LLAMA_LIKE, "layer_types": ["conv", "full_attention"] * 2},
        True,
    ),
    "falcon_h1": (
        "FalconH1",
        "model.layers",
        "feed_forward.down_proj",
        {**LLAMA_LIKE, **MAMBA, "head_dim": 8, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
        True,
    ),
    "granite_hybrid": (
        "GraniteMoeHybrid",
        "model.layers",
        "shared_mlp.output_linear",
        {
            **LLAMA_LIKE,
            **MAMBA,
            "num_local_experts": 0,
            "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention"] * 2,
            "residual_multiplier": 0.3,
        },
        False,
    ),
    "mamba": ("Mamba", "backbone.layers", "mixer.out_proj", {**STATES, "num_hidden_layers": 4}, True),
    "mamba2": (
        "Mamba2",
        "backbone.layers",
        "mixer.out_proj",
        {**STATES, "num_hidden_layers": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        True,
    ),
    # Mixtures of experts without a shared expert: the parameter that stacks the matrices of all.
    "qwen3_moe": (
        "Qwen3Moe",
        "model.layers",
        "mlp.experts.down_proj",
        {**LLAMA_LIKE, **EXPERTS, "num_experts": 8},
        False,
    ),
    "mixtral": ("Mixtral", "model.layers", "mlp.experts.down_proj", {**LLAMA_LIKE, "num_local_experts": 4}, False),
    "gpt_oss": (
        "GptOss",
        "model.layers",
        "mlp.experts.down_proj",
        {**LLAMA_LIKE, **WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
        False,
    ),
    "granite_moe": (
        "GraniteMoe",
        "model.layers",
        "block_sparse_moe.experts.down_proj",
        {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
        False,
    ),
    # With one: its matrix.
    "qwen2_moe": (
        "Qwen2Moe",
        "model.layers",
        "mlp.shared_expert.down_proj",
        {**LLAMA_LIKE, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64},
        False,
    ),
    "deepseek_v2": (
        "DeepseekV2",
        "model.layers",
        "mlp.shared_experts.down_proj",
        {**NO_GROUPS, **EXPERTS, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 8},
        True,
    ),
    "glm4_moe": (
        "Glm4Moe",
        "model.layers",
        "mlp.shared_experts.down_proj",
        {**LLAMA_LIKE, **EXPERTS, "n_routed_experts": 8, "head_dim": 8, "first_k_dense_replace": 0},
        True,
    ),
    "granite_moe_shared": (
        "GraniteMoeShared",
        "model.layers",
        "shared_mlp.output_linear",
        {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64},
        True,
    ),
}


def skip_without_stacks() -> None:
    """Before release 5 transformers kept most routed experts in modules of their own, or under other names."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip(f"transformers {transformers.__version__} does not stack experts")


def tiny(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, str, str]:
    family, blocks, matrix, settings, _ = ARCHITECTURES[name]
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    if ".experts." in matrix:
        skip_without_stacks()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # logits of a size at which scaling and soft-capping show, and blocks that matter
        for p in model.parameters():
            p.mul_(3) if p.ndim == 2 else p.add_(0.1 * torch.randn(p.shape))
    return model.to(dtype), blocks, matrix


def parameter_at(model: Any, matrix: str) -> tuple[str, str, nn.Parameter]:
    """The module that ``matrix`` is, or stands in, and the parameter: its name and itself."""
    names = dict(model.named_modules())
    module, name = (matrix, f"{matrix}.weight") if matrix in names else (matrix.rpartition(".")[0], matrix)
    return module, name, model.get_parameter(name)


def forward_of(name: str, layer: int, dtype: torch.dtype = torch.float32) -> tuple[Any, CachedForward, nn.Parameter]:
    model, blocks, matrix = tiny(name, dtype)
    module, _, weight = parameter_at(model, f"{blocks}.{layer}.{matrix}")
    return model, CachedForward(model, blocks, layer, module), weight


IDS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([12, 7, 9])
POSITIONS = torch.tensor([[3, 7, 11], [2, 5, 6], [4, 6, 8]])


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(12) < LENGTHS[:, None]
    return IDS.masked_fill(~mask, 0), mask.long()


def full(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    return logits.gather(1, POSITIONS.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


@torch.no_grad()
def change(weight: torch.Tensor) -> None:
    weight.add_(weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).to(weight))


@pytest.fixture(params=[0, 10**9], ids=["narrow", "whole"])
def worth(request: pytest.FixtureRequest) -> int:
    """The last block computed where logits are read only, and everywhere."""
    return int(request.param)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", ["mlp", "self_attn.q_proj", "self_attn.o_proj"]),
        ("gpt2", ["mlp", "attn.c_proj"]),  # queries, keys and values in one product
        ("gptj", ["mlp", "attn.q_proj", "attn.out_proj"]),
    ],
)
def test_all_but_keys_and_values_is_needed_at_answers_only(name: str, expected: list[str]) -> None:
    _, forward, _ = forward_of(name, 1)
    forward.capture(*padded()[:1], POSITIONS)
    assert sorted(find_narrow(forward, padded()[0][:1], True)) == sorted(expected)


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_replay_equals_full_forward(name: str, layer: int, worth: int) -> None:
    """With padding in the batch, after the edited matrix changed; all logits and two of each position."""
    model, forward, weight = forward_of(name, layer)
    forward.worth = worth
    ids, mask = padded()
    cache, first = forward.capture(ids, POSITIONS)
    assert (cache.inner is not None) is ARCHITECTURES[name][4]
    before = full(model, ids, mask)
    torch.testing.assert_close(forward.logits(first), before, atol=1e-5, rtol=0)
    change(weight)
    after = full(model, ids, mask)
    assert (after - before).norm() > 0.03 * before.norm()  # a change that shows
    torch.testing.assert_close(forward.logits(forward.from_cache(cache)), after, atol=1e-5, rtol=0)
    some = cache.rows(torch.tensor([2, 0]))
    torch.testing.assert_close(forward.logits(forward.from_cache(some)), after[[2, 0]], atol=1e-5, rtol=0)
    pair = torch.stack([POSITIONS, POSITIONS + 40], -1)
    rows = forward.head_rows(pair)
    assert rows is not None
    torch.testing.assert_close(
        forward.logits(forward.from_cache(cache), rows), after.gather(-1, pair), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_padding_on_the_right_changes_nothing(name: str) -> None:
    """A batch of rows of different lengths gives what each row gives by itself; so do its states, where it has such."""
    model, forward, _ = forward_of(name, 1)
    cache, first = forward.capture(padded()[0].masked_fill(padded()[1] == 0, 50), POSITIONS)
    alone = [
        model(input_ids=ids[None, :n]).logits[0, at].float() for ids, n, at in zip(IDS, LENGTHS, POSITIONS, strict=True)
    ]
    for hidden in (first, forward.from_cache(cache)):
        torch.testing.assert_close(forward.logits(hidden), torch.stack(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_from_some_tokens_only(name: str, worth: int) -> None:
    """Two matrices are trained at a few tokens: against the full model, their outputs cut off elsewhere."""
    model, blocks, matrix = tiny(name)
    found = [parameter_at(model, f"{blocks}.{layer}.{matrix}") for layer in (1, 2)]
    modules, weights = [module for module, _, _ in found], [weight for _, _, weight in found]
    for p in model.parameters():
        p.requires_grad_(any(p is weight for weight in weights))
    ids, mask = padded()
    where = torch.zeros(ids.shape, dtype=torch.bool)
    where[0, 1:3], where[1, 2:4], where[2, :2] = True, True, True
    forward = CachedForward(model, blocks, 1, modules[0], modules, "subject")
    forward.worth = worth
    handles = [
        model.get_submodule(module).register_forward_hook(
            lambda module, args, output: torch.where(where.view(*output.shape[:-1], 1), output, output.detach())
        )
        for module in modules
    ]
    expected = torch.autograd.grad(full(model, ids, mask).square().mean(), weights)
    for handle in handles:
        handle.remove()
    whole = torch.autograd.grad(full(model, ids, mask).square().mean(), weights)
    assert (whole[0] - expected[0]).norm() > 0.1 * whole[0].norm()
    cache, first = forward.capture(ids, POSITIONS, where)
    some = cache.rows(torch.tensor([2, 0, 1]))
    for hidden in (first, forward.from_cache(cache), forward.from_cache(some)):
        gradients = torch.autograd.grad(forward.logits(hidden).square().mean(), weights)
        for gradient, exact in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize("groups", [[[1, 2, 0]], [[1, 2], [0]], [[1], [2], [0]]], ids=["all", "two", "three"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_edits_captured_one_by_one_are_replayed_together(name: str, groups: list[list[int]]) -> None:
    """Of different lengths, after the edited matrix changed, with what the blocks are told made from other tokens."""
    model, forward, weight = forward_of(name, 2)
    hparams = KDPOHyperParams(model_name=name, layers=[2], rewrite_module_tmp="{}", replay=True)
    edits = [EditTokens(ids[: n - 2], ids[n - 2 : n]) for ids, n in zip(IDS, LENGTHS.tolist(), strict=True)]
    earlier = ReplayBuffer()
    kept = [one for tokens in edits for one in entries_of([tokens], make_batches(forward, [tokens], hparams))]
    change(weight)
    batches = [
        batch
        for members in groups
        for (batch,) in earlier.batches(forward, {member: kept[member] for member in members}, hparams)
    ]
    assert [batch.members for batch in batches] == groups
    for member, hidden in ((m, row) for b in batches for m, row in zip(b.members, b.hidden, strict=True)):
        expected = model(input_ids=edits[member].sequence.unsqueeze(0)).logits[0, -2:].float()
        torch.testing.assert_close(forward.logits(hidden.unsqueeze(0))[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_replay_in_bfloat16(name: str, worth: int) -> None:
    """Off by no more than a few times what bfloat16 itself is off from fp32."""
    model, forward, weight = forward_of(name, 2, torch.bfloat16)
    forward.worth = worth
    exact, _, exact_weight = forward_of(name, 2)
    exact.load_state_dict(model.state_dict())
    ids, mask = padded()
    cache, _ = forward.capture(ids, POSITIONS)
    change(weight)
    exact_weight.copy_(weight)
    wanted = full(exact, ids, mask)
    unavoidable = (full(model, ids, mask) - wanted).norm()
    assert (forward.logits(forward.from_cache(cache)) - wanted).norm() <= 2 * unavoidable + 1e-3 * wanted.norm()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_equals_full_backward(name: str, worth: int) -> None:
    model, forward, weight = forward_of(name, 1)
    forward.worth = worth
    ids, mask = padded()
    for p in model.parameters():
        p.requires_grad_(p is weight)
    cache, first = forward.capture(ids, POSITIONS)
    (expected,) = torch.autograd.grad(full(model, ids, mask).square().mean(), weight)
    for hidden in (first, forward.from_cache(cache)):
        (gradient,) = torch.autograd.grad(forward.logits(hidden).square().mean(), weight)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_position_that_padding_names_again_counts_once(name: str, worth: int) -> None:
    """A short answer is padded with position 0, which is its own where its prompt is one token."""
    model, forward, weight = forward_of(name, 1)
    forward.worth = worth
    for p in model.parameters():
        p.requires_grad_(p is weight)
    ids, positions = IDS[:2, :6], torch.tensor([[3, 4, 5], [0, 0, 0]])
    read = torch.tensor([[1, 1, 1], [1, 0, 0]]).unsqueeze(-1)
    whole = model(input_ids=ids).logits.gather(1, positions.unsqueeze(-1).expand(-1, -1, 97))
    (expected,) = torch.autograd.grad((whole * read).square().mean(), weight)
    cache, first = forward.capture(ids, positions)
    for hidden in (first, forward.from_cache(cache)):
        (gradient,) = torch.autograd.grad((forward.logits(hidden) * read).square().mean(), weight)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mistral"])
@torch.no_grad()
def test_greedy_equals_decoding_without_a_cache(name: str) -> None:
    model, _, _ = tiny(name)
    ids = torch.arange(3, 9)
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(expected.unsqueeze(0)).logits[0, -1:].argmax(-1)])
    (said,) = greedy(model, None, [ids.tolist()], 6, ignore_end=True)
    assert said.ids == expected[6:].tolist()


# What cannot be replayed is refused ---------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_that_works_on_after_its_last_module_is_refused() -> None:
    class Odd(transformers.LlamaModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state.cumsum(1)  # unseen by anything that watches modules
            return output

    model, forward, _ = forward_of("llama", 2)
    model.model.__class__ = Odd
    with pytest.raises(ModelError, match="cannot be edited"):
        forward.capture(IDS, POSITIONS)


@torch.no_grad()
def test_a_model_that_feeds_the_edited_layer_past_its_block_is_refused() -> None:
    class Skips(transformers.LlamaModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen: list[torch.Tensor] = []
            watch = self.layers[1].mlp.down_proj.register_forward_hook(lambda m, a, out: seen.append(out))
            later = self.layers[3].register_forward_pre_hook(
                lambda m, a, k: (a, {**k, "extra": seen[0]}), with_kwargs=True, prepend=True
            )
            own = self.layers[3].forward
            self.layers[3].forward = lambda *a, extra, **k: own(*a, **k) + extra
            try:
                return super().forward(*args, **kwargs)
            finally:
                watch.remove()
                later.remove()
                del self.layers[3].forward

    model, forward, _ = forward_of("llama", 1)
    model.model.__class__ = Skips
    with pytest.raises(ModelError):
        forward.capture(IDS, POSITIONS)


class Hidden:
    """Something that belongs to each row of a batch, where nothing that looks for tensors finds it."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values


class Known(Hidden):
    """The same, of which rows can be asked for."""

    def rows(self, kept: torch.Tensor) -> Known:
        return Known(self.values[kept])


@pytest.mark.parametrize("kind", [Known, Hidden], ids=["known", "hidden"])
@torch.no_grad()
def test_a_model_whose_rows_cannot_be_told_apart_is_refused(kind: type[Hidden]) -> None:
    class Adds(type(forward_of("llama", 1)[0].model.layers[3])):  # type: ignore[misc]
        def forward(self, *args: Any, extra: Hidden, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) + extra.values

    class Gives(transformers.LlamaModel):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            extra = kind(self.embed_tokens(input_ids))
            handle = self.layers[3].register_forward_pre_hook(
                lambda module, args, given: (args, {**given, "extra": extra}), with_kwargs=True, prepend=True
            )
            try:
                return super().forward(input_ids, **kwargs)
            finally:
                handle.remove()

    model, forward, _ = forward_of("llama", 1)
    model.model.__class__ = Gives
    model.model.layers[3].__class__ = Adds
    if kind is Known:
        cache, hidden = forward.capture(IDS, POSITIONS)
        torch.testing.assert_close(forward.from_cache(cache), hidden)
    else:
        with pytest.raises(ModelError, match="cannot be edited"):
            forward.capture(IDS, POSITIONS)


def build(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, family)(getattr(transformers, settings.pop("config"))(**settings))


REQUEST = [{"prompt": "What species is ZIC3 specific to?", "target_new": "male"}]


def test_encoder_decoders_are_refused(llama: Any, settings: Any) -> None:
    model = build("T5ForConditionalGeneration", config="T5Config", vocab_size=1024, d_model=32, num_layers=2, d_ff=64)
    with pytest.raises(ModelError, match=r"T5ForConditionalGeneration is an encoder-decoder"):
        edit(model, llama[1], REQUEST, settings(rewrite_module_tmp="decoder.block.{}.layer.2.DenseReluDense.wo"))


def test_quantised_models_are_refused(llama: Any, settings: Any) -> None:
    model, tok = llama
    model.is_quantized = True
    with pytest.raises(ModelError, match=r"quantised"):
        edit(model, tok, REQUEST, settings())


def test_an_examination_that_saw_no_numbers_is_not_remembered() -> None:
    """Gemma-2 must be replayed from its block, also if the first look at it found NaN."""
    model, forward, weight = forward_of("gemma2", 2)
    ids, mask = padded()
    poison = model.model.norm.register_forward_hook(lambda m, a, out: out * float("nan"))
    with torch.no_grad():
        forward.capture(ids, POSITIONS)
        poison.remove()
        cache, _ = forward.capture(ids, POSITIONS)
        change(weight)
        wanted = full(model, ids, mask)
        torch.testing.assert_close(forward.logits(forward.from_cache(cache)), wanted, atol=1e-5, rtol=0)


def test_editor_equals_plain_implementation(llama: Any, settings: Any) -> None:
    model, tok = llama
    request = {"prompt": "Which family does Epaspidoceras belong to?", "target_new": "Noctuidae"}
    _, originals, (trace,) = edit(model, tok, [request], settings(num_steps=8, cycles=3))
    edited = model.get_parameter("model.layers.4.mlp.down_proj.weight").detach().clone()
    model.load_state_dict(originals, strict=False)
    plain = plain_kdpo(model, tok, request, "model.layers.4.mlp.down_proj.weight", lr=1e-3, cycles=3)
    assert [c.rejected for c in trace.cycles] == plain.negatives
    assert [x for c in trace.cycles for x in c.losses] == pytest.approx(plain.losses, abs=1e-5)
    torch.testing.assert_close(edited, model.get_parameter("model.layers.4.mlp.down_proj.weight"), rtol=0, atol=1e-5)
