"""A ledger: what it puts back is bit for bit what was there, and what breaks says so and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, PARAMETER, REQUEST, assert_same, load, no_file_longer_than, state
from small import NAME, Small, add, change, info, make
from test_replay_buffer import MARGIN, REQUESTS

from kdpo_editor import (
    DamagedFileError,
    EditDelta,
    EditDiverged,
    EditLedger,
    FingerprintError,
    KDPOError,
    KDPOHyperParams,
    LedgerError,
    LedgerLocked,
    StorageError,
    apply_kdpo_to_model,
    edit,
    original,
)
from kdpo_editor.engine.structure import room

SECOND = {"prompt": "Which family does Epaspidoceras belong to?", "target_new": "Noctuidae"}
CASES = json.loads((GOLDEN / "golden-llama.json").read_text("utf-8"))["cases"]


# Going back and forth -----------------------------------------------------------------------------------------


def test_fifty_edits_are_undone_one_by_one_bit_for_bit(llama: Any, settings: Any, tmp_path: Path) -> None:
    model, tok = llama
    hparams = settings(cycles=1, num_steps=2)
    facts = list(dict.fromkeys((case["prompt"], case["target_new"]) for case in CASES))
    # The same questions again, each with the next one's answer, are edits too.
    requests = [
        {"prompt": p, "target_new": facts[(i + k) % len(facts)][1]} for k in range(5) for i, (p, _) in enumerate(facts)
    ]
    states = [state(model)]
    with EditLedger(tmp_path / "l", write=True) as ledger:
        for request in requests[:50]:
            ledger.edit(model, tok, [request], hparams)
            states.append(state(model))
        assert ledger.head == 50
        assert len({tuple(s[PARAMETER].flatten()[:50].tolist()) for s in states}) >= 45, "edits changed something"
        for before in reversed(states[:-1]):
            ledger.undo(1, model)
            assert_same(model, before)
        ledger.redo(50, model)
        assert_same(model, states[-1])
        ledger.checkout(17, model)
        assert_same(model, states[17])


def test_a_fresh_model_is_taken_to_the_head(tmp_path: Path) -> None:
    states = make(tmp_path / "l", 4)
    ledger = EditLedger(tmp_path / "l")
    fresh = Small()
    assert ledger.restore(fresh) == 4
    assert_same(fresh, states[4])


def test_half_precision_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = Small().to(torch.bfloat16)
    before = state(model)
    with EditLedger(tmp_path / "l", write=True) as ledger:
        add(ledger, model, 1)
        after = state(model)
        ledger.undo(1, model)
        assert_same(model, before)
        ledger.redo(1, model)
        assert_same(model, after)


def test_an_edit_after_undo_begins_a_branch_and_the_undone_ones_stay(tmp_path: Path) -> None:
    states = make(tmp_path / "l", 3)
    model = Small()
    with EditLedger(tmp_path / "l", write=True) as ledger:
        ledger.undo(2, model)
        assert_same(model, states[1])
        add(ledger, model, 9)
        branched = state(model)
        assert [one.number for one in ledger.branch] == [1, 4]
        assert ledger.edits[4].parent == 1
        with pytest.raises(LedgerError, match="0 are undone"):
            ledger.redo(1, model)
        ledger.checkout(3, model)
        assert_same(model, states[3])
        ledger.checkout(4, model)
        assert_same(model, branched)
    assert EditLedger(tmp_path / "l").head == 4


def test_moves_are_remembered(tmp_path: Path) -> None:
    make(tmp_path / "l", 5)
    with EditLedger(tmp_path / "l", write=True) as ledger:
        ledger.undo(3)
        ledger.redo(1)
    with EditLedger(tmp_path / "l", write=True) as ledger:
        assert ledger.head == 3
        assert ledger.redo(2) == 5


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (lambda ledger: ledger.undo(4), "cannot undo 4 edits: 3 stand"),
        (lambda ledger: ledger.undo(0), "cannot undo 0 edits"),
        (lambda ledger: ledger.redo(), "cannot redo 1 edits: 0 are undone"),
        (lambda ledger: ledger.checkout(7), "there is no edit 7 in .*; there is 1 to 3"),
        (lambda ledger: ledger.delta(2, since=3), "edit 2 was not made after edit 3"),
        (lambda ledger: ledger.compact(-1), "cannot keep -1"),
    ],
)
def test_what_cannot_be_done_is_named(tmp_path: Path, move: Any, message: str) -> None:
    make(tmp_path / "l", 3)
    journal = (tmp_path / "l" / "journal.jsonl").read_bytes()
    with EditLedger(tmp_path / "l", write=True) as ledger, pytest.raises(LedgerError, match=message):
        move(ledger)
    assert (tmp_path / "l" / "journal.jsonl").read_bytes() == journal


def test_compacting_keeps_the_state_and_frees_the_rest(tmp_path: Path) -> None:
    states = make(tmp_path / "l", 6)
    with EditLedger(tmp_path / "l", write=True) as ledger:
        ledger.undo(1)
        size = sum(f.stat().st_size for f in (tmp_path / "l").iterdir())
        freed = ledger.compact(keep=2)
        assert [(one.number, one.merged) for one in ledger.branch] == [(3, 3), (4, 1), (5, 1)]
        assert [r["prompt"] for r in ledger.requests] == [f"question {i}" for i in range(1, 6)]
    assert size - freed == sum(f.stat().st_size for f in (tmp_path / "l").iterdir())
    with EditLedger(tmp_path / "l", write=True) as ledger:
        model = Small()
        ledger.restore(model)
        assert_same(model, states[5])
        ledger.undo(2, model)
        assert_same(model, states[3])
        ledger.checkout(0, model)
        assert_same(model, states[0])
        ledger.checkout(5, model)
        add(ledger, model, 7)
        ledger.compact()
        assert [(one.number, one.merged) for one in ledger.branch] == [(6, 6)]
        assert len(list((tmp_path / "l").glob("*.safetensors"))) == 4


def test_a_file_that_cannot_be_removed_does_not_damage_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "l", 6)
    with EditLedger(tmp_path / "l", write=True) as ledger:
        model = Small()
        ledger.restore(model)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", refused)
            with pytest.raises(StorageError, match="cannot remove"):
                ledger.compact()
        add(ledger, model, 7)
    with EditLedger(tmp_path / "l") as ledger:
        assert [(one.number, one.merged) for one in ledger.branch] == [(6, 6), (7, 1)]
        assert not ledger.damaged


def refused(path: Path, **_: Any) -> None:
    raise OSError(13, "Permission denied")


def test_a_ledger_that_begins_with_a_delta_names_the_model(tmp_path: Path) -> None:
    model, delta = Small(), None
    before = change(model, 1)
    delta = EditDelta.of(model, before)
    for given, wanted in (({}, None), ({"model_name": "small"}, "small")):
        with EditLedger(tmp_path / str(wanted), write=True) as ledger:
            ledger.apply(Small(), delta, **given)
            assert ledger.model_name == wanted


# Through the editor -------------------------------------------------------------------------------------------


def test_every_call_is_journaled_where_the_settings_say(llama: Any, settings: Any, tmp_path: Path) -> None:
    model, tok = llama
    hparams = settings(ledger=str(tmp_path / "l"))
    _, originals = apply_kdpo_to_model(model, tok, [REQUEST], hparams, return_orig_weights=True)
    apply_kdpo_to_model(model, tok, [SECOND], hparams)
    after = state(model)
    ledger = EditLedger(tmp_path / "l")
    assert [one.info.requests for one in ledger.branch] == [[REQUEST], [SECOND]]
    assert ledger.branch[0].info.outcomes[0]["converged"] is True
    assert ledger.branch[0].info.hparams == hparams.to_dict()
    assert ledger.model_name == "llama-mini"
    fresh, _ = load("llama")
    assert torch.equal(fresh.get_parameter(PARAMETER), originals[PARAMETER])
    ledger.restore(fresh)
    assert_same(fresh, after)


def test_journaled_edits_are_those_without_a_ledger(settings: Any, tmp_path: Path) -> None:
    (plain, tok), (model, _) = load("llama"), load("llama")
    for request in (REQUEST, SECOND):
        edit(plain, tok, [request], settings())
        apply_kdpo_to_model(model, tok, [request], settings(ledger=str(tmp_path / "l")))
    assert_same(model, state(plain))


def test_weights_put_back_between_calls_are_a_checkout(llama: Any, settings: Any, tmp_path: Path) -> None:
    model, tok = llama
    hparams = settings(ledger=str(tmp_path / "l"))
    for request in (REQUEST, SECOND):
        _, originals = apply_kdpo_to_model(model, tok, [request], hparams, return_orig_weights=True)
        with torch.no_grad():
            model.get_parameter(PARAMETER).copy_(originals[PARAMETER])
    ledger = EditLedger(tmp_path / "l")
    assert [one.number for one in ledger.branch] == [2], "the first edit is off the branch"
    assert sorted(ledger.edits) == [1, 2]
    assert ledger.edits[2].parent == 0
    moves = [json.loads(line)["record"] for line in (tmp_path / "l" / "journal.jsonl").read_text("utf-8").splitlines()]
    assert [m for m in moves if m["kind"] == "move"] == [
        {"kind": "move", "to": 0, "why": "the model's weights were put back"}
    ]


def test_a_copy_is_journaled_and_the_model_given_stays(llama: Any, settings: Any, tmp_path: Path) -> None:
    model, tok = llama
    before = state(model)
    edited, _ = apply_kdpo_to_model(model, tok, [REQUEST], settings(ledger=str(tmp_path / "l")), copy=True)
    assert_same(model, before)
    EditLedger(tmp_path / "l").restore(model)
    assert_same(model, state(edited))


def test_a_matrix_changed_by_something_else_is_named_and_nothing_is_edited(
    llama: Any, settings: Any, tmp_path: Path
) -> None:
    model, tok = llama
    hparams = settings(ledger=str(tmp_path / "l"))
    apply_kdpo_to_model(model, tok, [REQUEST], hparams)
    with torch.no_grad():
        model.get_parameter(PARAMETER)[0, 0] += 1
    before = state(model)
    with pytest.raises(FingerprintError, match=rf"{PARAMETER} is in a state that this ledger does not know.*edit 1"):
        apply_kdpo_to_model(model, tok, [SECOND], hparams)
    assert_same(model, before)
    assert EditLedger(tmp_path / "l").head == 1


def test_original_shows_the_model_before_what_the_ledger_did(tmp_path: Path) -> None:
    states = make(tmp_path / "l", 3)
    model = Small()
    with EditLedger(tmp_path / "l", write=True) as ledger:
        ledger.restore(model)
        ledger.undo(1, model)
        add(ledger, model, 8)
        after = state(model)
        with original(model):
            assert_same(model, states[0])
        assert_same(model, after)


# What breaks --------------------------------------------------------------------------------------------------


def test_a_full_disk_undoes_the_edit_and_loses_nothing(llama: Any, settings: Any, tmp_path: Path) -> None:
    model, tok = llama
    with EditLedger(tmp_path / "l", write=True) as ledger:
        ledger.edit(model, tok, [REQUEST], settings())
        before = state(model)
        files = sorted(f.name for f in (tmp_path / "l").iterdir())
        with (
            no_file_longer_than(20_000),
            pytest.raises(StorageError, match=r"cannot write .*safetensors: File too large"),
        ):
            ledger.edit(model, tok, [SECOND], settings())
        assert_same(model, before)
        assert sorted(f.name for f in (tmp_path / "l").iterdir()) == files
        ledger.edit(model, tok, [SECOND], settings())
    assert EditLedger(tmp_path / "l").head == 2


@pytest.mark.parametrize("room", [0, 1, 300, 600])
def test_a_disk_that_fills_up_within_a_line_leaves_the_journal_as_it_was(tmp_path: Path, room: int) -> None:
    states = make(tmp_path / "l", 3)
    journal = tmp_path / "l" / "journal.jsonl"
    before = journal.read_bytes()
    model = Small()
    with EditLedger(tmp_path / "l", write=True) as ledger:
        ledger.restore(model)
        originals = change(model, 9)
        with (
            no_file_longer_than(len(before) + room),
            pytest.raises(StorageError, match=r"cannot write .*journal\.jsonl"),
        ):
            ledger.record(model, originals, info(9))
        assert journal.read_bytes() == before
        ledger.record(model, originals, info(9))
    again = Small()
    EditLedger(tmp_path / "l").restore(again)
    assert_same(again, state(model))
    with EditLedger(tmp_path / "l", write=True) as ledger:
        ledger.undo(1, again)
    assert_same(again, states[3])


def test_a_full_file_system_loses_nothing(tmp_path: Path) -> None:
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {tmp_path} 2>/dev/null"):
        pytest.skip("no file system can be mounted here")
    try:
        model, done = Small(), 0
        with EditLedger(tmp_path / "l", write=True) as ledger, pytest.raises(StorageError, match="No space left"):  # noqa: PT012
            for done in range(100):
                add(ledger, model, done)
        again = Small()
        assert EditLedger(tmp_path / "l").restore(again) == done > 0
    finally:
        os.system(f"umount {tmp_path}")


def test_a_read_only_folder_can_be_read_and_says_that_it_cannot_be_written() -> None:
    root = Path(tempfile.mkdtemp())
    try:
        make(root / "l", 2)
        for path in (root, root / "l"):
            path.chmod(0o555)
        for file in (root / "l").iterdir():
            file.chmod(0o444)
        said = as_nobody(lambda: (EditLedger(root / "l").head, raised(lambda: EditLedger(root / "l", write=True))))
        assert said == f"(2, 'StorageError: [Errno 13] cannot write {root}/l/lock: Permission denied')"
        said = as_nobody(lambda: raised(lambda: EditLedger(root / "new", write=True)))
        assert said == f"StorageError: [Errno 13] cannot make {root}/new: Permission denied"
    finally:
        for path in (root, root / "l"):
            path.chmod(0o755)
        shutil.rmtree(root)


def raised(call: Any) -> str:
    try:
        call()
    except KDPOError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def as_nobody(call: Any) -> str:
    """What ``call`` returns, as text, in a process that is not root."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            os.write(writing, str(call()).encode())
        except BaseException as error:
            os.write(writing, repr(error).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    make(tmp_path / "l", 1)
    with EditLedger(tmp_path / "l", write=True) as first:
        with pytest.raises(LedgerLocked, match=f"process {os.getpid()} is writing to"):
            EditLedger(tmp_path / "l", write=True)
        with pytest.raises(LedgerLocked):
            EditLedger(tmp_path / "l", write=True, wait=0.1)
        readers = [EditLedger(tmp_path / "l") for _ in range(3)]
        assert [reader.head for reader in readers] == [1, 1, 1]
        model = Small()
        first.restore(model)
        add(first, model, 2)
    with EditLedger(tmp_path / "l", write=True) as second:
        assert second.head == 2


def test_a_writer_that_died_leaves_no_lock(tmp_path: Path) -> None:
    make(tmp_path / "l", 1)
    child = os.fork()
    if child == 0:
        EditLedger(tmp_path / "l", write=True)
        os._exit(0)
    os.waitpid(child, 0)
    EditLedger(tmp_path / "l", write=True).close()


def test_waiting_for_another_writer(tmp_path: Path) -> None:
    make(tmp_path / "l", 1)
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        ledger = EditLedger(tmp_path / "l", write=True)
        os.write(told, b".")
        import time

        time.sleep(0.3)
        ledger.undo()
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(LedgerLocked, match=f"process {child} "):
        EditLedger(tmp_path / "l", write=True)
    with EditLedger(tmp_path / "l", write=True, wait=60) as ledger:
        assert ledger.head == 0
    os.waitpid(child, 0)


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    make(tmp_path / "l", 1)
    with pytest.raises(LedgerError, match="open for reading only"):
        EditLedger(tmp_path / "l").undo()


def test_nan_is_not_journaled(tmp_path: Path) -> None:
    make(tmp_path / "l", 1)
    model = Small()
    with EditLedger(tmp_path / "l", write=True) as ledger:
        ledger.restore(model)
        originals = change(model, 2)
        with torch.no_grad():
            model.get_parameter(NAME)[1, 1] = float("nan")
        with pytest.raises(EditDiverged, match=r"a\.weight holds NaN"):
            ledger.record(model, originals, info(2))
    assert EditLedger(tmp_path / "l").head == 1


def test_an_edit_that_diverges_leaves_model_and_ledger(llama: Any, settings: Any, tmp_path: Path) -> None:
    model, tok = llama
    hparams = settings(ledger=str(tmp_path / "l"))
    apply_kdpo_to_model(model, tok, [REQUEST], hparams)
    before = state(model)
    with pytest.raises(EditDiverged):
        apply_kdpo_to_model(model, tok, [SECOND], settings(ledger=str(tmp_path / "l"), lr=1e38))
    assert_same(model, before)
    assert EditLedger(tmp_path / "l").head == 1


def test_a_model_of_another_size_or_dtype_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "l", 2)
    for model, message in (
        (Small(rows=6), r"[ab]\.weight is .* 6.* F32 here, .* 4.* F32 there"),
        (Small().half(), r"[ab]\.weight is .* F16 here, .* F32 there"),
        (torch.nn.Linear(2, 2), r"[ab]\.weight, which this Linear does not have"),
    ):
        before = state(model)
        with pytest.raises(FingerprintError, match=message):
            EditLedger(tmp_path / "l").restore(model)
        assert_same(model, before)


