"""``kdpo check``: says of edits that hold that they do, and of those that do not, that and which."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kdpo_editor import SHIPPED_MODEL, EditDelta, EditLedger, KDPOHyperParams
from kdpo_editor.cli.check import check
from kdpo_editor.cli.checking import Measure
from kdpo_editor.compare.run.datasets import load
from kdpo_editor.edits.manifest import EditInfo
from kdpo_editor.engine.generation import generate
from kdpo_editor.hparams import settings_folder
from kdpo_editor.requests.chat import as_chat
from kdpo_editor.testbed import load_model, load_records, unedited_texts

RECORDS = load_records()[:3]
REQUESTS = [{key: r[key] for key in ("prompt", "target_new", "subject")} for r in RECORDS]
TEMPLATE = "{{ '<|endoftext|>User: ' + messages[0].content + '\nBot:' }}"
LOOSE = {"max_perplexity": 2.0, "min_known": 0.5, "min_agreement": 0.5}


def settings() -> KDPOHyperParams:
    return KDPOHyperParams.from_hparams(settings_folder() / "KDPO" / SHIPPED_MODEL)


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of three edits, not to be written to."""
    folder = tmp_path_factory.mktemp("check") / "edits"
    model, tok = load_model()
    with EditLedger(folder, write=True) as ledger:
        for request in REQUESTS:
            ledger.edit(model, tok, [request], settings())
    return folder


def few_texts(source: Path) -> Path:
    """A file, beside ``source``, of a twentieth of what is read of the shipped model by default."""
    file = source.with_name("few.txt")
    file.write_text("\n\n".join(unedited_texts()[::20]), "utf-8")
    return file


