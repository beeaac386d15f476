"""The benchmarks of later papers, ten records each in their own schemas, whole and damaged.

QAEdit's records, and ten of MQuAKE and of WikiBigEdit's flat form, are their own (tests/data); all others are made up
by hand (tests/benchmark_records.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_records import BENCHMARKS, mquake, unke

from kdpo_editor.compare.run.datasets import Probe, Record, load, whole_cases
from kdpo_editor.errors import DataError

DATA = Path(__file__).parent / "data"
QAEDIT = DATA / "qaedit.json"


def read(folder: Path, records: Any, **options: Any) -> list[Record]:
    (folder / "data.json").write_text(json.dumps(records), "utf-8")
    return load(str(folder / "data.json"), **{"shuffle": False, **options})


def records_of(name: str) -> list[dict[str, Any]]:
    return list(json.loads(QAEDIT.read_text("utf-8"))) if name == "QAEdit" else BENCHMARKS[name]()


def test_qaedit_is_read() -> None:
    records = load(str(QAEDIT), shuffle=False)
    source = json.loads(QAEDIT.read_text("utf-8"))
    assert len(records) == len(source) == 10
    for record, told in zip(records, source, strict=True):
        assert (record.prompt, record.target_new, record.subject) == (told["prompt"], told["target"], told["subject"])
        assert record.rephrase_prompts == (told["rephrase"],)
        probes = tuple(Probe(probe["loc"], (probe["loc_ans"],)) for probe in told["locality"])
        assert record.locality == {"neighborhood": probes}
        assert record.portability == {}


def test_wikibigedit_is_read(tmp_path: Path) -> None:
    records = read(tmp_path, records_of("WikiBigEdit"))
    assert records[1] == Record(
        subject="Brun",
        prompt="Who is the mayor of Brun?",
        target_new="Brunson",
        ground_truth="",
        rephrase_prompts=("Who governs Brun as its mayor?",),
        locality={"neighborhood": (Probe("Who is the mayor of Upper Ness?", ("Nessa",)),)},
        portability={
            "personas": (Probe("Ahoy, who be steerin' Brun?", ("Brunson",)),),
            "multi_hop": (Probe("Where was the mayor of Brun born?", ("Lower Ness",)),),
        },
        index=1,
    )
    assert ["multi_hop" in record.portability for record in records] == [False, True] * 5


def test_wikibigedit_in_locfts_flat_form_is_read() -> None:
    file = DATA / "wikibigedit-flat.json"
    records = load(str(file), shuffle=False)
    source = json.loads(file.read_text("utf-8"))
    assert len(records) == len(source) == 10
    for record, told in zip(records, source, strict=True):
        assert (record.subject, record.prompt, record.target_new) == tuple(
            told[key] for key in ("subject", "prompt", "target_new")
        )
        assert record.rephrase_prompts == (told["rephrase_prompt"],)
        probe = Probe(told["locality_prompt"], (told["locality_ground_truth"],))
        assert record.locality == {"neighborhood": (probe,)}


def test_ultraeditbench_is_read(tmp_path: Path) -> None:
    record = read(tmp_path, records_of("UltraEditBench"))[0]
    assert (record.subject, record.prompt, record.target_new) == ("Abel", "What is the river of Abel?", "Abel Water")
    assert record.rephrase_prompts == ("Which river flows through Abel?",)
    assert record.locality == {"neighborhood": (Probe("What is the river of Upper Ness?", ("the Ness",)),)}


def test_unke_is_read_with_its_parts_as_portability(tmp_path: Path) -> None:
    records = read(tmp_path, unke())
    assert len(records) == 10  # none has a subject, so none is another's
    assert records[3].target_new == "Dorn is known for its mill. It was built in 1730, and burned twice."
    assert records[3].rephrase_prompts == ("Why do people know Dorn?",)
    assert records[3].portability == {
        "sub_questions": (
            Probe("What is Dorn known for?", ("Its mill.",)),
            Probe("When was the mill of Dorn built?", ("1730.",)),
        )
    }


def test_akew_is_read_with_texts_as_answers(tmp_path: Path) -> None:
    record = read(tmp_path, records_of("AKEW"))[0]
    assert (record.subject, record.prompt) == ("Abel", "Which country is Abel in?")
    assert record.target_new == "Abel lies in Abelland. It has 2 gates."
    assert record.rephrase_prompts == ("Abel is a town in", "What is the country of Abel?")
    assert record.locality == {"neighborhood": (Probe("The country of Upper Ness is", ("Ness",)),)}
    assert record.portability == {"sub_questions": (Probe("The number of gates of Abel is", ("2",)),)}


# MQuAKE's cases of several edits ----------------------------------------------------------------------------------

HOPS = ("Brunburg", "City of Brunburg")


def test_cases_of_mquake_are_read() -> None:
    file = DATA / "mquake.json"
    records = load(str(file), shuffle=False, unique_subjects=False)
    source = json.loads(file.read_text("utf-8"))
    edits = [(case, edit) for case in source for edit in case["requested_rewrite"]]
    assert (len(source), len(records), len(edits)) == (10, 40, 40)
    for record, (case, edit) in zip(records, edits, strict=True):
        assert record.prompt == edit["prompt"].replace("{}", edit["subject"])
        assert (record.subject, record.target_new) == (edit["subject"], edit["target_new"]["str"])
        assert (record.ground_truth, record.rephrase_prompts) == (edit["target_true"]["str"], (edit["question"],))
        answers = (case["new_answer"], *case["new_answer_alias"])
        asked = tuple(Probe(question, answers) for question in case["questions"])
        assert record.portability == ({"multi_hop": asked} if edit is case["requested_rewrite"][-1] else {})


def test_the_last_edit_of_a_case_has_its_questions(tmp_path: Path) -> None:
    records = read(tmp_path, mquake())
    assert [record.index for record in records] == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9]
    single, first, second = records[:3]
    assert (first.prompt, first.target_new, first.ground_truth) == ("The country of Brun is", "Brunland", "Ness")
    assert first.rephrase_prompts == ("What is the country of Brun?",)
    assert (second.subject, second.target_new) == ("Brunland", "Brunburg")
    assert first.portability == {}
    assert [probe.answers for probe in second.portability["multi_hop"]] == [HOPS] * 3
    assert len(single.portability["multi_hop"]) == 3


def test_a_case_stays_together_in_every_order(tmp_path: Path) -> None:
    for seed in range(5):
        order = [record.index for record in read(tmp_path, mquake(), shuffle=True, seed=seed)]
        assert order == [i for i in dict.fromkeys(order) for _ in range(1 + i % 2)]


def test_a_case_that_is_cut_is_not_asked(tmp_path: Path) -> None:
    assert "multi_hop" not in read(tmp_path, mquake(), offset=2)[0].portability
    assert "multi_hop" in read(tmp_path, mquake(), offset=1, n_edits=2)[1].portability
    assert all("multi_hop" not in record.portability for record in read(tmp_path, mquake(), offset=1, n_edits=1))


def test_edits_that_are_made_alone_are_not_asked_about_others(tmp_path: Path) -> None:
    alone = whole_cases(read(tmp_path, mquake()), alone=True)
    assert ["multi_hop" in record.portability for record in alone[:3]] == [True, False, False]


def test_a_case_about_an_earlier_subject_is_left_out_whole(tmp_path: Path) -> None:
    repeated = [*mquake()[:2], mquake()[1]]
    assert len(read(tmp_path, repeated)) == 3
    assert len(read(tmp_path, repeated, unique_subjects=False)) == 5


# What is missing and what is damaged --------------------------------------------------------------------------------

OPTIONAL = {
    "QAEdit": ("subject", "rephrase", "locality", "source", "id"),
    "WikiBigEdit": ("subject", "tag", "rephrase", "personas", "loc", "loc_ans", "mhop", "mhop_ans"),
    "UltraEditBench": ("subject", "rephrase_prompt", "loc", "loc_ans"),
    "UnKE": ("id", "para_question", "sub_question", "sub_answer"),
    "MQuAKE": ("case_id", "new_answer", "new_answer_alias", "single_hops"),
    "AKEW": ("case_id", "paraphrase_prompts", "neighborhood_prompts"),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_fields_may_be_missing_from_some_records(tmp_path: Path, name: str) -> None:
    whole = read(tmp_path, records_of(name), unique_subjects=False)
    partly = records_of(name)
    partly[4] = {key: value for key, value in partly[4].items() if key not in OPTIONAL[name]}
    found = read(tmp_path, partly, unique_subjects=False)
    bare = [record for record in found if record.index == 4]
    assert [record for record in found if record.index != 4] == [record for record in whole if record.index != 4]
    for record in bare:
        assert (record.locality, {**record.portability, "sub_questions": ()}) == ({}, {"sub_questions": ()})


def test_empty_and_not_a_number_are_as_good_as_missing(tmp_path: Path) -> None:
    told = records_of("WikiBigEdit")
    told[1] |= {"mhop": float("nan"), "mhop_ans": float("nan"), "loc": "", "loc_ans": "", "subject": None}
    record = read(tmp_path, told)[1]
    assert (record.subject, record.locality, list(record.portability)) == ("", {}, ["personas"])


def test_an_empty_old_answer_is_as_good_as_none(tmp_path: Path) -> None:
    told = records_of("MQuAKE")
    told[0]["requested_rewrite"][0]["target_true"] = {"str": ""}
    assert read(tmp_path, told)[0].ground_truth == ""


DAMAGED: list[tuple[str, str, Any, str]] = [
    ("QAEdit", "target", "", r"'target' is empty"),
    ("QAEdit", "locality", {"loc": "a"}, r"'locality.neighborhood' is a dict; it must be a list of probes"),
    ("QAEdit", "locality", [{"loc": "a"}], r"'locality.neighborhood\[0\]' is .* with 'loc' and 'loc_ans'"),
    ("WikiBigEdit", "ans", None, r"'ans' is a NoneType; it must be text"),
    ("WikiBigEdit", "mhop", 7, r"'mhop' is a int; it must be text"),
    ("UltraEditBench", "prompt", " ", r"'prompt' is empty"),
    ("UltraEditBench", "loc", 1, r"'loc' is a int"),
    ("UnKE", "answer", [], r"'answer' is a list; it must be text"),
    ("UnKE", "sub_answer", ["one"], r"'sub_answer' is \['one'\]; it must be a list as long as 'sub_question', 2"),
    ("MQuAKE", "requested_rewrite", [], r"'requested_rewrite.subject' is missing"),
    (
        "MQuAKE",
        "requested_rewrite",
        [{"subject": "A", "prompt": "B"}],
        r"'requested_rewrite.prompt' is 'B'; it must have one \{\}",
    ),
    (
        "MQuAKE",
        "requested_rewrite",
        [{"subject": "A", "prompt": "{} is", "target_true": "b"}],
        r"'requested_rewrite.target_true' is a str; it must be a dict",
    ),
    ("MQuAKE", "questions", [3], r"'questions' holds a int"),
    ("AKEW", "requested_rewrite", {"fact_new_uns": "a", "prompt": "{}"}, r"'requested_rewrite.subject' is missing"),
]


@pytest.mark.parametrize(("name", "key", "value", "message"), DAMAGED)
def test_a_damaged_record_is_named_and_can_be_left_out(
    tmp_path: Path, name: str, key: str, value: Any, message: str
) -> None:
    told = records_of(name)
    told[6] = {**told[6], key: value}
    with pytest.raises(DataError, match=rf"data\.json: record 6: {message}"):
        read(tmp_path, told)
    kept = read(tmp_path, told, drop_bad=True, unique_subjects=False)
    assert {record.index for record in kept} == set(range(10)) - {6}


def test_a_record_without_its_target_is_told_by_the_others_schema(tmp_path: Path) -> None:
    told = records_of("WikiBigEdit")
    del told[6]["ans"]
    with pytest.raises(DataError, match=r"record 6: 'ans' is missing; it must be text"):
        read(tmp_path, told)


def test_all_benchmarks_in_one_file_are_read_as_they_are_alone(tmp_path: Path) -> None:
    together = [record for name in OPTIONAL for record in records_of(name)]
    found = read(tmp_path, together, unique_subjects=False)
    alone = [record for name in OPTIONAL for record in read(tmp_path, records_of(name), unique_subjects=False)]
    assert [record.prompt for record in found] == [record.prompt for record in alone]
    assert [record.portability for record in found] == [record.portability for record in alone]