def test_another_model_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "l", 2)
    model = Small()
    change(model, 77)
    change(model, 78, "b.weight")
    before = state(model)
    with pytest.raises(FingerprintError, match=r"[ab]\.weight is in a state that this ledger does not know"):
        EditLedger(tmp_path / "l").restore(model)
    assert_same(model, before)


def test_a_config_that_differs_is_named(llama: Any, gpt2: Any, settings: Any, tmp_path: Path) -> None:
    apply_kdpo_to_model(*llama, [REQUEST], settings(ledger=str(tmp_path / "l")))
    with pytest.raises(FingerprintError, match=r"made on another model: .*model_type is 'gpt2' here, 'llama' there"):
        EditLedger(tmp_path / "l").restore(gpt2[0])


def test_a_folder_that_holds_something_else_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...", "utf-8")
    for write in (True, False):
        with pytest.raises(DamagedFileError, match=r"is not a ledger; it holds thesis\.tex"):
            EditLedger(tmp_path, write=write)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(StorageError, match="there is no ledger"):
        EditLedger(tmp_path / "nowhere")


# Damage -------------------------------------------------------------------------------------------------------


def test_a_journal_cut_at_any_byte_opens_at_the_last_complete_edit(tmp_path: Path) -> None:
    states = make(tmp_path / "l", 3)
    journal = tmp_path / "l" / "journal.jsonl"
    whole = journal.read_bytes()
    ends = [i + 1 for i, c in enumerate(whole) if c == ord("\n")]
    for cut in sorted(
        {*range(0, len(whole) + 1, 7), *(end + k for end in ends for k in (-2, -1, 0, 1) if end + k <= len(whole))}
    ):
        journal.write_bytes(whole[:cut])
        expected = max(sum(end <= cut for end in ends) - 1, 0)  # the first line is the header
        assert EditLedger(tmp_path / "l").head == expected, cut
    for cut in range(0, len(whole), 197):
        journal.write_bytes(whole[:cut])
        model = Small()
        with EditLedger(tmp_path / "l", write=True) as ledger:
            head = ledger.restore(model) if ledger.edits else 0
            assert_same(model, states[head])
            for number in range(head + 1, 4):
                add(ledger, model, number, ("a.weight", "b.weight")[number % 2])
        assert_same(model, states[3])
        assert EditLedger(tmp_path / "l").head == 3


