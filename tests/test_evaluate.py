"""The evaluator and the second moments: batches change nothing, and each figure is what its definition says."""

from __future__ import annotations

import copy
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from kdpo_editor import SHIPPED_MODEL, KDPOHyperParams, apply_kdpo_to_model
from kdpo_editor.compare.run import statistics
from kdpo_editor.compare.run.evaluate import Evaluator, Generation, accuracy, fingerprint, ngram_entropy, normalised
from kdpo_editor.compare.run.memory import peak_bytes
from kdpo_editor.compare.run.prefixes import Prefixes
from kdpo_editor.errors import DataError, ModelError
from kdpo_editor.hparams import settings_folder
from kdpo_editor.lifelong.preserve import second_moments
from kdpo_editor.models import load
from kdpo_editor.testbed import load_records

RECORDS = load_records()[:12]


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load(SHIPPED_MODEL, device="cpu")


def test_batches_and_single_prompts_agree(shipped: tuple[Any, Any]) -> None:
    pairs = [(r["prompt"], r["target_new"]) for r in RECORDS]
    prompts = [r["prompt"] for r in RECORDS]
    together, alone = Evaluator(*shipped), Evaluator(*shipped, alone=True)
    assert together.predict(pairs) == alone.predict(pairs)
    assert together.generate(prompts, 12) == alone.generate(prompts, 12)
    alike = Evaluator(*shipped, alike=True)
    assert alike.predict(pairs) == together.predict(pairs)


