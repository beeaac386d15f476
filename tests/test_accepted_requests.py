"""What people hand over as requests: each kind, and what becomes of it. The list is docs/reference/accepted.md."""

from __future__ import annotations

import json
import logging
import lzma
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import REQUEST, assert_same, state
from test_requests import FAMILY, MADE, folder, said, smol, tokens  # noqa: F401

from kdpo_editor import EditDelta, EditLedger, KDPOError, RequestError, edit
from kdpo_editor.cli.request_file import read_lines
from kdpo_editor.editing import check
from kdpo_editor.engine.generation import says_target
from kdpo_editor.requests import forms
from kdpo_editor.requests.chat import as_chat
from kdpo_editor.requests.forms import plain_request, right_answers
from kdpo_editor.requests.subjects import subject_of
from kdpo_editor.requests.tokens import tokenize

HANGUL = "\u1112\u1161\u11ab\u1100\u116e\u11a8"  # two syllables in six letters
GENE = "What species is ZIC3 specific to?"


@pytest.fixture(autouse=True)
def _nothing_was_said() -> None:
    forms._SAID.clear()


def plain(**fields: Any) -> dict[str, Any]:
    return plain_request({"prompt": "a", "target_new": "b", **fields}, "request 0")


# Tables ---------------------------------------------------------------------------------------------------------


def test_what_is_missing_in_a_table_is_absent() -> None:
    """As ``to_dict("records")`` gives it: NaN where one record of several has no such field."""
    table = pd.DataFrame([
        {"prompt": "a", "target_new": "b", "subject": "a", "separator": "\n", "rephrases": ["c"]},
        {"prompt": "d", "target_new": "e"},
    ])  # fmt: skip
    full, bare = table.to_dict("records")
    assert isinstance(bare["subject"], float)
    assert plain_request(bare, "request 1") == {"prompt": "d", "target_new": "e"}
    assert plain_request(full, "request 0") == full


@pytest.mark.parametrize("absent", [None, math.nan, np.float32("nan"), pd.NA, pd.NaT, Decimal("NaN")])
def test_every_kind_of_nothing_is_absence(smol: Any, absent: Any) -> None:  # noqa: F811
    request = {"prompt": "Paris is in", "target_new": "Italy"}
    others = dict.fromkeys(("subject", "separator", "rephrases", "accepted", "note"), absent)
    assert plain(**others) == plain()
    assert [len(one) for one in tokenize(smol, [{**request, **others}], with_subject=True)] == [1]


def test_a_table_without_a_target_in_a_record_names_the_record(smol: Any) -> None:  # noqa: F811
    table = pd.DataFrame([{"prompt": "a", "target_new": "b"}, {"prompt": "c"}])
    with pytest.raises(RequestError, match="request 1 has no 'target_new'; it has 'prompt'"):
        tokenize(smol, table.to_dict("records"))
    with pytest.raises(RequestError, match=r"must be a list .* a table's are its .to_dict\('records'\)"):
        tokenize(smol, table)  # type: ignore[arg-type]


def test_arrays_from_parquet_are_lists() -> None:
    assert plain(rephrases=np.array(["c", "d"], dtype=object))["rephrases"] == ["c", "d"]
    assert plain(target_new=np.array(["b", "c"], dtype=object)) == plain(accepted=["c"])


# Numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (16, "16"),
        (16.0, "16"),
        (np.int64(16), "16"),
        (np.float32(0.5), "0.5"),
        (-3.25, "-3.25"),
        (Decimal("3.10"), "3.10"),
        (2**70, str(2**70)),
    ],
)
def test_a_number_is_the_text_that_it_is_written_as(number: Any, text: str) -> None:
    assert plain(target_new=number)["target_new"] == text


@pytest.mark.parametrize("other", [True, math.inf, {"str": "b"}, b"b", [["b"]], 1j])
def test_what_is_no_answer_is_refused(other: Any) -> None:
    with pytest.raises(RequestError, match=r"request 0: 'target_new' is a \w+; it must be text, a number or a list"):
        plain(target_new=other)