def test_a_damaged_line_is_named_and_skipped_only_when_asked(tmp_path: Path) -> None:
    states = make(tmp_path / "l", 5)
    journal = tmp_path / "l" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b"question 3", b"question 8")
    journal.write_bytes(b"".join(lines))
    with pytest.raises(DamagedFileError, match=r"journal\.jsonl, line 4 is damaged: its checksum"):
        EditLedger(tmp_path / "l")
    with EditLedger(tmp_path / "l", write=True, skip_damaged=True) as ledger:
        assert len(ledger.damaged) == 1
        assert "line 4" in ledger.damaged[0]
        assert [one.number for one in ledger.branch] == [1, 2, 4, 5]
        model = Small()
        ledger.restore(model)
        assert_same(model, states[5])
        ledger.undo(2, model)
        assert_same(model, states[2])
        ledger.redo(2, model)
        ledger.compact(keep=3)
    assert [one.number for one in EditLedger(tmp_path / "l").branch] == [1, 2, 4, 5]


def test_compacting_without_its_first_line_loses_no_edit(tmp_path: Path) -> None:
    states = make(tmp_path / "l", 3)
    journal = tmp_path / "l" / "journal.jsonl"
    first, *others = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([first.replace(b'"version":1', b'"version":2'), *others]))
    with EditLedger(tmp_path / "l", write=True, skip_damaged=True) as ledger:
        assert len(ledger.damaged) == 1
        ledger.compact(keep=3)
    model = Small()
    ledger = EditLedger(tmp_path / "l")
    assert [one.number for one in ledger.branch] == [1, 2, 3]
    ledger.restore(model)
    assert_same(model, states[3])


