"""Mixtures of experts: an edit is won and touches only the experts that its tokens are sent to; undone bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import REQUEST, assert_same, load, state
from test_cached_forward import EXPERTS, LLAMA_LIKE, WINDOW, skip_without_stacks
from test_structure import build, random_model
from torch import Tensor, nn

from kdpo_editor import EditDelta, EditDiverged, EditLedger, FingerprintError, KDPOHyperParams, ModelError, edit
from kdpo_editor.compare.run.derived_settings import derive
from kdpo_editor.derived import complete
from kdpo_editor.editing import _check_size
from kdpo_editor.edits.lora import load_lora
from kdpo_editor.engine.generation import generate
from kdpo_editor.engine.structure import editable_layers, structure_of
from kdpo_editor.hparams import settings_folder
from kdpo_editor.requests.tokens import tokenize

ROUTED = {
    "Qwen3Moe": {**EXPERTS, "num_experts": 16},
    "Mixtral": {"num_local_experts": 16},
    "GptOss": {**WINDOW, "num_local_experts": 16, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 16, "num_experts_per_tok": 2},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
SHARED = ("qwen2_moe", "deepseek_v2", "glm4_moe", "granite_moe_shared")
ABOUT = {**REQUEST, "subject": "ZIC3"}
LONGER = {"prompt": "Which family does Epaspidoceras belong to?", "target_new": "Noctuidae", "subject": "Epaspidoceras"}


def mixture(family: str, **settings: Any) -> Any:
    """A small random mixture of experts with room for the small Llama's vocabulary, whose experts matter."""
    skip_without_stacks()
    model = build(family, **{**LLAMA_LIKE, "vocab_size": 1024, **ROUTED.get(family, {}), **settings})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3) if p.ndim == 2 else p.add_(0.1 * torch.randn(p.shape))
    return model


@pytest.fixture(scope="module")
def tok() -> Any:
    return load("llama")[1]


def choice(model: Any, layer: int, ids: Tensor) -> Tensor:
    """The experts that a block sends each of ``ids`` to, ``[L, K]``."""
    block = model.get_submodule(structure_of(model).blocks)[layer]
    (experts,) = [module for name, module in block.named_modules() if name.endswith(".experts")]
    seen: list[Tensor] = []
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.no_grad():
        model(input_ids=ids.unsqueeze(0).to(model.device))
    handle.remove()
    return seen[0]


def reached(model: Any, tok: Any, layer: int, requests: list[dict[str, str]], fact_token: str) -> set[int]:
    """The experts of a block that the trained tokens of ``requests`` are sent to."""
    found: set[int] = set()
    for (one,) in tokenize(tok, requests, with_subject=True):
        begin, end = one.subject
        # In the last block an answer's logits hang on their own positions alone.
        where = {
            "all": range(len(one.prompt) - 1, one.length),
            "subject": range(begin, end),
            "subject_last": [end - 1],
        }
        found |= set(choice(model, layer, one.sequence)[list(where[fact_token])].flatten().tolist())
    return found


def changed(model: Any, originals: dict[str, Tensor]) -> set[int]:
    """The experts whose matrices are not bit for bit what they were."""
    ((name, before),) = originals.items()
    after = model.get_parameter(name)
    return {expert for expert in range(len(before)) if not torch.equal(after[expert], before[expert])}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("fact_token", "layer"), [("all", 3), ("subject", 1), ("subject_last", 1)])
@pytest.mark.parametrize("family", ROUTED)
def test_only_experts_that_trained_tokens_are_sent_to_change(
    tok: Any, family: str, fact_token: str, layer: int, device: str
) -> None:
    """Two edits of other lengths at once: what only their padding is sent to stays as well."""
    model, requests = mixture(family).to(device), [ABOUT, LONGER]
    expected = reached(model, tok, layer, requests, fact_token)
    assert len(expected) < 16
    hparams = KDPOHyperParams(
        model_name=family, layers=[layer], fact_token=fact_token, schedule="breadth_first", cycles=2, lr=1e-2
    )
    _, originals, _ = edit(model, tok, requests, hparams)
    assert changed(model, originals) == expected