def test_a_number_of_any_size_is_understood() -> None:
    request = plain_request({"prompt": "a", "target_new": 10**400, "other": 10**400}, "request 0")
    assert request["target_new"] == str(10**400)


def test_numbers_are_spoken_of_once(caplog: pytest.LogCaptureFixture, smol: Any) -> None:  # noqa: F811
    with caplog.at_level(logging.INFO, "kdpo_editor"):
        for _ in range(2):
            tokenize(smol, [{"prompt": "a", "target_new": 16}, {"prompt": "b", "target_new": 17.0}])
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "request 0: the number 16 as 'target_new' is taken as text; others like it are said at level INFO"),
        ("INFO", "request 1: the number 17 as 'target_new' is taken as text"),
    ]


def test_a_number_is_edited_and_kept_as_text(llama: Any, settings: Any, tmp_path: Path) -> None:
    model, tok = llama
    with EditLedger(tmp_path, write=True) as ledger:
        _, _, (trace,) = ledger.edit(model, tok, [{"prompt": GENE, "target_new": 16}], settings())
    assert trace.converged
    assert says_target(model, tok, [{"prompt": GENE, "target_new": "16"}]) == [True]
    assert EditLedger(tmp_path).requests == [{"prompt": GENE, "target_new": "16"}]


# Several answers ------------------------------------------------------------------------------------------------


def test_the_first_of_several_answers_is_the_target_and_the_others_count_too() -> None:
    assert plain(target_new=["b", "c", 3, "b", None]) == plain(accepted=["c", "3"])
    assert plain(target_new=["b", "c"], accepted=["d", "b"]) == plain(accepted=["c", "d"])
    assert plain(target_new=["b"]) == plain()
    assert right_answers({"prompt": "a", "target_new": ["b", "c"], "accepted": "d"}) == ("b", "c", "d")


@pytest.mark.parametrize(("answers", "what"), [([], "is an empty list"), ([None], "has no answer")])
def test_a_list_without_an_answer_is_refused(answers: list[Any], what: str) -> None:
    with pytest.raises(RequestError, match=f"request 0: 'target_new' {what}"):
        plain(target_new=answers)


def test_the_first_answer_is_trained_and_any_is_right(llama: Any, settings: Any) -> None:
    model, tok = llama
    knows = next(one for one in ("human", "male") if says_target(model, tok, [{"prompt": GENE, "target_new": one}])[0])
    other = {"human": "male", "male": "human"}[knows]
    assert says_target(model, tok, [{"prompt": GENE, "target_new": [other, "ant"]}]) == [False]
    assert says_target(model, tok, [{"prompt": GENE, "target_new": [other, knows]}]) == [True]
    delta = EditDelta.make(model, tok, [{"prompt": GENE, "target_new": [other, knows]}], settings())
    assert delta.info.outcomes[0]["converged"]
    assert delta.info.outcomes[0]["steps"] > 0
    assert delta.info.requests == [{"prompt": GENE, "target_new": other, "accepted": [knows]}]
    assert says_target(model, tok, [{"prompt": GENE, "target_new": other}]) == [True]


def test_lines_of_a_file_may_have_numbers_and_several_answers() -> None:
    data = [b'{"prompt": "a", "target": 16}', b'{"prompt": "a", "target_new": ["b", "c"], "subject": null}']
    assert [line.request for line in read_lines(data, "file")] == [
        {"prompt": "a", "target_new": "16"},
        {"prompt": "a", "target_new": "b", "accepted": ["c"]},
    ]


@pytest.mark.parametrize(
    ("key", "value"), [("rephrases", ["a", 5]), ("rephrases", "a"), ("separator", 3), ("subject", {"a": 1})]
)
def test_what_python_refuses_is_not_left_out_of_a_line(smol: Any, key: str, value: Any) -> None:  # noqa: F811
    (line,) = read_lines([json.dumps({"prompt": "a", "target_new": "b", key: value}).encode()], "file")
    with pytest.raises(RequestError, match=f"file, line 1: {key!r} is "):
        tokenize(smol, [line.request or {}], with_subject=True, names=["file, line 1"])


