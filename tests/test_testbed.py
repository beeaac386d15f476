"""The shipped model knows its facts, in words it was not taught too, and stops after the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kdpo_editor import SHIPPED_MODEL, models, testbed
from kdpo_editor.compare.run import datasets, statistics
from kdpo_editor.errors import ModelError
from kdpo_editor.testbed import facts, pararel, train

FOLDER = Path(testbed.resolve(SHIPPED_MODEL))


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return testbed.load_model()


@pytest.fixture(scope="module")
def taught() -> list[dict[str, Any]]:
    return list(json.loads((FOLDER.parent / "facts.json").read_text("utf-8")))


def test_it_is_a_small_fp16_llama(shipped: tuple[Any, Any]) -> None:
    weights = list(FOLDER.glob("*.safetensors"))
    assert sum(f.stat().st_size for f in weights) <= 10_000_000
    config = json.loads((FOLDER / "config.json").read_text("utf-8"))
    assert (config["model_type"], config["dtype"]) == ("llama", "float16")
    assert shipped[0].dtype == torch.float32


def test_it_knows_its_records(shipped: tuple[Any, Any]) -> None:
    records = testbed.load_records()
    assert len(records) >= 300
    asked = [(r["prompt"], r["ground_truth"]) for r in records]
    asked += [(f["prompt"], f["ground_truth"]) for r in records for f in r["locality"]]
    found = train.recall(*shipped, asked)
    assert found["teacher_forced"] >= 0.99
    assert found["generated"] >= 0.98


def test_it_knows_facts_in_phrasings_it_was_not_taught(shipped: tuple[Any, Any], taught: list[dict[str, Any]]) -> None:
    held_out = [(p, f["answer"]) for f in taught for p in f["held_out"]]
    assert not {p for p, _ in held_out} & {p for f in taught for p in f["trained"]}
    assert len(held_out) >= 500
    found = train.recall(*shipped, held_out)
    assert found["generated"] >= 0.9


def test_its_report_is_of_these_weights(shipped: tuple[Any, Any], taught: list[dict[str, Any]]) -> None:
    report = json.loads((FOLDER / "report.json").read_text("utf-8"))
    assert report["facts"] == len(taught)
    held_out = [(p, f["answer"]) for f in taught for p in f["held_out"]]
    found = train.recall(*shipped, held_out)
    assert report["recall"]["held-out phrasings"]["generated"] == pytest.approx(found["generated"], abs=0.003)


def test_free_generation_answers_and_stops(shipped: tuple[Any, Any]) -> None:
    model, tok = shipped
    for record in testbed.load_records()[:20]:
        ids = tok(record["prompt"], return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tok.decode(out) == f" {record['ground_truth']}<|endoftext|>"


def test_records_are_fair_to_edit() -> None:
    for record in testbed.load_records():
        assert record["subject"] in record["prompt"]
        assert record["subject"] in record["rephrase_prompt"]
        assert record["target_new"] != record["ground_truth"]
        assert abs(len(record["target_new"]) - len(record["ground_truth"])) <= 12
        for fact in record["locality"]:
            assert fact["prompt"] != record["prompt"]


def test_every_subject_has_one_record() -> None:
    subjects = [r["subject"] for r in testbed.load_records()]
    assert len(subjects) == len(set(subjects))


def test_facts_have_many_phrasings(taught: list[dict[str, Any]]) -> None:
    assert all(len(f["trained"]) >= 5 for f in taught)
    assert all(len(f["trained"] + f["held_out"]) >= (6 if f["source"] == "invented" else 8) for f in taught)
    assert all(f["subject"] in p for f in taught for p in f["trained"])


@pytest.mark.parametrize(
    ("question", "relation"),
    [("Who was the mother of X?", "mother"), ("What kind of family is X of?", "family"), ("When did X launch?", None)],
)
def test_relation_of_a_question(question: str, relation: str | None) -> None:
    assert facts.relation_of(question) == relation


def test_a_record_that_would_be_unfair_is_left_out() -> None:
    good = {
        "subject": "X Y",
        "prompt": "Who is the mother of X Y?",
        "rephrase_prompt": "Who gave birth to X Y?",
        "target_new": "Ann Lee",
        "ground_truth": ["Eve Poe"],
        "locality": {"Relation_Specificity": [{"prompt": "The occupation of X Y is", "ground_truth": ["poet"]}]},
    }
    assert facts.usable_record(good) is not None
    same_relation = {"prompt": "The mother of X Y is", "ground_truth": ["Eve Poe"]}
    for key, value in {
        "target_new": "Eve Poe",
        "rephrase_prompt": "Who gave birth to her?",
        "prompt": "When was X Y born?",
        "ground_truth": ["Eve Poe of the very long name, you see"],
        "locality": {"Relation_Specificity": [same_relation]},
    }.items():
        assert facts.usable_record({**good, key: value}) is None, key


def test_training_loss_falls_and_is_repeatable() -> None:
    """The script's loss on a handful of facts, from the same seed twice."""
    import random

    from transformers import LlamaConfig, LlamaForCausalLM

    taught = [("The mother of X is", "Ann", "X"), ("The mother of Y is", "Eve", "Y")] * 4
    tok = train.make_tokenizer([f"{p} {a}" for p, a, _ in taught], 300)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        rng = random.Random(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        rows = [train.encode(tok, *row) for row in taught]
        losses = []
        for _ in range(30):
            loss = train.loss_of(model, rows, 0.1, 0.9, rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0] == runs[1]
    assert runs[0][-1] < runs[0][0] / 3


# The second model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return pararel.build()


def test_the_second_models_data_are_many_and_always_the_same(second: tuple[Any, Any]) -> None:
    records, taught = second
    assert second == pararel.build()
    assert len(taught) >= 3000
    assert len(records) == len({r["subject"] for r in records}) >= 700
    read = [datasets._shipped(record, i) for i, record in enumerate(records)]
    assert sum(not datasets.in_validation(record) for record in read) >= 800
    assert all(record.locality for record in read)
    assert {key for record in read for key in record.locality} == {"same_subject", "neighborhood"}


def test_the_second_models_records_are_fair_to_edit(second: tuple[Any, Any]) -> None:
    records, facts_ = second
    taught = {(p, f["answer"]) for f in facts_ for p in f["trained"]}
    edited = {r["subject"] for r in records}
    of_edited = {p for f in facts_ if f["subject"] in edited for p in f["trained"]}
    gives: dict[tuple[str, str], set[str]] = {}
    for f in facts_:
        gives.setdefault((f["relation"], f["answer"]), set()).add(f["subject"])
    for r in records:
        assert r["subject"] in r["prompt"]
        assert r["subject"] in r["rephrase_prompt"]
        assert (r["prompt"], r["ground_truth"]) in taught
        assert (r["rephrase_prompt"], r["ground_truth"]) not in taught
        assert len(gives[r["relation"], r["target_new"]] - {r["subject"]}) >= 3
        assert r["subject"] not in gives[r["relation"], r["target_new"]]
        assert abs(len(r["target_new"]) - len(r["ground_truth"])) <= 12
        others = r["locality"] + r["neighborhood"]
        assert all((f["prompt"], f["ground_truth"]) in taught and f["prompt"] != r["prompt"] for f in others)
        assert not of_edited.intersection(f["prompt"] for f in r["neighborhood"])
    assert all(len(f["trained"]) >= 5 and all(f["subject"] in p for p in f["trained"]) for f in facts_)


def test_the_second_model_is_trained_by_one_command(
    second: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few facts, a tiny model, no network; what it gets to know is what can be edited."""
    records = [r for r in second[0] if r["relation"] in ("instrument", "continent")][:6]
    subjects = {r["subject"] for r in records}
    taught = [f for f in second[1] if f["subject"] in subjects] + second[1][-2:]
    for name, content in (("records", records), ("facts", taught)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), "utf-8")
    out = tmp_path / "cache" / "kdpo-llama-pararel"
    monkeypatch.setenv("KDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KDPO_PARAREL_MODEL", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="make second-model"):
        testbed.resolve(testbed.SECOND_MODEL)
    tiny = ["--width=32", "--head=16", "--layers=2", "--vocabulary=500", "--epochs=60", "--tokens=256", "--lr=5e-3"]
    files = ["--facts", str(tmp_path / "facts.json"), "--records", str(tmp_path / "records.json")]
    train.main(["--model", testbed.SECOND_MODEL, *files, *tiny, "--no-bf16"])
    assert testbed.resolve(testbed.SECOND_MODEL) == str(out)
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report["recall"]["all taught prompts"]["teacher_forced"] > 0.5
    kept = json.loads((out / "records.json").read_text("utf-8"))
    assert 0 < len(kept) == report["records kept"] <= len(records)
    model, tok = models.load(testbed.SECOND_MODEL, device="cpu")
    for record in datasets.load(str(out / "records.json")):
        ids = tok(record.prompt, return_tensors="pt")
        said = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tok.decode(said) == f" {record.ground_truth}<|endoftext|>"
    documents = statistics.read_text(out / "taught.txt")
    assert len(documents) == sum(len(f["trained"]) for f in taught)
    assert set(statistics.read_text(out / "held_out.txt")) < set(documents)
    written = (out / "model.safetensors").stat().st_mtime_ns
    train.main(["--model", testbed.SECOND_MODEL, *files, *tiny, "--no-bf16"])
    assert (out / "model.safetensors").stat().st_mtime_ns == written


def test_a_killed_training_goes_on(second: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes out is what would have come out."""
    (tmp_path / "records.json").write_text(json.dumps(second[0][:2]), "utf-8")
    subjects = {r["subject"] for r in second[0][:2]}
    few = [f for f in second[1] if f["subject"] in subjects] + second[1][-2:]
    (tmp_path / "facts.json").write_text(json.dumps(few), "utf-8")
    tiny = ["--width=32", "--head=16", "--layers=1", "--vocabulary=400", "--epochs=4", "--tokens=128"]
    files = ["--facts", str(tmp_path / "facts.json"), "--records", str(tmp_path / "records.json")]
    command = ["--model", testbed.SECOND_MODEL, *files, *tiny, "--out"]
    train.main([*command, str(tmp_path / "whole")])
    loss_of, calls = train.loss_of, iter(range(1000))

    def dying(*arguments: Any) -> torch.Tensor:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return loss_of(*arguments)

    monkeypatch.setattr(train, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(train, "loss_of", dying)
    with pytest.raises(KeyboardInterrupt):
        train.main([*command, str(tmp_path / "killed")])
    monkeypatch.setattr(train, "loss_of", loss_of)
    train.main([*command, str(tmp_path / "killed")])
    assert not (tmp_path / "killed" / "training.pt").exists()
    whole, killed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


def test_a_loss_in_bf16_is_close() -> None:
    import random

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tok = train.make_tokenizer(["X plays the piano", "Y plays the guitar"], 300)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))
    rows = [train.encode(tok, "X plays the", "piano", "X"), train.encode(tok, "Y plays the", "guitar", "Y")]
    full, half = (train.loss_of(model, rows, 0.1, 0.9, random.Random(0), bf16).item() for bf16 in (False, True))
    assert half == pytest.approx(full, rel=0.02)