@pytest.mark.parametrize("family", ROUTED)
def test_the_edited_block_sends_tokens_where_it_sent_them(tok: Any, family: str) -> None:
    model = mixture(family)
    ids = tokenize(tok, [ABOUT])[0][0].sequence
    before = choice(model, 1, ids)
    hparams = KDPOHyperParams(model_name=family, layers=[1], fact_token="subject", cycles=1)
    _, _, (trace,) = edit(model, tok, [ABOUT], hparams)
    assert trace.steps > 0
    assert torch.equal(choice(model, 1, ids), before)


@pytest.mark.parametrize("name", [*ROUTED, *SHARED])
def test_an_edit_is_undone_bit_for_bit(tok: Any, name: str, tmp_path: Path) -> None:
    model = mixture(name) if name in ROUTED else random_model(name)
    before = state(model)
    with EditLedger(tmp_path / "ledger", write=True) as ledger:
        _, _, (trace,) = ledger.edit(model, tok, [REQUEST], KDPOHyperParams(model_name=name, lr=1e-2))
        assert trace.converged
        after = state(model)
        delta = ledger.delta(1)
        ledger.undo(1, model)
        assert_same(model, before)
    delta.save(tmp_path / "delta")
    again = EditDelta.load(tmp_path / "delta")
    again.apply(model)
    assert_same(model, after)
    again.revert(model)
    assert_same(model, before)


@pytest.mark.parametrize("family", ROUTED)
def test_experts_changes_have_a_low_rank_form(tok: Any, family: str, tmp_path: Path) -> None:
    model = mixture(family)
    before = state(model)
    delta = EditDelta.make(model, tok, [REQUEST], KDPOHyperParams(model_name=family, lr=1e-2))
    delta.revert(model)
    small = delta.compress(model, tok, tolerance=0.1)
    small.save(tmp_path)
    assert small.nbytes < delta.nbytes
    ((name, change),) = delta.change().items()
    error = EditDelta.load(tmp_path).change()[name] - change
    assert error.norm() <= 0.1001 * change.norm()
    assert_same(model, before)


@pytest.mark.parametrize("family", ROUTED)
def test_peft_loads_an_adapter_of_experts(tok: Any, family: str, tmp_path: Path) -> None:
    """gpt-oss keeps ``[E, F, D]``, the others ``[E, D, F]``."""
    peft = pytest.importorskip("peft", minversion="0.19")
    model = mixture(family)
    delta = EditDelta.make(model, tok, [REQUEST], KDPOHyperParams(model_name=family, lr=1e-2))
    after = state(model)
    said = generate(model, tok, REQUEST["prompt"])
    rank = delta.save_lora(tmp_path / "adapter", model, tok)
    assert_same(model, after)
    assert list(model.state_dict()) == list(after)
    assert rank <= 32
    assert "vllm" not in (tmp_path / "adapter" / "README.md").read_text()
    assert generate(load_lora(mixture(family), tmp_path / "adapter"), tok, REQUEST["prompt"]) == said
    adapted = peft.PeftModel.from_pretrained(mixture(family), str(tmp_path / "adapter"))
    assert generate(adapted, tok, REQUEST["prompt"]) == said
    merged = adapted.merge_and_unload()
    assert generate(merged, tok, REQUEST["prompt"]) == said


