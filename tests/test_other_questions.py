"""Other questions about edited subjects: what is asked, and what an answer with the new answer counts for."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from comparing import CHECKOUT, HAS_PYPI, composed, figures

from kdpo_editor.compare.run.datasets import load
from kdpo_editor.compare.run.other_questions import other_questions
from kdpo_editor.errors import HyperParamsError

RECORDS = load("counterfact", n_edits=40)


def long_words(text: str) -> set[str]:
    return set(re.findall(r"\w{4,}", text.casefold()))


def test_something_else_is_asked_about_each_subject() -> None:
    found = other_questions(RECORDS, 3)
    assert [i for i, _ in found] == [i for i in range(40) for _ in range(3)]
    assert len({question.prompt for _, question in found}) == len(found)
    for i, question in found:
        record = RECORDS[i]
        assert question.subject == record.subject
        assert question.subject in question.prompt
        assert question.ground_truth == record.target_new
        asked = long_words(question.prompt.replace(record.subject, " "))
        assert not asked & long_words(record.prompt.replace(record.subject, " "))
        assert not asked & long_words(" ".join(record.rephrase_prompts))


def test_the_same_records_get_the_same_questions() -> None:
    assert other_questions(RECORDS, 5) == other_questions(RECORDS, 5)
    assert other_questions(RECORDS, 5) != other_questions(RECORDS, 5, seed=1)


def test_a_prompt_without_its_subject_is_left_out() -> None:
    records = [replace(RECORDS[0], subject=""), *RECORDS[1:]]
    found = other_questions(records, 3)
    assert {i for i, _ in found} == set(range(1, 40))
    assert not any(records[0].prompt in question.prompt for _, question in found)


def test_there_may_be_fewer_than_were_asked_for() -> None:
    assert len(other_questions(RECORDS[:1], 5)) == 0
    assert 0 < len(other_questions(RECORDS[:4], 5)) <= 4 * 3


def test_fewer_than_none_is_refused(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.cell import run

    with pytest.raises(HyperParamsError, match=r"protocol\.other_questions: -1 is not allowed; it must be 0 or more"):
        run(composed(tmp_path, "protocol.other_questions=-1"))
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.skipif(not HAS_PYPI and not CHECKOUT, reason="no form of EasyEdit is installed")
def test_a_model_that_says_the_new_answer_whenever_its_subject_is_named_overreaches(tmp_path: Path) -> None:
    """The late layers of a small model, trained through all tokens at a high rate, answer everything alike."""
    from kdpo_editor.compare.run.cell import run

    asked = ["protocol.other_questions=4", "protocol.known=0", "n_edits=4"]
    shares = {}
    for name, settings in (
        ("unedited", ["method=unedited"]),
        ("edited", ["method.hparams.lr=5e-3", "method.hparams.margin=20.0", "method.hparams.stop_loss=0.0"]),
    ):
        cell = run(composed(tmp_path / name, *asked, *settings))
        assert cell.manifest()["status"] == "complete", (cell.folder / "run.log").read_text("utf-8")
        found = figures(cell.folder).query("metric == 'overreach'")
        assert list(zip(found["when"], found["checkpoint"], strict=True)) == [
            ("pre", 0),
            ("checkpoint", 2),
            ("checkpoint", 4),
        ]
        shares[name] = list(found["value"])
    assert shares["unedited"] == [0, 0, 0]
    assert shares["edited"][0] == 0 < shares["edited"][-1] <= 1
