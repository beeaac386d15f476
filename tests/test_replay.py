"""The replayed suffix gives what the full forward gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from plain import plain_kdpo

from kdpo_editor import ModelError, edit
from kdpo_editor.suffix import Suffix, greedy

COMMON = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_LIKE = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2", "transformer.h", {**COMMON, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    "llama": ("Llama", "model.layers", LLAMA_LIKE),
    "qwen2": ("Qwen2", "model.layers", LLAMA_LIKE),
    "mistral": ("Mistral", "model.layers", {**LLAMA_LIKE, "sliding_window": 4}),
    "gemma2": ("Gemma2", "model.layers", {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 4}),
}


def tiny(name: str) -> tuple[Any, str]:
    family, blocks, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # logits of a size at which scaling and soft-capping show
        model.get_output_embeddings().weight.mul_(20)
    return model, blocks


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replay_equals_full_forward(name: str, layer: int) -> None:
    model, blocks = tiny(name)
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([3, 7, 10, 11])
    suffix = Suffix(model, blocks, layer)
    with torch.no_grad():
        captured, first = suffix.capture(ids, positions)
        assert captured.hidden.shape == (2, 12, 32)
        torch.testing.assert_close(first, model(ids).logits[:, positions], atol=1e-5, rtol=0)
        for p in model.get_submodule(f"{blocks}.{layer}").parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        full = model(ids).logits[:, positions]
        torch.testing.assert_close(suffix.replay(captured), full, atol=1e-5, rtol=0)
        assert (full - first).abs().max() > 0.1  # the change was one that shows


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_equals_full_backward(name: str) -> None:
    model, blocks = tiny(name)
    ids, positions = torch.arange(3, 15).unsqueeze(0), torch.tensor([8, 11])
    suffix = Suffix(model, blocks, 1)
    weight = next(p for n, p in model.get_submodule(f"{blocks}.1").named_parameters() if "mlp" in n and p.ndim == 2)
    for p in model.parameters():
        p.requires_grad_(p is weight)
    captured, first = suffix.capture(ids, positions)
    (expected,) = torch.autograd.grad(model(ids).logits[:, positions].square().mean(), weight)
    for logits in (first, suffix.replay(captured)):
        (gradient,) = torch.autograd.grad(logits.square().mean(), weight)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_decoding_without_a_cache(name: str) -> None:
    model, _ = tiny(name)
    ids = torch.arange(3, 9)
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, model(expected.unsqueeze(0)).logits[0, -1:].argmax(-1)])
    assert torch.equal(greedy(model, ids, 6), expected[6:])


def test_a_model_that_replays_differently_is_refused() -> None:
    class Odd(transformers.LlamaModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state + 1.0  # unseen by anything that watches modules
            return output

    model, blocks = tiny("llama")
    model.model.__class__ = Odd
    with pytest.raises(ModelError, match="cannot be edited"), torch.no_grad():
        Suffix(model, blocks, 2).capture(torch.arange(3, 9).unsqueeze(0), torch.tensor([4, 5]))


def test_a_model_that_feeds_the_edited_layer_forward_is_refused() -> None:
    class Skips(transformers.LlamaModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            first, second = self.layers[1].forward, self.layers[2].forward
            seen: list[torch.Tensor] = []

            def remember(*a: Any, **k: Any) -> Any:
                seen.append(first(*a, **k))
                return seen[-1]

            self.layers[1].forward = remember
            handle = self.layers[2].register_forward_pre_hook(
                lambda m, a, k: (a, {**k, "extra": seen[0]}), with_kwargs=True, prepend=True
            )
            self.layers[2].forward = lambda *a, extra, **k: second(*a, **k) + 0 * extra
            try:
                return super().forward(*args, **kwargs)
            finally:
                handle.remove()
                del self.layers[1].forward, self.layers[2].forward

    model, blocks = tiny("llama")
    model.model.__class__ = Skips
    with pytest.raises(ModelError, match=r"block 2 is fed more than hidden states"):
        Suffix(model, blocks, 1).capture(torch.arange(3, 9).unsqueeze(0), torch.tensor([4, 5]))


def test_editor_equals_plain_implementation(llama: Any, settings: Any) -> None:
    model, tok = llama
    request = {"prompt": "Which family does Epaspidoceras belong to?", "target_new": "Noctuidae"}
    _, originals, (trace,) = edit(model, tok, [request], settings(num_steps=8, cycles=3))
    edited = model.get_parameter("model.layers.4.mlp.down_proj.weight").detach().clone()
    model.load_state_dict(originals, strict=False)
    plain = plain_kdpo(model, tok, request, "model.layers.4.mlp.down_proj.weight", lr=1e-3, cycles=3)
    assert [c.negative for c in trace.cycles] == plain.negatives
    assert [x for c in trace.cycles for x in c.losses] == pytest.approx(plain.losses, abs=1e-5)
    torch.testing.assert_close(edited, model.get_parameter("model.layers.4.mlp.down_proj.weight"), rtol=0, atol=1e-5)