def test_an_adapter_of_experts_is_refused_where_they_are_not(tok: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft", minversion="0.19")
    model = mixture("Mixtral")
    EditDelta.make(model, tok, [REQUEST], KDPOHyperParams(model_name="any", lr=1e-2)).save_lora(tmp_path, model, tok)
    shallower = mixture("Mixtral", num_hidden_layers=3)
    with pytest.raises(FingerprintError, match=r"adapts model\.layers\.3\.mlp\.experts\.down_proj, which this"):
        load_lora(shallower, tmp_path)


# KDPO-L --------------------------------------------------------------------------------------------------------


def upcycled(family: str) -> Any:
    """The small Llama as a mixture: its MLP sixteen times, as routed experts or, halved, beside a shared one."""
    skip_without_stacks()
    llama = load("llama")[0]
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    model = build(
        family,
        **{key: getattr(llama.config, key) for key in (*kept, "rms_norm_eps", "tie_word_embeddings")},
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        qkv_bias=False,
        num_experts=16,
        num_local_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
        norm_topk_prob=True,
    )
    model.load_state_dict(llama.state_dict(), strict=False)
    with torch.no_grad():
        for block, dense in zip(model.model.layers, llama.model.layers, strict=True):
            mlp, old = block.mlp, dense.mlp
            mlp.gate.weight.normal_()
            mlp.experts.gate_up_proj.copy_(torch.cat([old.gate_proj.weight, old.up_proj.weight]))
            mlp.experts.down_proj.copy_(old.down_proj.weight)
            if family == "Qwen2Moe":  # half of it, and a gate of one half
                mlp.experts.down_proj.mul_(0.5)
                mlp.shared_expert.load_state_dict(old.state_dict())
                mlp.shared_expert_gate.weight.zero_()
    return model


def recipe(**overrides: Any) -> KDPOHyperParams:
    """KDPO-L, but through all tokens: the small Llama's facts do not hang on their subject's last."""
    settings = KDPOHyperParams.from_hparams(settings_folder() / "KDPO-L" / "auto.yaml", "any").to_dict()
    return KDPOHyperParams(**{**settings, "fact_token": "all", "layers": [5], **overrides})


@pytest.mark.parametrize("family", ["Qwen2Moe", "Mixtral"])
def test_an_upcycled_model_says_what_the_dense_one_says(tok: Any, family: str) -> None:
    ids = tok(REQUEST["prompt"], return_tensors="pt")["input_ids"]
    wanted = load("llama")[0](input_ids=ids).logits
    torch.testing.assert_close(upcycled(family)(input_ids=ids).logits, wanted, atol=1e-4, rtol=0)


def test_kdpo_l_edits_a_shared_expert(tok: Any, text: str) -> None:
    model = upcycled("Qwen2Moe")
    _, originals, traces = edit(model, tok, [ABOUT, LONGER], recipe(mom2_dataset=text))
    assert all(trace.converged for trace in traces)
    assert list(originals) == ["model.layers.5.mlp.shared_expert.down_proj.weight"]


def test_kdpo_l_edits_routed_experts_without_second_moments(tok: Any) -> None:
    """One call after the other, and the first edit still holds after the second."""
    model, hparams = upcycled("Mixtral"), recipe(mom2_weight=0, context_templates=0, margin=3.0)
    for requests in ([ABOUT], [ABOUT, LONGER]):
        may_change = reached(model, tok, 5, requests, "all")
        _, originals, (trace,) = edit(model, tok, requests[-1:], hparams)
        assert trace.converged
        assert set() < changed(model, originals) <= may_change < set(range(16))
    # By the half of the margin that replay holds.
    assert edit(model, tok, [ABOUT], replace(hparams, margin=1.5))[2][0].steps == 0


def test_second_moments_of_routed_experts_are_refused(tok: Any, text: str) -> None:
    model = upcycled("Mixtral")
    before = state(model)
    with pytest.raises(ModelError, match=r"mom2_weight: model\.layers\.5\.mlp\.experts\.down_proj .* mom2_weight: 0"):
        edit(model, tok, [ABOUT], recipe(mom2_dataset=text))
    assert_same(model, before)


# What is found, and what is refused ----------------------------------------------------------------------------


def test_dense_blocks_beside_routed_ones_are_passed_over(tok: Any) -> None:
    model = mixture("Qwen3Moe", mlp_only_layers=[3])
    found = complete(KDPOHyperParams(model_name="any"), model)
    assert (found.layers, found.rewrite_module_tmp) == ([2], "model.layers.{}.mlp.experts.down_proj")
    assert editable_layers(model, "model.layers.{}.mlp.experts.down_proj") == [0, 1, 2]


def test_experts_first_matrices_can_be_named(tok: Any) -> None:
    model = mixture("Mixtral")
    hparams = KDPOHyperParams(model_name="any", rewrite_module_tmp="model.layers.{}.mlp.experts.gate_up_proj", lr=1e-2)
    _, originals, (trace,) = edit(model, tok, [REQUEST], hparams)
    assert trace.converged
    assert list(originals) == ["model.layers.3.mlp.experts.gate_up_proj"]


class OneByOne(nn.Module):
    """Experts as modules of their own, as transformers 4 keeps them."""

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        self.act_fn = stacked.act_fn
        self.up = nn.ModuleList(nn.Linear(*matrix.T.shape, bias=False) for matrix in stacked.gate_up_proj)
        self.w2 = nn.ModuleList(nn.Linear(*matrix.T.shape, bias=False) for matrix in stacked.down_proj)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for expert, (up, down) in enumerate(zip(self.up, self.w2, strict=True)):
            token, place = torch.where(index == expert)
            gate, value = up(hidden[token]).chunk(2, dim=-1)
            output.index_add_(0, token, down(self.act_fn(gate) * value) * weights[token, place, None])
        return output


def one_by_one(model: Any) -> Any:
    for block in model.model.layers:
        if not isinstance(block.mlp.experts, nn.ModuleList):  # transformers 4's are
            block.mlp.experts = OneByOne(block.mlp.experts)
    return model


def refused(model: Any, tok: Any, match: str, **settings: Any) -> None:
    before = state(model)
    with pytest.raises(ModelError, match=match):
        edit(model, tok, [ABOUT], KDPOHyperParams(model_name="any", **settings))
    assert_same(model, before)


def test_experts_that_are_modules_of_their_own_are_refused(tok: Any) -> None:
    model = one_by_one(mixture("Mixtral"))
    refused(model, tok, "layer 0 of MixtralForCausalLM is a mixture of experts of a form that is not understood")
    named = "model.layers.{}.mlp.experts.w2.0"
    refused(model, tok, r"experts\.w2\.0\.weight is of one routed expert", rewrite_module_tmp=named)


def test_a_shared_expert_beside_them_is_edited(tok: Any) -> None:
    model = one_by_one(random_model("qwen2_moe"))
    _, originals, (trace,) = edit(model, tok, [REQUEST], KDPOHyperParams(model_name="any", lr=1e-2))
    assert trace.converged
    assert list(originals) == ["model.layers.3.mlp.shared_expert.down_proj.weight"]


def test_experts_below_each_other_in_one_matrix_are_refused(tok: Any) -> None:
    """DBRX's are ``[E * F, D]``."""
    skip_without_stacks()
    config = transformers.DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        vocab_size=1024,
        ffn_config={"ffn_hidden_size": 32, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    refused(model, tok, "layer 0 of DbrxForCausalLM is a mixture of experts of a form that is not understood")
    refused(
        model, tok, "of a form that is not understood", rewrite_module_tmp="transformer.blocks.{}.ffn.experts.mlp.w2"
    )


@pytest.mark.parametrize(("family", "router"), [("Qwen3Moe", "gate"), ("GptOss", "router")])
def test_routers_are_not_edited(tok: Any, family: str, router: str) -> None:
    template = f"model.layers.{{}}.mlp.{router}"
    refused(mixture(family), tok, r"is a router's; routing is not edited", layers=[2], rewrite_module_tmp=template)


def test_the_subjects_tokens_are_asked_for_in_vain_where_experts_give_them_in_another_order(tok: Any) -> None:
    model = mixture("JetMoe", num_local_experts=4, num_experts_per_tok=2, kv_channels=8)
    refused(model, tok, "edit with fact_token: all", layers=[1], fact_token="subject")
    _, _, (trace,) = edit(model, tok, [ABOUT], KDPOHyperParams(model_name="any", lr=1e-2))
    assert trace.converged


def test_rivals_that_edit_one_matrix_are_refused_where_there_is_none() -> None:
    with pytest.raises(ModelError, match=r"mixture of experts without a shared expert; the method edits one matrix"):
        derive("ROME", mixture("Mixtral"), "any")
    assert derive("LoRA", mixture("Mixtral"), "any")["target_modules"] == ["q_proj", "v_proj"]
    assert derive("ROME", random_model("glm4_moe"), "any")["rewrite_module_tmp"].endswith("shared_experts.down_proj")


def test_each_expert_is_held_to_its_own_size() -> None:
    before = torch.ones(64, 3, 2)
    after = nn.Parameter(before.clone())
    with torch.no_grad():
        after[5] += 20
    with pytest.raises(EditDiverged, match="experts changed by 20 times its norm"):
        _check_size({"experts": after}, {"experts": before})
