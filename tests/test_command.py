"""The command ``kdpo``, as someone uses it who meets it for the first time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import GOLDEN, assert_same, state
from small import make

from kdpo_editor import SHIPPED_MODEL, EditDelta, EditDiverged, EditLedger, KDPOHyperParams
from kdpo_editor.cli.edit import _in_chat, _not_done
from kdpo_editor.cli.main import EXAMPLES, main
from kdpo_editor.derived import complete
from kdpo_editor.engine.generation import generate
from kdpo_editor.models.loading import load
from kdpo_editor.requests import forms
from kdpo_editor.testbed import load_model, load_records

MODEL = ["--model", SHIPPED_MODEL]
RECORDS = load_records()[:6]
FACTS = [{"prompt": r["prompt"], "target_new": r["target_new"]} for r in RECORDS]


def write(path: Path, lines: list[Any]) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return str(path)


def kdpo(capsys: Any, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, JSON lines and messages of a command."""
    code = main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of six edits, not to be written to."""
    folder = tmp_path_factory.mktemp("command")
    assert main(["edit", *MODEL, "--file", write(folder / "f.jsonl", FACTS), "--out", str(folder / "edits")]) == 0
    return folder / "edits"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "arguments", "code"),
    [("cli.main", ["--help"], 0), ("cli.main", ["edit", "--modell", "x"], 2), ("compare.report.report", ["--help"], 0)],
)
def test_help_and_typos_are_answered_before_torch_is_loaded(program: str, arguments: list[str], code: int) -> None:
    script = (
        f"import sys, kdpo_editor, kdpo_editor.{program} as program\n"
        f"try: code = program.main({arguments})\n"
        "except SystemExit as stop: code = stop.code\n"
        f"assert code == {code}, code\n"
        "loaded = {'torch', 'transformers', 'numpy', 'easyeditor'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_one_edit(tmp_path: Path, capsys: Any) -> None:
    first = FACTS[1]
    code, lines, err = kdpo(
        capsys, "edit", *MODEL, "--prompt", first["prompt"], "--target", first["target_new"], "--out", tmp_path / "e"
    )
    assert (code, err) == (0, "")
    assert lines == [{"edit": 1, **first, "converged": True, "steps": lines[0]["steps"]}]
    model, tok = load_model()
    EditLedger(tmp_path / "e").restore(model)
    assert generate(model, tok, first["prompt"]) == first["target_new"]


def test_prompts_in_the_models_chat_template_are_recorded_and_asked_so(tmp_path: Path, capsys: Any) -> None:
    model, tok = load_model()
    tok.chat_template = "{{ '<|endoftext|>User: ' + messages[0].content + '\nBot:' }}"
    model.save_pretrained(tmp_path / "kdpo-llama-knowedit")
    tok.save_pretrained(tmp_path / "kdpo-llama-knowedit")
    named = ["--model", tmp_path / "kdpo-llama-knowedit"]
    first = FACTS[1]
    fact = ["--prompt", first["prompt"], "--target", first["target_new"]]
    templated = {**first, "prompt": f"<|endoftext|>User: {first['prompt']}\nBot:"}
    code, lines, err = kdpo(capsys, "edit", *named, "--chat", *fact, "--out", tmp_path / "e")
    assert (code, err) == (0, "")
    assert lines == [{"edit": 1, **templated, "converged": True, "steps": lines[0]["steps"]}]
    assert EditLedger(tmp_path / "e").requests == [templated]
    code, lines, err = kdpo(capsys, "edit", *named, "--chat", *fact, "--out", tmp_path / "e", "--resume")
    assert (code, lines, err) == (0, [], "kdpo: 1 of 1 edits are in the ledger already\n")
    for own in ([], ["--chat", "--prompt", first["prompt"]]):
        _, (shown,), _ = kdpo(capsys, "show", tmp_path / "e", "--json", *own)
        assert (shown["prompt"], shown["target_new"]) == (templated["prompt"], first["target_new"])
        assert shown["after"].startswith(first["target_new"])


def test_every_prompt_of_a_request_is_put_into_the_chat_template() -> None:
    _, tok = load_model()
    tok.chat_template = "{{ 'User: ' + messages[0].content + '\nBot:' }}"
    request = {"prompt": "a", "target_new": "b", "rephrases": ["c", "d"], "rephrase_prompt": "e", "subject": "a"}
    assert _in_chat(tok, request) == {
        "prompt": "User: a\nBot:",
        "target_new": "b",
        "rephrases": ["User: c\nBot:", "User: d\nBot:"],
        "rephrase_prompt": "User: e\nBot:",
        "subject": "a",
    }


def test_chat_with_a_model_that_has_no_template_is_an_error(tmp_path: Path, capsys: Any) -> None:
    model, tok = load_model()
    tok.chat_template = None
    model.save_pretrained(tmp_path / "kdpo-llama-knowedit")
    tok.save_pretrained(tmp_path / "kdpo-llama-knowedit")
    fact = ["--prompt", "a", "--target", "b", "--out", tmp_path / "e"]
    code, lines, err = kdpo(capsys, "edit", "--model", tmp_path / "kdpo-llama-knowedit", "--chat", *fact)
    assert (code, lines) == (1, [])
    assert "kdpo-llama-knowedit has no chat template to put a prompt in" in err


def test_an_edit_through_its_subject(tmp_path: Path, capsys: Any) -> None:
    first = FACTS[1]
    own = ["--prompt", first["prompt"], "--target", first["target_new"], "--out", tmp_path / "e"]
    layers = ["--set", "layers=[1, 4]", "--set", "fact_token=subject"]
    code, lines, err = kdpo(capsys, "edit", *MODEL, *own, *layers, "--subject", "Atlantis")
    assert (code, lines) == (1, [])
    assert "'subject' 'Atlantis' does not stand in the prompt" in err
    subject = first["prompt"].split()[-1].strip("?.")
    code, lines, _ = kdpo(capsys, "edit", *MODEL, *own, *layers, "--subject", subject)
    assert (code, lines[0]["converged"]) == (0, True)
    assert EditLedger(tmp_path / "e").requests == [{**first, "subject": subject}]


def test_subjects_that_are_guessed_are_told_and_their_lines_named(
    tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    facts = [{"prompt": "Reedy Glacier is in", "target_new": "Asia", "subject": "Reedy Glacier"}]
    facts += [{"prompt": "The capital of Australia is", "target_new": "Rome"}]
    file = write(tmp_path / "f.jsonl", facts)
    forms._SAID.clear()
    layers = ["--set", "layers=[1, 4]", "--set", "fact_token=subject"]
    _, lines, _ = kdpo(capsys, "edit", *MODEL, "--file", file, "--out", tmp_path / "e", *layers)
    assert [line.get("subject") for line in lines] == [None, "Australia"]
    taken = f"{file}, line 2: no 'subject' is given for 'The capital of Australia is'; 'Australia' is taken"
    assert taken in caplog.text


def test_keep_going_is_not_offered_where_nothing_would_be_left(tmp_path: Path, capsys: Any) -> None:
    code, _, err = kdpo(capsys, "edit", *MODEL, "--prompt", "a", "--target", "", "--out", tmp_path / "e")
    assert code == 1
    assert "nothing was edited" in err
    assert "--keep-going" not in err


def test_a_file_from_standard_input(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    with open(write(tmp_path / "f.jsonl", [{"prompt": FACTS[1]["prompt"], "target": FACTS[1]["target_new"]}])) as file:
        monkeypatch.setattr(sys, "stdin", file)
        code, lines, _ = kdpo(capsys, "edit", *MODEL, "--file", "-", "--out", tmp_path / "e")
    assert (code, len(lines)) == (0, 1)


def test_settings_can_be_set(tmp_path: Path, capsys: Any) -> None:
    code, lines, _ = kdpo(
        capsys, "edit", *MODEL, "--file", write(tmp_path / "f.jsonl", FACTS), "--out", tmp_path / "e",
        "--set", "schedule=breadth_first", "--set", "append_eos=true",
    )  # fmt: skip
    assert code == 0
    assert [line["edit"] for line in lines] == [1] * 6, "a breadth-first run is one edit"
    hparams = EditLedger(tmp_path / "e").branch[0].info.hparams
    assert hparams is not None
    assert (hparams["schedule"], hparams["append_eos"]) == ("breadth_first", True)


def test_a_model_without_ready_made_settings_is_edited(tmp_path: Path, capsys: Any) -> None:
    """The folder's name fits no file; what was found from its structure is said, and written down."""
    model = str(GOLDEN / "llama-mini")
    own = ["--prompt", FACTS[0]["prompt"], "--target", FACTS[0]["target_new"], "--out", tmp_path / "e"]
    code, lines, err = kdpo(capsys, "edit", "--model", model, *own, "--set", "lr=1e-3")
    assert (code, lines[0]["converged"]) == (0, True)
    assert "from the model's structure: layers [4], rewrite_module_tmp model.layers.{}.mlp.down_proj" in err
    hparams = EditLedger(tmp_path / "e").branch[0].info.hparams
    assert hparams is not None
    assert (hparams["layers"], hparams["rewrite_module_tmp"]) == ([4], "model.layers.{}.mlp.down_proj")