def test_blocks_below_an_edit_are_run_once(shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after an edit the same is scored as by the whole model, of which most is run the first time only."""
    model, tok = copy.deepcopy(shipped[0]), shipped[1]
    file = settings_folder() / "KDPO" / f"{SHIPPED_MODEL}.yaml"
    settings = yaml.safe_load(file.read_text("utf-8"))
    prefixes = Prefixes.of(model, settings)
    assert prefixes is not None
    pairs = [(r["prompt"], r[key]) for r in RECORDS for key in ("target_new", "ground_truth")]
    fast, whole = Evaluator(model, tok, prefixes=prefixes), Evaluator(model, tok)
    before = fast.predict(pairs)
    assert before == whole.predict(pairs)
    apply_kdpo_to_model(model, tok, RECORDS[:3], KDPOHyperParams.from_hparams(file))
    after = whole.predict(pairs)
    assert after != before
    run: list[int] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: run.append(len(args[0])))
    assert fast.predict(pairs) == after
    assert run == [], "the first block was run again"
    assert fast.predict(pairs[5:1:-1]) == after[5:1:-1]
    assert len(run) <= 1, "a batch of another shape needs what blocks are told of it, once"
    monkeypatch.setattr("kdpo_editor.compare.run.prefixes.BUDGET", prefixes.held)
    new = [(RECORDS[0]["rephrase_prompt"], RECORDS[0]["target_new"])]
    expected = whole.predict(new)
    assert fast.predict(new) == expected
    for _ in range(2):
        run.clear()
        assert fast.predict(new) == expected
        assert len(run) == 1, "what does not fit is computed each time"
    handle.remove()
    assert fast.predict([]) == []


@pytest.mark.parametrize(
    "change",
    [{"alg_name": "LoRA"}, {"layers": [0, 4]}, {"layers": []}, {"rewrite_module_tmp": "h.{}.mlp"}],
    ids=["adapters", "the-first-block", "no-layers", "another-model's"],
)
def test_prefixes_are_for_matrices_changed_in_place(shipped: tuple[Any, Any], change: dict[str, Any]) -> None:
    settings = yaml.safe_load((settings_folder() / "KDPO" / f"{SHIPPED_MODEL}.yaml").read_text("utf-8"))
    assert Prefixes.of(shipped[0], settings | change) is None
    assert Prefixes.of(shipped[0], None) is None


def test_a_known_fact_is_generated_and_stops(shipped: tuple[Any, Any]) -> None:
    (said,) = Evaluator(*shipped).generate([RECORDS[0]["prompt"]], 24)
    assert said.answers([RECORDS[0]["ground_truth"]])
    assert not said.answers([RECORDS[0]["target_new"]])


def test_an_answer_that_does_not_stop_is_not_right() -> None:
    assert Generation("the  Paris.", True).answers(["Paris"])
    assert not Generation("Paris", False).answers(["Paris"])


def test_scoring_turns_dropout_off_and_on_again(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    dropout = torch.nn.Dropout(0.9)
    handle = model.model.layers[0].register_forward_hook(lambda module, args, out: dropout(out))
    model.add_module("dropout", dropout)
    try:
        pairs = [(RECORDS[0]["prompt"], RECORDS[0]["ground_truth"])]
        model.eval()
        expected = Evaluator(model, tok).predict(pairs)
        model.train()
        assert Evaluator(model, tok).predict(pairs) == expected
        assert model.training
        assert dropout.training
    finally:
        handle.remove()
        del model.dropout
        model.eval()


def test_perplexity_is_that_of_the_texts(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    texts = [f"{r['prompt']} {r['ground_truth']}" for r in RECORDS]
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tok(text)["input_ids"]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert Evaluator(model, tok).perplexity(texts) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_fluency_by_hand() -> None:
    # Six words: five pairs, one of them twice; four triples, all different.
    pairs = -(0.4 * math.log2(0.4) + 3 * 0.2 * math.log2(0.2))
    assert ngram_entropy("a b a b c d") == pytest.approx((2 / 3 * pairs + 4 / 3 * 2) / 2)
    assert ngram_entropy("x x x x x") == 0


def test_normalised_as_squad_does() -> None:
    assert normalised("  The  U.S. Army, an   army ") == "us army army"


def test_accuracy_of_nothing_is_not_a_number() -> None:
    assert math.isnan(accuracy([], []))
    assert accuracy([1, 2, 3, 4], [1, 0, 3, 0]) == 0.5


def test_a_fingerprint_sees_one_bit(shipped: tuple[Any, Any]) -> None:
    model, _ = shipped
    before = fingerprint(model)
    weight = model.model.layers[3].mlp.down_proj.weight
    with torch.no_grad():
        kept = weight[5, 7].clone()
        weight[5, 7] = torch.nextafter(kept, torch.tensor(math.inf))
        changed = fingerprint(model)
        weight[5, 7] = kept
    assert changed != before
    assert fingerprint(model) == before


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="float23"):
        load(SHIPPED_MODEL, dtype="float23")
    with pytest.raises(ModelError, match="nothing here"):
        load(str(tmp_path / "nothing here"))


# Second moments -------------------------------------------------------------------------------------------------

MODULE = "model.layers.1.mlp.down_proj"
CONFIG = {
    "alg_name": "MEMIT",
    "mom2_adjustment": True,
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layers": [1],
    "mom2_dataset": "wikipedia",
    "mom2_dtype": "float32",
    "mom2_n_samples": 100,
}


def test_second_moments_are_the_sum_over_all_tokens(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    texts = [r["prompt"] for r in RECORDS]
    keys = []
    handle = model.get_submodule(MODULE).register_forward_pre_hook(lambda module, args: keys.append(args[0][0]))
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([tok(text)["input_ids"]]))
    handle.remove()
    every = torch.cat(keys).double()
    windows = [torch.tensor(tok(text)["input_ids"]) for text in texts]
    moment, count = second_moments(model, [MODULE], windows, batch=5)[MODULE]
    assert count == len(every)
    torch.testing.assert_close(moment.double(), every.T @ every, rtol=1e-4, atol=1e-4)


def test_moments_lie_where_both_forms_look_and_are_kept(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    model, tok = shipped
    text = tmp_path / "text.txt.xz"
    text.write_bytes(lzma.compress(b'<doc id="1">\nOne fact.\n</doc>\n<doc id="2">\nAnother fact.\n</doc>\n'))
    assert statistics.read_text(text) == ["One fact.", "Another fact."]
    assert statistics.ensure(model, tok, CONFIG, str(text), None, tmp_path / "stats")
    file = tmp_path / "stats" / SHIPPED_MODEL / "wikipedia_stats" / f"{MODULE}_float32_mom2_100.npz"
    with np.load(file) as arrays:
        assert arrays["sample_size"] == 100
        assert arrays["mom2.mom2"].shape == (768, 768)
    assert not statistics.ensure(model, tok, CONFIG, str(text), None, tmp_path / "stats")


def test_missing_moments_without_a_text_say_what_to_do(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="kdpo-statistics"):
        statistics.ensure(*shipped, CONFIG, None, None, tmp_path)
    (tmp_path / "broken.xz").write_bytes(b"not xz")
    with pytest.raises(DataError, match=r"broken\.xz"):
        statistics.read_text(tmp_path / "broken.xz")


def test_the_command_names_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", SHIPPED_MODEL, "--text", "shipped", "--hparams", str(tmp_path / "none.yaml")]
    assert statistics.main(arguments) == 1
    assert "none.yaml" in capsys.readouterr().err


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    def call() -> None:
        kept = torch.zeros(1000)
        for _ in range(5):
            temporary = torch.ones(500) + kept[:500]  # two of them for a moment
            del temporary
        torch.zeros(2000)

    if not torch.cuda.is_available():
        assert peak_bytes(call) == 4 * 3000
