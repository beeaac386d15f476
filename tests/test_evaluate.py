"""The evaluator and the second moments: batches change nothing, and each figure is what its definition says."""

from __future__ import annotations

import json
import logging
import lzma
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from live_bytes import peak_bytes

from kdpo_editor import SHIPPED_MODEL
from kdpo_editor.compare.run import statistics
from kdpo_editor.compare.run.datasets import load as load_facts
from kdpo_editor.compare.run.evaluate import Evaluator, Generation, accuracy, fingerprint, ngram_entropy
from kdpo_editor.compare.run.known import known_facts, right
from kdpo_editor.compare.run.memory import gpus_of, high_water, wait_for
from kdpo_editor.errors import DataError, ModelError
from kdpo_editor.models.loading import load
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


def test_a_taught_fact_is_generated_and_stops(shipped: tuple[Any, Any]) -> None:
    (said,) = Evaluator(*shipped).generate([RECORDS[0]["prompt"]], 24)
    assert said.answers([RECORDS[0]["ground_truth"]])
    assert said.answers_and_stops([RECORDS[0]["ground_truth"]])
    assert not said.answers([RECORDS[0]["target_new"]])


def test_an_answer_that_goes_on_is_right_but_does_not_stop() -> None:
    said = Generation("Paris, which is on the Seine", True)
    assert said.answers(["Rome", "paris"])
    assert not said.answers_and_stops(["paris"])
    assert not Generation("Paris", False).answers_and_stops(["Paris"])
    assert Generation("the  Paris.", True).answers_and_stops(["Paris"])