def run(capsys: Any, source: Path, **options: Any) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON record and messages."""
    code = check(source, **{**LOOSE, "known": 0, "json": True, "text": few_texts(source), **options})
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else {}, err


def measure(record: dict[str, Any], name: str) -> dict[str, Any]:
    return next(m for m in record["measures"] if m["name"] == name)


def ledger_with(folder: Path, edits: list[tuple[list[dict[str, Any]], float]]) -> Path:
    """A ledger of changes that are noise of some strength, and say of themselves what they were asked."""
    model, _ = load_model()
    name = "model.layers.4.mlp.down_proj.weight"
    with EditLedger(folder, write=True) as ledger:
        for requests, strength in edits:
            weight = model.get_parameter(name)
            before = {name: weight.detach().clone()}
            with torch.no_grad():
                weight.add_(strength * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
            ledger.record(model, before, EditInfo.now(requests), SHIPPED_MODEL)
    return folder


def own_answer(prompt: str) -> str:
    model, tok = load_model()
    return generate(model, tok, prompt)


def test_edits_that_hold_exit_with_0(edits: Path, capsys: Any) -> None:
    code, record, err = run(capsys, edits, known=10, text=None)
    assert (code, err) == (0, "")
    assert (record["holds"], record["edits"], record["edit"], record["model"]) == (True, 3, 3, SHIPPED_MODEL)
    prompts = measure(record, "prompt")
    assert (prompts["before"], prompts["after"], prompts["count"], prompts["holds"]) == (0.0, 1.0, 3, True)
    assert measure(record, "known")["count"] == 10
    assert measure(record, "perplexity")["before"] > 1
    assert 0 < measure(record, "agreement")["after"] <= 1
    assert [a["target_new"] for a in record["answers"]] == [r["target_new"] for r in REQUESTS]


def test_a_delta_is_checked_like_its_ledger(edits: Path, tmp_path: Path, capsys: Any) -> None:
    EditLedger(edits).delta(3, since=0).save(tmp_path / "delta")
    _, of_ledger, _ = run(capsys, edits)
    code, of_delta, _ = run(capsys, tmp_path / "delta")
    assert code == 0
    own = ("source", "edit")
    assert {k: v for k, v in of_delta.items() if k not in own} == {k: v for k, v in of_ledger.items() if k not in own}


def test_an_edit_that_is_lost_exits_with_1_and_is_named(edits: Path, tmp_path: Path, capsys: Any) -> None:
    delta = EditLedger(edits).delta(2, since=0)
    delta.info.requests.append(REQUESTS[2])  # was not made
    delta.save(tmp_path / "delta")
    code, record, _ = run(capsys, tmp_path / "delta")
    assert (code, record["holds"]) == (1, False)
    assert measure(record, "prompt")["after"] == pytest.approx(2 / 3)
    assert [a["prompt"] for a in record["answers"] if not a["reached"]] == [REQUESTS[2]["prompt"]]
    assert check(tmp_path / "delta", **LOOSE, known=0, text=few_texts(tmp_path / "delta")) == 1
    out = capsys.readouterr().out
    assert "DOES NOT HOLD" in out
    assert "1 of 3 answers do not begin with their target" in out
    assert run(capsys, tmp_path / "delta", min_prompt=0.6)[0] == 0


def test_the_table_has_a_line_for_each_measure(edits: Path, capsys: Any) -> None:
    assert check(edits, **LOOSE, known=10, text=few_texts(edits)) == 0
    lines = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines() if "holds" in line]
    assert [line[0] for line in lines[:3]] == ["edits answered (3)", "known facts kept (10)", "perplexity"]
    assert lines[0][1:] == ["0.0%", "100.0%", "at least 100.0%", "holds"]
    assert lines[2][3].startswith("at most ")
    assert lines[3][0].startswith("next tokens alike (")


@pytest.mark.parametrize("bound", ["min_known", "max_perplexity", "min_agreement"])
def test_harm_beyond_one_bound_alone_exits_with_1(bound: str, tmp_path: Path, capsys: Any) -> None:
    prompt = REQUESTS[0]["prompt"]
    ledger = ledger_with(tmp_path / "e", [([{"prompt": prompt, "target_new": "x"}], 1.0)])
    loose = {"min_prompt": 0.0, "min_known": 0.0, "max_perplexity": 1e9, "min_agreement": 0.0}
    code, record, _ = run(capsys, ledger, known=10 if bound == "min_known" else 0, **{**loose, bound: 1.0})
    assert code == 1
    assert [m["name"] for m in record["measures"] if not m["holds"]] == [bound[4:]]


def test_harm_within_the_bounds_exits_with_0(tmp_path: Path, capsys: Any) -> None:
    ledger = ledger_with(tmp_path / "e", [([{"prompt": "Who?", "target_new": "x"}], 1.0)])
    loose = {"min_prompt": 0.0, "max_perplexity": 1e9, "min_agreement": 0.0}
    assert run(capsys, ledger, **loose)[0] == 0


def test_a_prompt_edited_twice_is_asked_for_its_last_target(tmp_path: Path, capsys: Any) -> None:
    prompt = REQUESTS[0]["prompt"]
    said = own_answer(prompt)
    edits = [([{"prompt": prompt, "target_new": target}], 1e-6) for target in ("something else", said)]
    code, record, _ = run(capsys, ledger_with(tmp_path / "e", edits))
    assert code == 0
    assert [a["target_new"] for a in record["answers"]] == [said]


def test_rephrasings_are_asked_and_counted_apart(tmp_path: Path, capsys: Any) -> None:
    prompt, other = REQUESTS[0]["prompt"], REQUESTS[1]["prompt"]
    request = {"prompt": prompt, "target_new": own_answer(prompt), "rephrases": [prompt, other]}
    code, record, _ = run(capsys, ledger_with(tmp_path / "e", [([request], 1e-6)]))
    assert code == 1
    found = {m["name"]: (m["after"], m["count"]) for m in record["measures"]}
    assert (found["prompt"], found["rephrase"]) == ((1.0, 1), (0.5, 2))


def test_another_accepted_answer_counts_as_right(tmp_path: Path, capsys: Any) -> None:
    prompt = REQUESTS[0]["prompt"]
    request = {"prompt": prompt, "target_new": "something else", "accepted": [own_answer(prompt)]}
    code, record, _ = run(capsys, ledger_with(tmp_path / "e", [([request], 1e-6)]))
    assert code == 0
    assert record["answers"][0]["right"] == ["something else", own_answer(prompt)]


TASK = """task: taught
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{[old, new]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


def test_tasks_of_the_harness_are_run_before_and_after(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model was taught is asked; with the noise it is right by chance."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    taught = [{"prompt": r["prompt"], "old": r["ground_truth"], "new": r["target_new"]} for r in load_records()[:20]]
    (tmp_path / "facts.json").write_text("\n".join(map(json.dumps, taught)), "utf-8")
    (tmp_path / "taught.yaml").write_text(TASK.format(file=tmp_path / "facts.json"), "utf-8")
    ledger = ledger_with(tmp_path / "e", [([{"prompt": "Who?", "target_new": "x"}], 3.0)])
    loose = {"min_prompt": 0.0, "max_perplexity": 1e9, "min_agreement": 0.0, "task": [str(tmp_path / "taught.yaml")]}
    code, record, _ = run(capsys, ledger, **loose)
    task = measure(record, "tasks.taught.acc")
    assert (code, task["holds"], task["before"]) == (1, False, 1.0)
    assert task["after"] < task["bound"] == pytest.approx(0.98)
    assert run(capsys, ledger, **loose, max_task_loss=1.0)[0] == 0


def test_tasks_without_the_harness_exit_with_2(edits: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = run(capsys, edits, task=["kdpo_facts"])
    assert code == 2
    assert "pip install 'kdpo-editor[harness]'" in err


def test_a_target_of_several_lines_is_answered(tmp_path: Path, capsys: Any) -> None:
    prompt = REQUESTS[0]["prompt"]
    target = own_answer(prompt).replace(" ", "\n") + "\n"
    code, _, _ = run(capsys, ledger_with(tmp_path / "e", [([{"prompt": prompt, "target_new": target}], 1e-6)]))
    assert code == 0


def test_facts_about_a_subject_of_an_edit_are_not_asked_as_known(tmp_path: Path, capsys: Any) -> None:
    unrelated = [{"prompt": "Who?", "target_new": "x"}]
    _, without, _ = run(capsys, ledger_with(tmp_path / "a", [(unrelated, 1e-6)]), known=10)
    subject = load("shipped", shuffle=False)[0].subject
    asked = f"What is to be said of {subject.upper()}?"
    related = [{"prompt": asked, "target_new": "x"}]
    _, with_one, _ = run(capsys, ledger_with(tmp_path / "b", [(related, 1e-6)]), known=10)
    assert (measure(without, "known")["count"], measure(with_one, "known")["count"]) == (10, 9)


def chat_model(folder: Path, template: str | None) -> Path:
    model, tok = load_model()
    tok.chat_template = template
    model.save_pretrained(folder / SHIPPED_MODEL)
    tok.save_pretrained(folder / SHIPPED_MODEL)
    return folder / SHIPPED_MODEL


def test_a_chat_is_asked_in_the_models_template_once(edits: Path, tmp_path: Path, capsys: Any) -> None:
    folder = chat_model(tmp_path, TEMPLATE)
    code, record, _ = run(capsys, edits, model=str(folder), chat=True, min_chat=0.0)
    assert code == 0
    asked = [a["prompt"] for a in record["answers"] if a["kind"] == "chat"]
    assert asked == [f"<|endoftext|>User: {r['prompt']}\nBot:" for r in REQUESTS]
    delta = EditLedger(edits).delta(3, since=0)
    _, tok = load_model()
    tok.chat_template = TEMPLATE
    delta.info.requests = [{**r, "prompt": as_chat(tok, r["prompt"])} for r in REQUESTS]
    delta.save(tmp_path / "delta")
    _, record, _ = run(capsys, tmp_path / "delta", model=str(folder), chat=True)
    assert [a["prompt"] for a in record["answers"] if a["kind"] == "chat"] == asked


def test_what_cannot_be_measured_is_said_and_is_no_failure(edits: Path, tmp_path: Path, capsys: Any) -> None:
    facts = tmp_path / "facts.json"
    one = {"prompt": "Which is it?", "target_new": "a", "ground_truth": "b", "subject": "it"}
    facts.write_text(json.dumps([one]), "utf-8")
    code, record, err = run(capsys, edits, known=10, known_from=str(facts))
    assert code == 0
    assert measure(record, "known")["holds"] is None
    assert "known facts kept: not measured" in err


def test_what_was_a_number_and_is_none_any_more_does_not_hold() -> None:
    assert Measure("perplexity", 10.0, None, 11.0, 5, at_most=True).holds is False
    assert Measure("perplexity", None, None, None, 0, at_most=True).holds is None


def test_a_text_that_says_nothing_of_the_model_has_no_figure(edits: Path, tmp_path: Path, capsys: Any) -> None:
    """One token has none before it that it could be told from, and NaN is not JSON."""
    one = tmp_path / "one.txt"
    one.write_text("a", "utf-8")
    assert check(edits, **LOOSE, known=0, json=True, text=one) == 0
    out, _ = capsys.readouterr()
    record = json.loads(out, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert {key: measure(record, "perplexity")[key] for key in ("before", "after", "bound", "holds")} == dict.fromkeys(
        ("before", "after", "bound", "holds")
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_known": 1.1}, "--min-known 1.1: it must be a share, from 0 to 1"),
        ({"max_perplexity": 0.0}, "--max-perplexity 0.0: it must be a multiple, above 0"),
        ({"known": -1}, "--known -1: it must be a number from 0"),
        ({"task_limit": 0}, "--task-limit 0: it must be a number from 1"),
        ({"edit": 9}, "there is no edit 9"),
        ({"edit": 0}, "no edit stands"),
        ({"model": "/no/such/model"}, "cannot load the model /no/such/model"),
        ({"text": Path("/no/such/text")}, "/no/such/text"),
        ({"trust_remote_code": True}, "name the model yourself"),
    ],
)
def test_what_cannot_be_checked_exits_with_2(edits: Path, capsys: Any, options: dict[str, Any], said: str) -> None:
    code, record, err = run(capsys, edits, **options)
    assert (code, record) == (2, {})
    assert said in err


def test_a_chat_with_a_model_that_has_no_template_exits_with_2(edits: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = run(capsys, edits, model=str(chat_model(tmp_path, None)), chat=True)
    assert code == 2
    assert "has no chat template" in err


def test_a_folder_that_holds_no_edits_exits_with_2(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("", "utf-8")
    assert run(capsys, tmp_path / "other")[0] == 2
    assert run(capsys, tmp_path / "none")[0] == 2


def test_a_delta_of_a_model_in_another_state_exits_with_2(edits: Path, tmp_path: Path, capsys: Any) -> None:
    EditLedger(edits).delta(3).save(tmp_path / "third")  # begins where the second ended
    code, _, err = run(capsys, tmp_path / "third")
    assert code == 2
    assert "is not as it was before this edit" in err


def test_edits_that_do_not_name_their_model_need_a_name(tmp_path: Path, capsys: Any) -> None:
    model, tok = load_model()
    delta = EditDelta.make(model, tok, REQUESTS[:1], settings())
    delta.info.hparams = None
    delta.save(tmp_path / "delta")
    code, _, err = run(capsys, tmp_path / "delta")
    assert code == 2
    assert "does not name its model; give --model" in err
    assert run(capsys, tmp_path / "delta", model=SHIPPED_MODEL)[0] == 0
