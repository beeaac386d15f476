"""The shipped model knows its facts, in words it was not taught too, and stops after the answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kdpo_editor import SHIPPED_MODEL, testbed
from kdpo_editor.models import loading
from kdpo_editor.models.packaged import FOLDERS

FOLDER = FOLDERS[SHIPPED_MODEL]
# A source distribution does not have what the model is trained with.
facts = pytest.importorskip("shipped_model.facts")
train = pytest.importorskip("shipped_model.train")


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return testbed.load_model()


@pytest.fixture(scope="module")
def taught() -> list[dict[str, Any]]:
    return list(json.loads(facts.FACTS.read_text("utf-8")))


def test_it_is_a_small_fp16_llama(shipped: tuple[Any, Any]) -> None:
    weights = list(FOLDER.glob("*.safetensors"))
    assert sum(f.stat().st_size for f in weights) <= 10_000_000
    config = json.loads((FOLDER / "config.json").read_text("utf-8"))
    assert (config["model_type"], config["dtype"]) == ("llama", "float16")
    assert shipped[0].dtype == torch.float32


@pytest.mark.parametrize("read", ["load", "outline"])
def test_its_name_is_unknown_without_its_module_and_the_error_says_which(read: str) -> None:
    code = f"from kdpo_editor.models import loading; loading.{read}({SHIPPED_MODEL!r})"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True)
    assert f"{SHIPPED_MODEL}, a name that `import kdpo_editor.testbed` may make" in run.stderr


@pytest.mark.parametrize("module", ["cli", "compare", "easyedit.loading"])
def test_its_name_is_known_to_whoever_may_be_given_it(module: str) -> None:
    code = f"import kdpo_editor.{module}, kdpo_editor.models.loading as m; assert m.is_known_here({SHIPPED_MODEL!r})"
    subprocess.run([sys.executable, "-c", code], check=True)


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


def test_one_command_trains_a_model_that_answers_what_its_report_says(
    taught: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A few records and their facts, and a tiny model."""
    records = testbed.load_records()[:3]
    subjects = {r["subject"] for r in records}
    few = [f for f in taught if f["subject"] in subjects] + [f for f in taught if f["held_out"]][:1]
    for name, content in (("records", records), ("facts", few)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), "utf-8")
    files = [f"--{name}={tmp_path / name}.json" for name in ("records", "facts")]
    tiny = ["--width=32", "--layers=2", "--vocabulary=500", "--epochs=40", "--tokens=256", "--lr=5e-3"]
    train.main([f"--out={tmp_path / 'out'}", *files, *tiny])
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["facts"] == len(few)
    model, tok = loading.load(str(tmp_path / "out"), device="cpu")
    found = train.recall(model, tok, [(p, f["answer"]) for f in few for p in f["trained"]])
    assert found == report["recall"]["all taught prompts"]
    assert found["teacher_forced"] > 0.5