def test_a_text_for_fluency_goes_on_behind_the_end(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    prompt = RECORDS[0]["prompt"]
    answer, text = Evaluator(model, tok).generate([prompt], 24)[0].text, Evaluator(model, tok).write([prompt], 24)[0]
    assert text.strip().startswith(answer)
    assert len(tok(text)["input_ids"]) > len(tok(answer)["input_ids"]) + 5


def test_known_facts_are_those_that_the_model_was_taught(shipped: tuple[Any, Any]) -> None:
    evaluator = Evaluator(*shipped)
    facts = load_facts("shipped", shuffle=False)[:40]
    wrong = [replace(fact, ground_truth=fact.target_new) for fact in facts]
    said = evaluator.generate([fact.prompt for fact in facts], 24)
    by_hand = [g.answers([fact.ground_truth]) for g, fact in zip(said, facts, strict=True)]
    assert right(evaluator, facts) == by_hand
    assert sum(by_hand) >= 39
    assert right(evaluator, wrong) == [False] * 40


def test_facts_about_edited_subjects_are_not_among_the_known(shipped: tuple[Any, Any]) -> None:
    evaluator = Evaluator(*shipped)
    facts = load_facts("shipped", shuffle=False)
    found = known_facts(evaluator, "shipped", 7, facts[:3])
    assert found == facts[3:10]


def test_known_facts_are_asked_once_for_the_same_weights(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    asked: list[int] = []

    class Counting(Evaluator):
        def generate(self, prompts: Sequence[str], length: int) -> Any:
            asked.append(len(prompts))
            return super().generate(prompts, length)

    first = known_facts(Counting(model, tok), "shipped", 7, [])
    once = sum(asked)
    assert known_facts(Counting(model, tok), "shipped", 7, []) == first
    assert sum(asked) == once > 0
    weight = model.model.layers[4].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-3)
        known_facts(Counting(model, tok), "shipped", 7, [])
        weight.copy_(kept)
    assert sum(asked) > once


def test_a_known_fact_that_is_lost_is_counted(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    facts = load_facts("shipped", shuffle=False)[:40]
    weight = model.model.layers[4].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        before = sum(right(Evaluator(model, tok), facts))
        weight.mul_(-3)
        after = sum(right(Evaluator(model, tok), facts))
        weight.copy_(kept)
    assert after < before
    assert sum(right(Evaluator(model, tok), facts)) == before


def test_facts_are_not_measured_where_the_model_knows_none(
    shipped: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "strange.json"
    strange = [
        {"subject": f"S{i}", "prompt": f"S{i} is in", "target_new": "A", "ground_truth": "Ulm"} for i in range(9)
    ]
    file.write_text(json.dumps(strange), "utf-8")
    with caplog.at_level(logging.WARNING, "kdpo_editor"):
        assert known_facts(Evaluator(*shipped), str(file), 200, []) == []
    assert "knows 0 of 9 facts" in caplog.text


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
    assert Evaluator(model, tok).read(texts).perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_choices_are_the_next_tokens_in_the_order_of_the_text(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    texts = [f"{r['prompt']} {r['ground_truth']}" for r in RECORDS]
    by_hand = []
    for text in texts:
        for window in torch.tensor(tok(text)["input_ids"]).split(7):
            if len(window) > 1:
                with torch.no_grad():
                    by_hand += model(input_ids=window.unsqueeze(0)).logits[0, :-1].argmax(-1).tolist()
    assert Evaluator(model, tok, batch_size=5).read(texts, window=7).choices == by_hand


def test_next_tokens_agree_until_the_model_is_damaged(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    texts = [f"{r['prompt']} {r['ground_truth']}" for r in RECORDS]
    before = Evaluator(model, tok).read(texts).choices
    assert accuracy(Evaluator(model, tok, batch_size=3).read(texts).choices, before) == 1.0
    weight = model.model.layers[4].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.neg_()
        damaged = accuracy(Evaluator(model, tok).read(texts).choices, before)
        weight.copy_(kept)
    assert 0 < damaged < 1


def test_fluency_by_hand() -> None:
    # Six words: five pairs, one of them twice; four triples, all different.
    pairs = -(0.4 * math.log2(0.4) + 3 * 0.2 * math.log2(0.2))
    assert ngram_entropy("a b a b c d") == pytest.approx((2 / 3 * pairs + 4 / 3 * 2) / 2)
    assert ngram_entropy("x x x x x") == 0


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


def test_moments_lie_where_both_forms_look_and_are_kept(shipped: tuple[Any, Any], tmp_path: Path) -> None:
    model, tok = shipped
    text = tmp_path / "text.txt.xz"
    facts = [f"Fact {i} is another." for i in range(200)]  # more tokens than the matrix has inputs
    text.write_bytes(lzma.compress("".join(f'<doc id="{fact}">\n{fact}\n</doc>\n' for fact in facts).encode()))
    assert statistics.read_text(text) == facts
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

    assert peak_bytes(call) == 4 * 3000


def test_memory_and_time_are_of_the_gpus_that_the_model_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, asked = torch.device("cuda", 1), []
    for name, answer in (("memory_allocated", 5), ("max_memory_allocated", 8)):
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: asked.append(device) or answer)
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, asked.append)
    with high_water([gpu]) as peak:
        wait_for([gpu])
    assert (peak.bytes, peak.total, asked) == (3, 8, [gpu] * 4)
    assert gpus_of(torch.nn.Linear(1, 1)) == set()


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="the process's memory, on Linux")
def test_the_highest_memory_of_each_call_is_its_own() -> None:
    def call(mebibytes: int) -> int:
        with high_water([]) as peak:
            kept = torch.ones(mebibytes << 18)
            del kept
        assert peak.bytes is not None
        return peak.bytes >> 20

    assert call(200) == pytest.approx(200, abs=10)
    assert call(50) == pytest.approx(50, abs=10)


def test_where_counterfact_has_too_few_known_facts_others_are_asked_too(shipped: tuple[Any, Any]) -> None:
    class Partial:
        """Says the right answer to some prompts, and nothing to others."""

        tok = shipped[1]

        def generate(self, prompts: list[str], length: int) -> list[Any]:
            return [SimpleNamespace(answers=lambda _, knows=prompt in knows: knows) for prompt in prompts]

    own, others = (load_facts(name, shuffle=False) for name in ("counterfact", "counterfact-known"))
    knows = {record.prompt for record in (*own[:30], *others[:20])}
    few, most = (
        known_facts(Partial(), "counterfact", n, [], lambda key, compute: compute())  # type: ignore[arg-type]
        for n in (25, 100)
    )
    assert few == own[:25]
    assert most == [*own[:30], *others[:20]]