def test_what_an_edit_does_not_read_is_left_out_of_a_line_where_it_is_no_text() -> None:
    (line,) = read_lines([b'{"prompt": "a", "target_new": "b", "case_id": 5, "relation": "P36"}'], "file")
    assert line.request == {"prompt": "a", "target_new": "b", "relation": "P36"}


def test_a_byte_order_mark_is_passed_over() -> None:
    (line,) = read_lines([b'\xef\xbb\xbf{"prompt": "a", "target_new": "b"}'], "file")
    assert line.request == {"prompt": "a", "target_new": "b"}


@pytest.mark.parametrize(("key", "meant"), [("subjct", "subject"), ("rephrase", "rephrases"), ("acepted", "accepted")])
def test_a_key_that_is_nearly_one_that_is_read_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, key: str, meant: str
) -> None:
    for _ in range(2):
        plain(target_new="b", **{key: "x"})
    assert caplog.messages == [f"request 0: the key {key!r} is not read; did you mean {meant!r}?"]


@pytest.mark.parametrize("key", ["rephrase_prompt", "ground_truth", "locality", "portability", "loc_prompt", "case_id"])
def test_keys_of_the_framework_are_not_warned_of(caplog: pytest.LogCaptureFixture, key: str) -> None:
    plain(target_new="b", **{key: "x"})
    plain(target_new="b", subject="x", subjects="y")
    assert not caplog.messages


# Subjects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("What is the capital of France?", "France"),
        ("Leonardo da Vinci was born in", "Leonardo da Vinci"),
        ("J. R. R. Tolkien wrote", "J. R. R. Tolkien"),
        ("Fantasy Studios's headquarters are in", "Fantasy Studios"),
        ("Who is Jean-Luc O'Neill?", "Jean-Luc O'Neill"),
        ("The location of 1976 Summer Paralympics is", "1976 Summer Paralympics"),
        ("Berlin is not Paris. Where is University of Oxford?", "University of Oxford"),
        ('The author of "the old man" is Ernest', "the old man"),
        ("Wer schrieb „der alte Mann“?", "der alte Mann"),
        ("《红楼梦》的作者是", "红楼梦"),
        ("Столица Франции называется", "Столица Франции"),
        ("the eiffel tower is in", "the eiffel tower"),
        ("бבירת צרפת היא"[1:], "בירת צרפת"),
        ("法国的首都是", "法国的首"),
        ("Paris", "Paris"),
        ("...", ""),
    ],
)
def test_a_subject_is_the_longest_name_or_all_but_the_last_words(prompt: str, subject: str) -> None:
    assert subject_of(prompt) == subject


def test_nine_in_ten_of_counterfacts_subjects_are_found() -> None:
    file = Path(__file__).parent.parent / "kdpo_editor" / "compare" / "data" / "counterfact.json.xz"
    records = json.loads(lzma.decompress(file.read_bytes()))
    found = [subject_of(record["prompt"]) == record["subject"] for record in records]
    assert sum(found) / len(found) > 0.9