@pytest.mark.parametrize(("count", "options"), [(11, []), (10, []), (11, ["--recipe", "KDPO-L"])])
def test_many_edits_are_told_of_the_recipe_for_many(
    count: int, options: list[str], tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text(count * '{"prompt": "What species is ZIC3 specific to?", "target_new": "male"}\n', "utf-8")
    assert main(["edit", "--model", str(tmp_path / "nowhere"), "--file", str(file), "--out", str(tmp_path), *options])
    assert ("11 last better with --recipe KDPO-L" in capsys.readouterr().err) is (count == 11 and not options)


@pytest.mark.parametrize("model", [SHIPPED_MODEL, str(GOLDEN / "llama-mini"), str(GOLDEN / "gpt2-mini")])
def test_settings_are_printed_as_a_file_to_keep(model: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["settings", "--model", model, "--set", "lr=3e-4"]) == 0
    file = tmp_path / "kept.yaml"
    file.write_text(capsys.readouterr().out, "utf-8")
    kept = KDPOHyperParams.from_hparams(file)
    assert (kept.model_name, kept.layers, kept.lr) == (model, [4], 3e-4)
    assert kept == complete(kept, load(model)[0])
    assert main(["settings", "--model", model, "--hparams", str(file)]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == kept.to_dict()


def test_a_settings_file_need_not_name_its_model(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "any.yaml"
    file.write_text("lr: 2e-3\n", "utf-8")
    assert main(["settings", "--model", str(GOLDEN / "gpt2-mini"), "--hparams", str(file)]) == 0
    said = yaml.safe_load(capsys.readouterr().out)
    assert (said["lr"], said["rewrite_module_tmp"]) == (2e-3, "transformer.h.{}.mlp.c_proj")


@pytest.mark.parametrize("files", [["auto.yaml"], ["auto.yaml", "llama-mini.yaml"]], ids=["any", "its own"])
def test_a_recipe_has_a_file_for_any_model(
    files: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file for this model, by the folder's name, wins."""
    (tmp_path / "KDPO-L").mkdir()
    for margin, name in enumerate(files, start=1):
        named = "" if name == "auto.yaml" else "model_name: somebody/llama\n"
        (tmp_path / "KDPO-L" / name).write_text(f"{named}margin: {margin}\n", "utf-8")
    for module in ("hparams", "cli.settings"):
        monkeypatch.setattr(f"kdpo_editor.{module}.settings_folder", lambda: tmp_path)
    assert main(["settings", "--model", str(GOLDEN / "llama-mini"), "--recipe", "KDPO-L"]) == 0
    out = capsys.readouterr().out
    assert f"from KDPO-L/{files[-1]}" in out
    assert yaml.safe_load(out)["margin"] == len(files)


def test_a_recipe_without_settings_for_a_model_is_refused(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("kdpo_editor.cli.settings.settings_folder", lambda: tmp_path)
    code, _, err = kdpo(capsys, "settings", "--model", str(GOLDEN / "llama-mini"), "--recipe", "KDPO-L")
    assert code == 1
    assert "--recipe KDPO-L: it has no settings for" in err


def test_an_edit_that_misses_its_target_gives_exit_code_one(tmp_path: Path, capsys: Any) -> None:
    code, lines, _ = kdpo(
        capsys, "edit", *MODEL, "--file", write(tmp_path / "f.jsonl", FACTS[:1]), "--out", tmp_path / "e",
        "--set", "cycles=1", "--set", "num_steps=1", "--set", "lr=1e-7",
    )  # fmt: skip
    assert code == 1
    assert lines[0]["converged"] is False


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "x"}, "line 601 has no 'target_new'; it has 'prompt'"),
        ('{"prompt": "x", ', "line 601 is not JSON"),
        ({"prompt": "x", "target_new": []}, "line 601: 'target_new' is an empty list"),
        ({"prompt": " ", "target_new": "y"}, "line 601: 'prompt' is empty"),
        ("[]", "line 601 is a list"),
        ({"prompt": "x", "target_new": "y " * 3000}, "line 601 has 6001 tokens"),
    ],
)
def test_a_bad_line_among_a_thousand_is_named_and_nothing_is_edited(
    tmp_path: Path, capsys: Any, bad: Any, message: str
) -> None:
    lines: list[Any] = [FACTS[i % 6] for i in range(1000)]
    lines[600] = bad
    file = write(tmp_path / "f.jsonl", lines)
    code, out, err = kdpo(capsys, "edit", *MODEL, "--file", file, "--out", tmp_path / "e")
    assert (code, out) == (1, [])
    assert message in err
    assert "nothing was edited" in err
    assert not (tmp_path / "e" / "journal.jsonl").exists()


def test_keep_going_skips_bad_lines_and_says_so(tmp_path: Path, capsys: Any) -> None:
    file = write(tmp_path / "f.jsonl", [FACTS[0], "oops", "", FACTS[1]])
    code, out, err = kdpo(capsys, "edit", *MODEL, "--file", file, "--out", tmp_path / "e", "--keep-going")
    assert code == 1
    assert [line["prompt"] for line in out] == [FACTS[0]["prompt"], FACTS[1]["prompt"]]
    assert "line 2 is not JSON" in err


def test_keep_going_goes_on_after_an_edit_that_diverges(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, calls = EditLedger.edit, []

    def first_fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise EditDiverged("as asked")
        return make(self, *args, **kwargs)

    monkeypatch.setattr(EditLedger, "edit", first_fails)
    file = write(tmp_path / "f.jsonl", FACTS[:2])
    code, out, err = kdpo(capsys, "edit", *MODEL, "--file", file, "--out", tmp_path / "e", "--keep-going")
    assert (code, out[0]["error"], out[1]["edit"]) == (1, "as asked", 1)
    assert f"{file}, line 1: as asked" in err


def test_two_lines_that_one_call_cannot_both_make_are_named(tmp_path: Path, capsys: Any) -> None:
    """``breadth_first`` trains all lines together; one after the other, the later one would hold."""
    again = {**FACTS[0], "target_new": FACTS[1]["target_new"]}
    file = write(tmp_path / "f.jsonl", [FACTS[0], FACTS[1], again])
    many = ["--set", "schedule=breadth_first"]
    code, out, err = kdpo(capsys, "edit", *MODEL, "--file", file, "--out", tmp_path / "e", *many)
    assert (code, out) == (1, [])
    assert f"{file}, line 1 and {file}, line 3 give the prompt" in err
    code, out, err = kdpo(capsys, "edit", *MODEL, "--file", file, "--out", tmp_path / "e", *many, "--keep-going")
    assert code == 1
    assert [(line["prompt"], line["target_new"]) for line in out] == [tuple(fact.values())[:2] for fact in FACTS[:2]]
    assert f"{file}, line 1 and {file}, line 3 give the prompt" in err
    code, out, err = kdpo(capsys, "edit", *MODEL, "--file", file, "--out", tmp_path / "e", *many, "--resume")
    assert (code, len(out)) == (0, 1), "what is in the ledger is of another call"


def test_what_is_left_may_lie_between_what_is_there() -> None:
    """As after a run in which one edit failed and the others went on."""
    wanted = [(f"line {i}", {"prompt": p, "target_new": "x"}) for i, p in enumerate("abcab", 1)]
    done = [{"prompt": p, "target_new": "x"} for p in "acb"]
    assert [where for where, _ in _not_done(wanted, done)] == ["line 4", "line 5"]
    assert [where for where, _ in _not_done(wanted, done[:2])] == ["line 2", "line 4", "line 5"]
    assert _not_done(wanted, []) == wanted


def test_resuming_leaves_out_what_is_there(tmp_path: Path, capsys: Any, edits: Path) -> None:
    half = write(tmp_path / "half.jsonl", FACTS[:3])
    whole = write(tmp_path / "whole.jsonl", FACTS)
    kdpo(capsys, "edit", *MODEL, "--file", half, "--out", tmp_path / "e")
    code, out, err = kdpo(capsys, "edit", *MODEL, "--file", whole, "--out", tmp_path / "e", "--resume")
    assert (code, len(out)) == (0, 3)
    assert "3 of 6 edits are in the ledger already" in err
    assert EditLedger(tmp_path / "e").state(6) == EditLedger(edits).state(6), "as in one go, bit for bit"


@pytest.mark.slow
def test_interrupted_it_leaves_a_ledger_to_go_on_from(tmp_path: Path, capsys: Any, edits: Path) -> None:
    file = write(tmp_path / "f.jsonl", FACTS * 500)
    command = [
        sys.executable,
        "-m",
        "kdpo_editor.cli.main",
        "edit",
        *MODEL,
        "--file",
        file,
        "--out",
        str(tmp_path / "e"),
    ]
    root = str(Path(__file__).parents[1])
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        # Shells start what runs in the background with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert run.stdout is not None
    assert json.loads(run.stdout.readline())["edit"] == 1
    time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate()
    assert run.returncode == 130, err
    assert "interrupted" in err
    assert "--resume" in err
    assert "Traceback" not in err
    ledger = EditLedger(tmp_path / "e")
    assert ledger.head in (1 + len(out.splitlines()), 2 + len(out.splitlines()))
    assert ledger.head < 500 * len(FACTS)


def test_undo_redo_checkout_and_log(tmp_path: Path, capsys: Any) -> None:
    make(tmp_path / "e", 4)
    assert kdpo(capsys, "undo", tmp_path / "e", "-n", "2") == (0, [{"head": 2, "edits": 2}], "")
    assert kdpo(capsys, "redo", tmp_path / "e") == (0, [{"head": 3, "edits": 3}], "")
    assert main(["log", str(tmp_path / "e")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line[0] for line in out[:4]] == [" ", " ", "*", "-"]
    assert "question 3 -> answer 3" in out[2]
    assert out[4] == "3 edits stand, 1 are undone (-); * is the head"
    assert kdpo(capsys, "checkout", tmp_path / "e", "0") == (0, [{"head": 0, "edits": 0}], "")
    _, lines, _ = kdpo(capsys, "log", tmp_path / "e", "--json")
    assert [line["stands"] for line in lines] == [False] * 4
    assert lines[0]["requests"] == [{"prompt": "question 1", "target_new": "answer 1"}]
    kdpo(capsys, "checkout", tmp_path / "e", "4")
    _, lines, _ = kdpo(capsys, "compact", tmp_path / "e", "--keep", "1")
    assert lines[0]["edits"] == 2
    assert lines[0]["freed_bytes"] > 0


def test_a_damaged_ledger_is_named_and_read_when_asked(tmp_path: Path, capsys: Any) -> None:
    make(tmp_path / "e", 2)
    with open(tmp_path / "e" / "journal.jsonl", "a") as journal:
        journal.write("oops\n")
    code, out, err = kdpo(capsys, "log", tmp_path / "e", "--json")
    assert (code, out) == (1, [])
    assert "line 4 is not JSON" in err
    assert "--skip-damaged" in err
    code, out, err = kdpo(capsys, "log", tmp_path / "e", "--json", "--skip-damaged")
    assert (code, len(out)) == (0, 2)
    assert "skipped: " in err


def test_show_puts_before_and_after_side_by_side(edits: Path, capsys: Any) -> None:
    code, lines, _ = kdpo(capsys, "show", edits, "--json")
    assert code == 0
    assert [line["before"] for line in lines[:3]] == [r["ground_truth"] for r in RECORDS[:3]]
    assert [line["after"] for line in lines[:3]] == [r["target_new"] for r in RECORDS[:3]]
    assert {(line["reached_before"], line["reached_after"]) for line in lines[:3]} == {(False, True)}
    assert main(["show", str(edits), "--prompt", FACTS[1]["prompt"], "--edit", "1"]) == 0
    table = capsys.readouterr().out
    assert table.split()[:4] == ["prompt", "before", "after", "target"]
    assert table.count(RECORDS[1]["ground_truth"]) == 2, "edit 1 was of another fact"
    assert main(["show", str(edits)]) == 0
    assert capsys.readouterr().out.count("(reached)") == len(lines)


def test_show_counts_every_accepted_answer(tmp_path: Path, capsys: Any) -> None:
    """The second edit changes next to nothing, so the model says the first one's target, which the second accepts."""
    prompt, right = FACTS[0]["prompt"], FACTS[0]["target_new"]
    first = write(tmp_path / "1.jsonl", FACTS[:1])
    second = write(tmp_path / "2.jsonl", [{"prompt": prompt, "target_new": ["Atlantis", right]}])
    assert main(["edit", *MODEL, "--file", first, "--out", str(tmp_path / "e")]) == 0
    small = ["--set", "cycles=1", "--set", "num_steps=1", "--set", "lr=1e-9"]
    assert main(["edit", *MODEL, "--file", second, "--out", str(tmp_path / "e"), *small]) == 1
    capsys.readouterr()
    code, lines, _ = kdpo(capsys, "show", tmp_path / "e", "--json")
    assert (code, lines[0]["target_new"], lines[0]["reached_after"]) == (0, "Atlantis", True)


def test_export_of_the_model(edits: Path, tmp_path: Path, capsys: Any) -> None:
    from transformers import AutoModelForCausalLM

    code, lines, _ = kdpo(capsys, "export", edits, "--as", "model", "--to", tmp_path / "m")
    assert code == 0
    assert lines[0]["bytes"] > 8e6
    model, _ = load_model()
    EditLedger(edits).restore(model)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32), state(model))


def test_export_and_apply_of_a_delta(edits: Path, tmp_path: Path, capsys: Any) -> None:
    assert kdpo(capsys, "export", edits, "--as", "delta", "--to", tmp_path / "d", "--edit", "2")[0] == 0
    assert [r["prompt"] for r in EditDelta.load(tmp_path / "d").info.requests] == [f["prompt"] for f in FACTS[:2]]
    code, lines, _ = kdpo(capsys, "apply", tmp_path / "d", *MODEL, "--out", tmp_path / "e")
    assert (code, lines[0]["edit"]) == (0, 1)
    assert EditLedger(tmp_path / "e").state(1) == EditLedger(edits).state(2)
    code, _, err = kdpo(capsys, "apply", tmp_path / "d", *MODEL, "--out", tmp_path / "e")
    assert code == 1
    assert "is applied to this model already" in err


def test_export_of_an_adapter(edits: Path, tmp_path: Path, capsys: Any) -> None:
    peft = pytest.importorskip("peft")
    code, lines, _ = kdpo(capsys, "export", edits, "--as", "lora", "--to", tmp_path / "a", "--edit", "2")
    assert code == 0
    assert lines[0]["rank"] in (8, 16, 32, 64, 128, 256)
    assert lines[0]["max_lora_rank"] == lines[0]["rank"]
    model, tok = load_model()
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "a"))
    assert [generate(adapted, tok, f["prompt"]) for f in FACTS[:2]] == [f["target_new"] for f in FACTS[:2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edti"], "No such command 'edti'. Did you mean 'edit'?"),
        (["edit", "--promt", "x"], "No such option: --promt (Possible options: --hparams, --out, --prompt)"),
        (["edit", *MODEL, "--prompt", "x", "--out", "e"], "give --prompt and --target, or --file"),
        (
            ["edit", *MODEL, "--prompt", "x", "--file", "f", "--out", "e"],
            "give either --file, or --prompt, --target and, where it is needed, --subject",
        ),
        (["edit", *MODEL, "--prompt", "x", "--target", "y"], "--out"),
        (["undo", "e", "-n", "-1"], "Invalid value for '-n'"),
        (["undo", "e", "-n", "many"], "Invalid value for '-n'"),
        (["export", "e", "--as", "pickle", "--to", "x"], "Invalid value for '--as'"),
        ([], "Missing command"),
    ],
)
def test_wrong_usage_gives_exit_code_two_and_a_hint(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "section"),
    [
        (["undo", "none"], "Files"),
        (["settings", *MODEL, "--set", "margin=many"], "Settings"),
        (["settings", "--model", "none.gguf"], "Models"),
        (["check", "none"], "Files"),
    ],
)
def test_an_error_names_the_section_of_the_page_that_explains_it(
    arguments: list[str], section: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) in (1, 2)
    assert capsys.readouterr().err.splitlines()[-1].endswith(f'docs/how-to/troubleshooting.md, "{section}"')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", *MODEL, "--file", "nowhere.jsonl", "--out", "e"], "nowhere.jsonl"),
        (["settings", "--model", "/no/model"], "/no/model"),
        (
            [
                "edit",
                "--model",
                "/no/model",
                "--hparams",
                SHIPPED_MODEL,
                "--prompt",
                "x",
                "--target",
                "y",
                "--out",
                "e",
            ],
            "cannot load the model /no/model",
        ),
        (["edit", *MODEL, "--prompt", "x", "--target", "y", "--out", "e", "--set", "lrr=1"], "did you mean lr?"),
        (["edit", *MODEL, "--prompt", "x", "--target", "y", "--out", "e", "--set", "lr"], "write it as key=value"),
        (["edit", *MODEL, "--prompt", "x", "--target", "y", "--out", "."], "is not a ledger; it holds thesis.tex"),
        (["log", "nowhere"], "there is no ledger in nowhere"),
        (["undo", "nowhere"], "there is no ledger in nowhere"),
        (["log", "."], "is not a ledger"),
    ],
)
def test_mistakes_give_exit_code_one_and_name_the_culprit(
    arguments: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    (tmp_path / "thesis.tex").write_text("...", "utf-8")
    monkeypatch.chdir(tmp_path)
    code, out, err = kdpo(capsys, *arguments)
    assert (code, out) == (1, [])
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("command", [c for c in EXAMPLES if c])
def test_help_has_examples_and_exit_codes(command: str, capsys: Any) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"kdpo {command} " in text
    assert "exit codes:" in text


def test_code_that_comes_with_a_model_is_not_run_for_a_ledgers_sake(edits: Path, capsys: Any) -> None:
    code, _, err = kdpo(capsys, "show", edits, "--trust-remote-code")
    assert code == 1
    assert "name the model yourself" in err


def test_a_ledger_cannot_steer_the_terminal(tmp_path: Path, capsys: Any) -> None:
    from small import Small, change, info

    model = Small()
    with EditLedger(tmp_path / "e", write=True) as ledger:
        what = info(1)
        what.requests[0]["prompt"] = "\x1b]0;owned\x07\x9b31m"
        ledger.record(model, change(model, 1), what)
    for arguments in (["log", str(tmp_path / "e")], ["log", str(tmp_path / "e"), "--json"]):
        main(arguments)
        assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().out)