def test_outcomes_stay_with_their_edits_where_some_are_not_known(tmp_path: Path) -> None:
    model = Small()
    missed = replace(info(2), outcomes=[{"converged": False, "steps": 3}])
    with EditLedger(tmp_path / "l", write=True) as ledger:
        add(ledger, model, 1)
        ledger.record(model, change(model, 2), missed)
        merged = ledger.delta(2, since=0).info
    assert [request["prompt"] for request in merged.requests] == ["question 1", "question 2"]
    assert merged.outcomes == []
    assert missed.with_edits_of([missed, missed]).outcomes == 2 * missed.outcomes


def test_what_is_unedited_again_needs_no_values_that_compacting_removed(tmp_path: Path) -> None:
    model = Small()
    before = state(model)
    delta = EditDelta.of(model, change(model, 1))
    delta.revert(model)
    with EditLedger(tmp_path / "l", write=True) as ledger:
        ledger.apply(model, delta)
        ledger.undo(model=model)
        ledger.compact()
    with original(model):
        assert_same(model, before)


def test_an_edit_that_fails_when_it_is_remembered_leaves_the_model_and_its_ledger(
    llama: Any, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tok = llama
    hparams = settings(**MARGIN, replay=True)

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with EditLedger(tmp_path / "l", write=True) as ledger:
        ledger.edit(model, tok, REQUESTS[:1], hparams)
        before = state(model)
        with monkeypatch.context() as patched:
            patched.setattr("kdpo_editor.lifelong.replay.ReplayBuffer.store", fails)
            with pytest.raises(torch.OutOfMemoryError):
                ledger.edit(model, tok, REQUESTS[1:2], hparams)
        assert_same(model, before)
        ledger.edit(model, tok, REQUESTS[1:2], hparams)
        assert ledger.head == 2


def test_an_earlier_edit_too_long_to_train_again_is_said_and_passed_over(
    gpt2: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tok = gpt2
    plain = KDPOHyperParams("gpt2-mini", [2], "transformer.h.{}.mlp.c_proj", lr=1e-3)
    word = " ZIC3"
    most = room(model)
    prompt = "What species" + word * ((most - 12) // len(tok(word)["input_ids"]))
    assert most - 24 < len(tok(prompt)["input_ids"]) < most - 3
    with EditLedger(tmp_path / "l", write=True) as ledger:
        ledger.edit(model, tok, [{"prompt": prompt, "target_new": "male"}], plain)
        contexts = replace(plain, objective="hinge", margin=1.0, context_templates=3, replay=True)
        ledger.edit(model, tok, [REQUEST], contexts)
        assert ledger.head == 2
    assert "cannot be trained again: it has more tokens than the model takes" in caplog.text


def test_a_damaged_or_missing_value_is_named_and_the_model_stays(tmp_path: Path) -> None:
    make(tmp_path / "l", 2)
    ledger = EditLedger(tmp_path / "l")
    file = tmp_path / "l" / f"{ledger.state(2)[NAME].sha256}.safetensors"
    whole = file.read_bytes()
    model = Small()
    before = state(model)
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"\xff" * 8 + whole[8:]):
        file.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=file.name):
            ledger.restore(model)
        assert_same(model, before)
    file.unlink()
    with pytest.raises(StorageError, match=file.name):
        ledger.restore(model)
    file.symlink_to("/dev/zero")
    with pytest.raises(DamagedFileError, match="is a link"):
        ledger.restore(model)
    assert_same(model, before)


def test_a_pipe_in_place_of_the_journal_does_not_make_a_reader_wait(tmp_path: Path) -> None:
    (tmp_path / "l").mkdir()
    os.mkfifo(tmp_path / "l" / "journal.jsonl")
    with pytest.raises(DamagedFileError, match="not a plain file"):
        EditLedger(tmp_path / "l")


# Replay -------------------------------------------------------------------------------------------------------


def test_a_resumed_run_with_replay_knows_its_earlier_edits(settings: Any, tmp_path: Path) -> None:
    options = {**MARGIN, "replay": True}
    undisturbed, tok = load("llama")
    for request in REQUESTS:
        apply_kdpo_to_model(undisturbed, tok, [request], settings(**options))
    hparams = settings(**options, ledger=str(tmp_path / "l"))
    first, _ = load("llama")
    for request in REQUESTS[:2]:
        apply_kdpo_to_model(first, tok, [request], hparams)
    resumed, _ = load("llama")
    EditLedger(tmp_path / "l").restore(resumed)
    for request in REQUESTS[2:]:
        apply_kdpo_to_model(resumed, tok, [request], hparams)
    assert_same(resumed, state(undisturbed))
    without, _ = load("llama")
    for request in REQUESTS:
        apply_kdpo_to_model(without, tok, [request], settings(**MARGIN))
    assert not torch.equal(without.get_parameter(PARAMETER), resumed.get_parameter(PARAMETER)), "replay did something"


# A long run ---------------------------------------------------------------------------------------------------


def test_what_another_process_did_meanwhile_is_seen(llama: Any, settings: Any, tmp_path: Path) -> None:
    model, tok = llama
    hparams = settings(ledger=str(tmp_path / "l"))
    apply_kdpo_to_model(model, tok, [REQUEST], hparams)
    with EditLedger(tmp_path / "l", write=True) as other:
        other.undo(1, model)
    apply_kdpo_to_model(model, tok, [SECOND], hparams)
    assert [one.parent for one in EditLedger(tmp_path / "l").edits.values()] == [0, 0]
    with EditLedger(tmp_path / "l", write=True) as other:
        other.compact()
    apply_kdpo_to_model(model, tok, [REQUEST], hparams)
    assert [one.number for one in EditLedger(tmp_path / "l").branch] == [2, 3]


def test_a_ledger_that_was_removed_begins_anew(llama: Any, settings: Any, tmp_path: Path) -> None:
    model, tok = llama
    hparams = settings(ledger=str(tmp_path / "l"))
    apply_kdpo_to_model(model, tok, [REQUEST], hparams)
    shutil.rmtree(tmp_path / "l")
    apply_kdpo_to_model(model, tok, [SECOND], hparams)
    assert [one.info.requests for one in EditLedger(tmp_path / "l").branch] == [[SECOND]]


def test_a_folder_that_may_not_be_entered_is_named() -> None:
    root = Path(tempfile.mkdtemp())
    try:
        make(root / "l", 1)
        root.chmod(0o700 if os.getuid() == 0 else 0)
        said = as_nobody(lambda: raised(lambda: EditLedger(root / "l")))
        assert said == f"StorageError: [Errno 13] cannot open {root}/l: Permission denied"
    finally:
        root.chmod(0o700)
        shutil.rmtree(root)


def test_an_undo_that_fails_moves_neither_journal_nor_model(tmp_path: Path) -> None:
    states = make(tmp_path / "l", 2)
    model, journal = Small(), tmp_path / "l" / "journal.jsonl"
    with EditLedger(tmp_path / "l", write=True) as ledger:
        ledger.restore(model)
        before = journal.read_bytes()
        earlier = {value.sha256 for value in ledger.state(1).values()} - {v.sha256 for v in ledger.state(2).values()}
        (missing,) = earlier
        (tmp_path / "l" / f"{missing}.safetensors").write_bytes(b"")
        with pytest.raises(DamagedFileError):
            ledger.undo(1, model)
        assert (ledger.head, journal.read_bytes()) == (2, before)
        assert_same(model, states[2])


def test_a_delta_that_cannot_be_journaled_is_not_applied(tmp_path: Path) -> None:
    model = Small()
    delta = EditDelta.of(model, change(model, 1))
    delta.revert(model)
    before = state(model)
    with EditLedger(tmp_path / "l", write=True) as ledger:
        with no_file_longer_than(20), pytest.raises(StorageError):
            ledger.apply(model, delta)
        assert_same(model, before)
        assert ledger.head == 0


def test_a_delta_of_the_last_edits_is_theirs_alone(tmp_path: Path) -> None:
    states = make(tmp_path / "l", 4)
    delta = EditLedger(tmp_path / "l").delta(4, since=2)
    assert [request["prompt"] for request in delta.info.requests] == ["question 3", "question 4"]
    model = Small()
    model.load_state_dict(states[2])
    delta.apply(model)
    assert_same(model, states[4])