def test_a_request_without_a_subject_gets_one_and_that_is_said_once(
    smol: Any,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    request = {"prompt": "The mother tongue of Danielle Darrieux is", "target_new": "English"}
    other = {"prompt": "Reedy Glacier is in", "target_new": "Asia"}
    with caplog.at_level(logging.INFO, "kdpo_editor"):
        for _ in range(2):
            (one,), (two,) = tokenize(smol, [request, other], with_subject=True)
    assert said(smol, one.prompt[slice(*one.subject)]) == " Danielle Darrieux"
    assert said(smol, two.prompt[slice(*two.subject)]) == "Reedy Glacier"
    assert [(record.levelname, record.getMessage().partition("; others")[0]) for record in caplog.records] == [
        ("WARNING", f"request 0: no 'subject' is given for {request['prompt']!r}; 'Danielle Darrieux' is taken"),
        ("INFO", f"request 1: no 'subject' is given for {other['prompt']!r}; 'Reedy Glacier' is taken"),
    ]


def test_a_subject_that_was_found_is_that_of_rephrases_too(smol: Any) -> None:  # noqa: F811
    request = {"prompt": "Reedy Glacier is in", "target_new": "Asia"}
    rephrases = ["South Pole Station says: Reedy Glacier is in", "Where is that long river of ice?"]
    ((_, one, two),) = tokenize(smol, [{**request, "rephrases": rephrases}], with_subject=True)
    assert said(smol, one.prompt[slice(*one.subject)]) == " Reedy Glacier"
    assert said(smol, two.prompt[slice(*two.subject)]) == "Where is that long river"


def test_a_template_around_a_question_is_no_subject(smol: Any) -> None:  # noqa: F811
    """SmolLM2's puts a message before it that speaks of SmolLM and Hugging Face."""
    prompt = as_chat(smol, "Which town has the eiffel tower in it?")
    assert "Hugging Face" in prompt
    ((edit,),) = tokenize(smol, [{"prompt": prompt, "target_new": "Rome"}], with_subject=True)
    assert said(smol, edit.prompt[slice(*edit.subject)]) == "Which town has the eiffel tower"


def test_an_edit_is_that_of_the_subject_that_was_found(llama: Any, settings: Any) -> None:
    model, tok = llama
    hparams = settings(layers=[2, 4], fact_token="subject", cycles=2)
    expected = state(edit(model, tok, [{**REQUEST, "subject": "ZIC3"}], hparams, copy=True)[0])
    edit(model, tok, [REQUEST], hparams)
    assert_same(model, expected)


@pytest.mark.parametrize(
    ("prompt", "subject", "written"),
    [
        ("Where is PARIS now?", "Paris", "PARIS"),
        ("Where is Cafe\u0301 Noir now?", "Caf\u00e9 noir", "Cafe\u0301 Noir"),
        ("Wo ist die Hauptstra\N{LATIN SMALL LETTER SHARP S}e jetzt?", "HAUPTSTRASSE", "Hauptstra\u00dfe"),
        (HANGUL + "\u110b\u1173\u11ab", "\ud55c\uad6d", HANGUL),
    ],
)
def test_case_and_unicode_form_of_a_subject_may_differ_and_that_is_said(
    smol: Any,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    prompt: str,
    subject: str,
    written: str,
) -> None:
    with caplog.at_level(logging.WARNING, "kdpo_editor"):
        edit = tokens(smol, prompt, "x", subject=subject)
    assert written in said(smol, edit.prompt[slice(*edit.subject)])
    assert written not in said(smol, edit.prompt[edit.subject[0] : edit.subject[1] - 1])
    assert caplog.messages == [f"request 0: the subject {subject!r} is taken for {written!r} in {prompt!r}"]


def test_a_letter_without_its_mark_is_another(smol: Any) -> None:  # noqa: F811
    with pytest.raises(RequestError, match="'subject' 'Cafe' does not stand in the prompt"):
        tokens(smol, "Where is Caf\u00e9 now?", "x", subject="Cafe")


def test_a_subject_stands_at_whole_words_before_it_stands_within_one(smol: Any) -> None:  # noqa: F811
    edit = tokens(smol, "Al Gore is also known as Algernon", "x", subject="al")
    assert said(smol, edit.prompt[slice(*edit.subject)]) == " also"  # as it is written goes before case
    edit = tokens(smol, "Paris is what Parisians love; it is", "x", subject="Paris")
    assert said(smol, edit.prompt[slice(*edit.subject)]) == "Paris"


# One call -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["depth_first", "breadth_first"])
def test_a_repeated_request_is_edited_once(
    llama: Any, gpt2: Any, settings: Any, schedule: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, tok = llama
    other = {"prompt": "What species is ZIC1 specific to?", "target_new": "male"}
    expected = state(edit(model, tok, [REQUEST, other], settings(schedule=schedule), copy=True)[0])
    with caplog.at_level(logging.WARNING, "kdpo_editor"):
        _, _, traces = edit(model, tok, [REQUEST, dict(REQUEST), other, other], settings(schedule=schedule))
    assert_same(model, expected)
    assert len(traces) == 4
    assert traces[0] is traces[1]
    assert traces[2] is traces[3]
    assert "request 1: repeats request 0, 'What species is ZIC3 specific to?'; it is edited once" in caplog.messages


@pytest.mark.parametrize("key", ["prompt", "target_new", "ground_truth", "rephrases"])
def test_half_a_surrogate_pair_is_refused(llama: Any, settings: Any, tmp_path: Path, key: str) -> None:
    """No file could keep it, so a ledger with it could not be read again."""
    model, tok = llama
    before = state(model)
    value: Any = ["What\ud800?"] if key == "rephrases" else "What\ud800?"
    refused = pytest.raises(RequestError, match=f"request 0: '{key}' holds half a surrogate pair")
    with EditLedger(tmp_path / "e", write=True) as ledger, refused:
        ledger.edit(model, tok, [{"prompt": GENE, "target_new": "male", key: value}], settings())
    assert_same(model, before)
    assert EditLedger(tmp_path / "e").requests == []


@pytest.mark.parametrize("other", [{"prompt": GENE}, {"prompt": "Which?", "rephrases": [GENE]}])
def test_two_targets_for_a_prompt_are_refused_naming_both(llama: Any, settings: Any, other: dict[str, Any]) -> None:
    model, tok = llama
    before = state(model)
    third = {**other, "target_new": "Noctuidae"}
    with pytest.raises(
        RequestError, match=r"request 0 and request 2 give the prompt 'What .*'male' and 'Noctuidae'; keep"
    ):
        edit(model, tok, [REQUEST, {"prompt": "b", "target_new": "c"}, third], settings())
    assert_same(model, before)


def test_two_calls_may_give_a_prompt_two_targets(llama: Any, settings: Any) -> None:
    model, tok = llama
    for target in ("male", "Noctuidae"):
        _, _, (trace,) = edit(model, tok, [{**REQUEST, "target_new": target}], settings())
        assert trace.converged


@pytest.mark.parametrize("field", ["prompt", "target_new"])
def test_more_tokens_than_the_model_takes_are_refused(llama: Any, settings: Any, field: str) -> None:
    model, tok = llama
    before = state(model)
    with pytest.raises(KDPOError, match=r"request 1 has \d+ tokens with its target; the model takes 256 at most"):
        edit(model, tok, [REQUEST, {"prompt": "a", "target_new": "b", field: "species " * 300}], settings())
    assert_same(model, before)


@pytest.mark.parametrize("requests", [[], ()])
def test_no_request_is_refused(llama: Any, settings: Any, requests: Any) -> None:
    with pytest.raises(RequestError, match="must be a list of at least one"):
        check(*llama, requests, settings())


# Targets in any script ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "target", "whole"),
    [
        ("Write a list:", "one\ntwo\n\nthree", "Write a list: one\ntwo\n\nthree"),
        ("Write a list:", "\n- one\n- two", "Write a list:\n- one\n- two"),
        ("法国的首都是", "罗马\n和巴黎", "法国的首都是罗马\n和巴黎"),
        ("日本の首都は", "京都", "日本の首都は京都"),
        ("בירת צרפת היא", "רומא", "בירת צרפת היא רומא"),
        ("เมืองหลวงของไทยคือ", "เชียงใหม่", "เมืองหลวงของไทยคือเชียงใหม่"),
        ("The symbol is", FAMILY, f"The symbol is {FAMILY}"),
    ],
)
def test_targets_of_any_script_are_trained_whole(smol: Any, prompt: str, target: str, whole: str) -> None:  # noqa: F811
    edit = tokens(smol, prompt, target)
    assert said(smol, edit.prompt) + said(smol, edit.chosen) == whole
    assert edit.prompt.tolist() == smol(prompt)["input_ids"]
