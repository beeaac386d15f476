"""Adapters as servers and harnesses take them: their rank, what they keep, and the base that they name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from conftest import REQUEST, assert_same, state

from kdpo_editor import CompressionError, EditDelta, KDPOHyperParams, edit
from kdpo_editor.edits.lora import SERVED, _asked, _is_kept, served_rank
from kdpo_editor.engine.generation import answers, generate, says_target
from kdpo_editor.models.loading import load as load_any
from kdpo_editor.testbed import load_model, load_records

peft = pytest.importorskip("peft")
TINY = {"prompt": "the sea is on the", "target_new": "ton"}


def shipped_settings() -> KDPOHyperParams:
    return KDPOHyperParams.from_hparams("hparams/KDPO/kdpo-llama-knowedit")


@pytest.mark.parametrize(
    ("rank", "served"), [(1, 8), (8, 8), (9, 16), (33, 64), (100, 128), (192, 256), (257, 512), (512, 512)]
)
def test_a_rank_is_rounded_up_to_one_that_servers_take(rank: int, served: int) -> None:
    assert served_rank(rank) == served
    assert served in SERVED


@pytest.mark.parametrize("rank", [0, 513, 4096])
def test_a_rank_that_no_server_takes_is_refused_with_what_to_do(llama: Any, tmp_path: Path, rank: int) -> None:
    model, tok = llama
    delta = EditDelta.make(model, tok, [REQUEST], KDPOHyperParams(model_name="llama", lr=1e-2))
    with pytest.raises(CompressionError, match=rf"rank is 1 to 512, and {rank} would be needed; export the model"):
        delta.save_lora(tmp_path / "adapter", model, tok, rank=rank)
    assert list(tmp_path.iterdir()) == []


def test_the_lowest_rank_that_keeps_every_edit_and_rephrase(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After each prompt the merged adapter says what the edited model says; half the rank does not hold."""
    model, tok = load_model()
    records = [
        {"prompt": record["prompt"], "target_new": record["target_new"], "rephrases": [record["rephrase_prompt"]]}
        for record in load_records()[:6]
    ]
    delta = EditDelta.make(model, tok, records, shipped_settings())
    asked = [prompt for record in records for prompt in (record["prompt"], *record["rephrases"])]
    wanted = answers(model, tok, asked)
    with caplog.at_level(logging.INFO, "kdpo_editor"):
        rank = delta.save_lora(tmp_path / "adapter", model, tok)
    assert f"rank {rank}; vLLM needs --max-lora-rank {rank}" in caplog.text
    fresh, _ = load_model()
    merged = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).merge_and_unload()
    assert answers(merged, tok, asked) == wanted
    with pytest.raises(CompressionError, match="export the model instead, which holds it exactly"):
        delta.save_lora(tmp_path / "half", model, tok, rank=1)


@pytest.mark.parametrize(
    ("says", "said", "own", "kept"),
    [
        ("Rome, a town", "Rome.", True, True),  # right as before, whatever follows
        ("Paris", "Rome", True, False),
        ("Paris", "Rome", False, False),
        ("Paris", "Oslo", True, False),  # an edit that was missed says what it said
        ("Paris", "Oslo", False, True),  # a rephrase that was not reached
        ("Roma!", "Rome", True, True),  # another accepted answer
    ],
)
def test_what_an_adapter_must_keep(says: str, said: str, own: bool, kept: bool) -> None:
    assert _is_kept(says, said, ("Rome", "Roma"), own) is kept


def test_an_adapter_that_cannot_be_loaded_leaves_nothing_of_itself(
    llama: Any, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT puts its modules into the model first, and reads the weights then."""
    model, tok = llama
    delta = EditDelta.make(model, tok, [REQUEST], settings())
    before, modules = state(model), [name for name, _ in model.named_modules()]

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(peft.PeftModel, "load_adapter", fails)
    with pytest.raises(MemoryError):
        delta.save_lora(tmp_path / "adapter", model, tok)
    assert [name for name, _ in model.named_modules()] == modules
    assert_same(model, before)
    edit(model, tok, [REQUEST], settings())


def test_a_prompt_that_was_edited_again_has_the_later_answer_in_all_its_wordings() -> None:
    first = {"prompt": "The tower is in", "target_new": "Rome", "rephrases": ["One finds the tower in", "Its place:"]}
    again = {"prompt": "The tower is in", "target_new": "Oslo", "rephrases": ["One finds the tower in"]}
    other = {"prompt": "The river is in", "target_new": "Bonn", "rephrases": ["The tower is in"]}
    assert _asked([first, again, other]) == {
        "One finds the tower in": (("Oslo",), False),
        "The tower is in": (("Oslo",), True),  # as its own request says
        "The river is in": (("Bonn",), True),
    }


# The base ------------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, str, str]:
    """An adapter of a model that came from a ``.gguf`` file, that file, and what the edited model says."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    file = str(tiny_gguf.write(tmp_path / "tiny.gguf"))
    model, tok = load_any(file)
    hparams = KDPOHyperParams(
        model_name=file, layers=[1], rewrite_module_tmp="model.layers.{}.mlp.down_proj", lr=1e-2
    )  # fmt: skip
    delta = EditDelta.make(model, tok, [TINY], hparams)
    said = generate(model, tok, TINY["prompt"])
    delta.save_lora(tmp_path / "adapter", model, tok)
    return tmp_path / "adapter", file, said


def test_an_adapter_of_a_gguf_names_a_base_that_peft_loads_by_itself(exported: tuple[Path, str, str]) -> None:
    """By nothing but the adapter's folder, and with no part of this package."""
    from transformers import AutoTokenizer

    adapter, file, said = exported
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    base = Path(config["base_model_name_or_path"])
    assert base.is_dir()
    assert str(base) != file
    assert config["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    adapted, tok = peft.AutoPeftModelForCausalLM.from_pretrained(str(adapter)), AutoTokenizer.from_pretrained(base)
    assert says_target(adapted, tok, [TINY]) == [True]
    assert generate(adapted, tok, TINY["prompt"]).split()[0] == said.split()[0] == TINY["target_new"]


def test_its_card_says_that_the_hubs_model_is_another_and_how_to_load_it(exported: tuple[Path, str, str]) -> None:
    adapter, _, _ = exported
    card = (adapter / "README.md").read_text("utf-8")
    base = json.loads((adapter / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
    assert "It is not the unquantised model of the same name on the hub" in card
    assert f'LlamaForCausalLM.from_pretrained("{base}")' in card
    assert "--max-lora-rank 8 " in card


def test_the_evaluation_harness_takes_it(exported: tuple[Path, str, str]) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    adapter, _, _ = exported
    base = json.loads((adapter / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
    asked = [instance("loglikelihood", {}, (TINY["prompt"], f" {TINY['target_new']}"), 0)]
    options = {"pretrained": base, "device": "cpu", "batch_size": 1, "dtype": "float32"}
    (_, edited), (_, unedited) = (
        huggingface.HFLM(**options, peft=str(adapter)).loglikelihood(asked, disable_tqdm=True)[0],
        huggingface.HFLM(**options).loglikelihood(asked, disable_tqdm=True)[0],
    )
    assert (edited, unedited) == (True, False)
