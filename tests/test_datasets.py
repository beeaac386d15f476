"""Benchmarks of every schema become the same records; what is wrong with a file is named."""

from __future__ import annotations

import json
import logging
import lzma
import os
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from kdpo_editor.compare.run.datasets import KNOWN, Probe, Record, content_hash, load
from kdpo_editor.errors import DataError, KDPOError

DATA = Path(__file__).parent / "data"
FLAT = {"subject": "Rome", "prompt": "Rome is in", "target_new": "France"}


def excerpt(name: str, **options: Any) -> list[Record]:
    """The records of one committed excerpt, in file order, all of them."""
    options = {"shuffle": False, "unique_subjects": False, **options}
    return load(str(DATA / f"{name}.json"), **options)


def raw(name: str) -> list[dict[str, Any]]:
    return list(json.loads((DATA / f"{name}.json").read_text("utf-8")))


def write(folder: Path, records: Any, name: str = "data.json") -> str:
    file = folder / name
    file.write_text(json.dumps(records), "utf-8")
    return str(file)


def cities(n: int) -> list[dict[str, Any]]:
    return [{**FLAT, "subject": f"City {i}", "prompt": f"City {i} is in"} for i in range(n)]


def test_knowedit_zsre_is_read() -> None:
    record = excerpt("knowedit-zsre")[0]
    assert record == Record(
        subject="Epaspidoceras",
        prompt="Which family does Epaspidoceras belong to?",
        target_new="Noctuidae",
        ground_truth="Aspidoceratidae",
        rephrase_prompts=("What family are Epaspidoceras?",),
        locality={
            "Relation_Specificity": (
                Probe("The taxon rank of Epaspidoceras is", ("genus",)),
                Probe("Epaspidoceras taxon rank", ("genus",)),
            )
        },
        portability={
            "Reasoning": (Probe("What is the common name for the family Epaspidoceras belongs to?", ("Owlet moths",)),)
        },
        index=0,
    )


def test_spaces_at_the_ends_of_text_go() -> None:
    assert raw("knowedit-zsre")[2]["subject"] == "Angora goat "
    assert raw("knowedit-zsre")[2]["target_new"] == " Angora"
    record = excerpt("knowedit-zsre")[2]
    assert (record.subject, record.target_new) == ("Angora goat", "Angora")
    assert record.portability["Subject_Aliasing"][0].answers == ("Angora",)
    assert raw("knowedit-wikibio")[2]["text"].endswith(" ")
    assert excerpt("knowedit-wikibio")[2].prompt.endswith("tim finchem.")


def test_aliases_and_several_right_answers_are_all_accepted() -> None:
    source = raw("knowedit-counterfact")[1]["locality"]["Relation_Specificity"]
    probes = excerpt("knowedit-counterfact")[1].locality["Relation_Specificity"]
    assert any(len(probe["ground_truth"]) > 1 for probe in source)
    for probe, read in zip(source, probes, strict=True):
        assert read.prompt == probe["prompt"]
        assert read.answers == tuple(dict.fromkeys(alias for value in probe["ground_truth"] for alias in value))


def test_a_prompt_repeated_for_each_right_answer_is_one_probe() -> None:
    asked = "The official language of the place of birth of Bob Edmond is"
    assert [probe["prompt"] for probe in raw("knowedit-recent")[0]["portability"]["Reasoning"]].count(asked) == 3
    probes = excerpt("knowedit-recent")[0].portability["Reasoning"]
    assert [p.answers for p in probes if p.prompt == asked] == [("English", "Scottish Gaelic", "Scots")]


def test_a_portability_probe_without_an_answer_is_absent() -> None:
    unanswered = Probe("The name of the father of Halle Bailey is", ())
    asked = raw("knowedit-counterfact")[0]["portability"]["Logical_Generalization"]
    assert {"prompt": unanswered.prompt, "ground_truth": [[]]} in asked
    probes = excerpt("knowedit-counterfact")[0].portability["Logical_Generalization"]
    assert len(probes) == len(asked) - 1
    assert unanswered not in probes


def test_a_locality_probe_without_an_answer_is_kept() -> None:
    probes = excerpt("knowedit-counterfact")[2].locality["Relation_Specificity"]
    assert Probe("2022 ATP Finals is followed by", ()) in probes


def test_wikidata_recent_has_no_old_answer() -> None:
    assert [record.ground_truth for record in excerpt("knowedit-recent")] == ["", ""]


def test_wikibio_continues_a_text() -> None:
    source, record = raw("knowedit-wikibio")[0], excerpt("knowedit-wikibio")[0]
    assert (record.subject, record.prompt, record.target_new) == (source["concept"], source["text"], source["labels"])
    assert record.subject_in_prompt
    assert (record.rephrase_prompts, record.portability) == ((), {})


def test_flat_counterfact_is_read() -> None:
    record = excerpt("counterfact-flat")[0]
    assert (record.prompt, record.target_new, record.ground_truth) == ("BBC One, by", "Sega", "BBC")
    assert record.rephrase_prompts == ("BBC One is my favorite product out of everything owned by",)
    assert record.locality == {"neighborhood": (Probe("BBC Radio, by", ("BBC",)),)}
    assert record.portability == {}


def test_flat_portability_may_be_one_question_or_a_list(tmp_path: Path) -> None:
    one = {**FLAT, "portability_prompt": "Rome's river is", "portability_ground_truth": "the Seine"}
    two = {**FLAT, "portability_prompt": ["a", "b"], "portability_ground_truth": ["c", ["d", "e"]]}
    records = load(write(tmp_path, [one, two]), shuffle=False, unique_subjects=False)
    assert records[0].portability == {"one_hop": (Probe("Rome's river is", ("the Seine",)),)}
    assert records[1].portability == {"one_hop": (Probe("a", ("c",)), Probe("b", ("d", "e")))}


def test_the_packages_counterfact_is_read() -> None:
    names = ("counterfact", "counterfact-validation", "counterfact-known")
    test, validation, known = splits = [load(name, shuffle=False) for name in names]
    assert (len(test), len(validation), len(known)) == (2948, 859, 1597)
    for one, other in combinations(splits, 2):
        assert not {r.subject.casefold() for r in one} & {r.subject.casefold() for r in other}
        assert not {r.prompt for r in one} & {r.prompt for r in other}
    for record in chain(*splits):
        assert record.ground_truth
        assert len(record.rephrase_prompts) == 1
        assert [len(probes) for probes in record.locality.values()] == [1]
    first = test[0]
    assert (first.prompt, first.target_new, first.ground_truth) == ("Reedy Glacier is in", "Asia", "Antarctica")
    assert first.subject_in_prompt
    assert first.rephrase_prompts[0].endswith("Reedy Glacier is located in the continent")
    assert first.locality == {"neighborhood": (Probe("Mount Erebus, in", ("Antarctica",)),)}


@pytest.mark.parametrize("name", ["data.json.xz", "data.jsonl.xz"])
def test_compressed_files_are_read(tmp_path: Path, name: str) -> None:
    lines = "\n".join(json.dumps(record) for record in cities(3)) if "jsonl" in name else json.dumps(cities(3))
    (tmp_path / name).write_bytes(lzma.compress(lines.encode()))
    assert [record.subject for record in load(str(tmp_path / name), shuffle=False)] == ["City 0", "City 1", "City 2"]


def test_a_damaged_compressed_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.json.xz").write_bytes(b"not xz")
    with pytest.raises(DataError, match=r"data\.json\.xz cannot be read"):
        load(str(tmp_path / "data.json.xz"))


def test_counterfact_as_published_is_read() -> None:
    record = excerpt("counterfact")[0]
    assert (record.prompt, record.target_new, record.ground_truth) == (
        "Spike Hughes originates from",
        "Philadelphia",
        "London",
    )
    assert len(record.rephrase_prompts) == 2
    assert record.locality["neighborhood"][0] == Probe("Max Mosley originates from", ("London",))
    assert len(record.locality["neighborhood"]) == 10
    assert [probe.answers for probe in record.portability["one_hop"]] == [("Cheesesteaks",)]


def test_a_neighbour_named_twice_is_asked_once() -> None:
    assert len(raw("counterfact")[1]["neighborhood_prompts"]) == 10
    assert len(excerpt("counterfact")[1].locality["neighborhood"]) == 9


def test_mend_zsre_is_read_with_the_prefix_of_its_locality_prompts() -> None:
    record = excerpt("mend-zsre")[0]
    assert (record.subject, record.prompt, record.target_new) == ("WEAL", "What city is WEAL located?", "Huntington")
    assert record.locality["neighborhood"][0].prompt == "nq question: who produced a change is gonna come"


def test_mend_zsre_without_subjects_is_read_and_kept_whole(tmp_path: Path) -> None:
    records = [{key: value for key, value in record.items() if key != "subject"} for record in raw("mend-zsre")]
    read = load(write(tmp_path, records))
    assert [record.subject for record in read] == [""] * 3
    assert not any(record.subject_in_prompt for record in read)


def test_the_shipped_records_are_read() -> None:
    records = load("shipped")
    assert len(records) == 301
    assert all(record.subject_in_prompt and record.ground_truth for record in records)
    assert all(len(record.locality["same_subject"]) == 2 for record in records)


def test_lines_are_read_as_a_list_is(tmp_path: Path) -> None:
    records = raw("knowedit-zsre")
    file = tmp_path / "data.jsonl"
    file.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n", "utf-8")
    assert load(str(file), shuffle=False) == excerpt("knowedit-zsre")


def test_a_subject_that_is_not_in_the_prompt_is_told(tmp_path: Path) -> None:
    (record,) = load(write(tmp_path, [{**FLAT, "subject": "Roma"}]))
    assert not record.subject_in_prompt


@pytest.mark.parametrize("seed", [0, 1])
def test_fewer_edits_are_a_prefix_of_more(tmp_path: Path, seed: int) -> None:
    source = write(tmp_path, cities(30))
    every = load(source, seed=seed)
    assert sorted(record.index for record in every) == list(range(30))
    assert load(source, seed=seed, n_edits=5) == every[:5]
    assert load(source, seed=seed, n_edits=20) == every[:20]
    assert load(source, seed=seed, n_edits=5, offset=10) == every[10:15]
    assert load(source, seed=seed, offset=25) == every[25:]


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    source = write(tmp_path, cities(30))
    assert load(source, seed=1) == load(source, seed=1)
    assert load(source, seed=1) != load(source, seed=2)
    assert [record.index for record in load(source, shuffle=False)] == list(range(30))


def test_the_first_edit_of_each_subject_in_the_order_is_kept(tmp_path: Path) -> None:
    source = write(tmp_path, cities(10) * 3)
    every = load(source, unique_subjects=False)
    kept = load(source)
    assert len(every) == 30
    assert [record.subject for record in kept] == list(dict.fromkeys(record.subject for record in every))
    assert all(record == next(r for r in every if r.subject == record.subject) for record in kept)


def test_the_content_hash_follows_content_and_order(tmp_path: Path) -> None:
    records = excerpt("knowedit-zsre")
    first = content_hash(records)
    assert len(first) == 64
    assert content_hash(excerpt("knowedit-zsre")) == first
    assert content_hash(records[::-1]) != first
    changed = raw("knowedit-zsre")
    changed[2]["portability"]["Subject_Aliasing"][0]["ground_truth"] = "Ankara"
    assert content_hash(load(write(tmp_path, changed), shuffle=False)) != first


BAD: list[tuple[str, str, Any, str]] = [
    # excerpt, path to the value, what to put there (None: take it away), the complaint
    ("knowedit-zsre", "prompt", None, r"'prompt' is missing; it must be text"),
    ("knowedit-zsre", "subject", 7, r"'subject' holds a int; it must be text"),
    ("knowedit-zsre", "target_new", " ", r"'target_new' is empty; it must be text"),
    ("knowedit-zsre", "target_new", ["a"], r"'target_new' is a list; it must be text"),
    ("knowedit-zsre", "ground_truth", [7], r"'ground_truth' holds a int; it must be text or a list of text"),
    ("knowedit-zsre", "rephrase_prompt", {}, r"'rephrase_prompt' holds a dict"),
    ("knowedit-zsre", "locality", 7, r"'locality' is a int; it must be a dict of lists of probes"),
    ("knowedit-zsre", "locality/Relation_Specificity", "a", r"'locality.Relation_Specificity' is a str; .* a list"),
    ("knowedit-zsre", "locality/Relation_Specificity/1", "a", r"'locality.Relation_Specificity\[1\]' is 'a'; .* dict"),
    (
        "knowedit-zsre",
        "locality/Relation_Specificity/1/ground_truth",
        None,
        r"'locality.Relation_Specificity\[1\]' is .*it must be a dict with 'prompt' and 'ground_truth'",
    ),
    (
        "knowedit-zsre",
        "locality/Relation_Specificity/0/ground_truth",
        [["genus", 1.5]],
        r"'locality.Relation_Specificity\[0\].ground_truth' holds a float",
    ),
    ("knowedit-zsre", "portability", "a", r"'portability' is a str"),
    ("knowedit-zsre", "portability/Reasoning/0/prompt", "", r"'portability.Reasoning\[0\].prompt' is empty"),
    ("knowedit-wikibio", "concept", 3, r"'concept' holds a int; it must be text"),
    ("knowedit-wikibio", "labels", "", r"'labels' is empty"),
    ("knowedit-wikibio", "locality", 1, r"'locality' is a int"),
    ("counterfact-flat", "locality_prompt", 5, r"'locality_prompt' is a int; it must be text"),
    (
        "counterfact-flat",
        "locality_prompt",
        ["a", "b"],
        r"'locality_ground_truth' is 'politician'.* list as long as .*, 2",
    ),
    ("counterfact", "requested_rewrite/subject", None, r"'requested_rewrite.subject' is missing"),
    (
        "counterfact",
        "requested_rewrite/prompt",
        "Paris",
        r"'requested_rewrite.prompt' is 'Paris'; it must have one \{\}",
    ),
    ("counterfact", "requested_rewrite/target_new", "a", r"'requested_rewrite.target_new.str' is missing"),
    ("counterfact", "requested_rewrite", [], r"'requested_rewrite.subject' is missing"),
    ("counterfact", "neighborhood_prompts", [None, 1], r"'neighborhood_prompts' holds a int"),
    ("counterfact", "portability", "a", r"'portability' is a str; it must be a dict with 'New Question'"),
    ("counterfact", "portability/New Question", None, r"'New Question' is a NoneType"),
    ("mend-zsre", "alt", "", r"'alt' is empty"),
    ("mend-zsre", "src", None, r"'src' is missing"),
    ("mend-zsre", "answers", {"a": 1}, r"'answers' holds a dict"),
    ("mend-zsre", "loc", ["a"], r"'loc_ans' is .* it must be a list as long as 'loc', 1"),
]


@pytest.mark.parametrize(("name", "path", "value", "message"), BAD)
def test_a_bad_record_is_named_and_can_be_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, path: str, value: Any, message: str
) -> None:
    records = raw(name)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    holder: Any = records[1]
    for key in parents:
        holder = holder[key]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    source = write(tmp_path, records)
    with pytest.raises(DataError, match=rf"data\.json: record 1: {message}") as caught:
        load(source)
    assert isinstance(caught.value, KDPOError)

    with caplog.at_level(logging.WARNING):
        kept = load(source, drop_bad=True, shuffle=False, unique_subjects=False)
    assert [record.index for record in kept] == [i for i in range(len(records)) if i != 1]
    assert f"1 of {len(records)} records are malformed and skipped: record 1: " in caplog.text


def test_a_record_that_is_no_dict_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"record 1: is a str; it must be a dict"):
        load(write(tmp_path, [FLAT, "Rome"]))


def test_only_the_first_few_dropped_records_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path, [*cities(2), *[{**FLAT, "target_new": ""}] * 5])
    assert len(load(source, drop_bad=True)) == 2
    assert "5 of 7 records" in caplog.text
    assert "record 4" in caplog.text
    assert "record 5" not in caplog.text


def test_a_file_of_mixed_schemas_is_read_record_by_record(tmp_path: Path) -> None:
    names = ("knowedit-zsre", "mend-zsre", "counterfact", "knowedit-wikibio")
    source = write(tmp_path, [record for name in names for record in raw(name)])
    mixed = load(source, shuffle=False, unique_subjects=False)
    alone = [record for name in names for record in excerpt(name)]
    assert [replace(record, index=0) for record in mixed] == [replace(record, index=0) for record in alone]


def test_an_unknown_schema_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no record has the keys of a known schema, .*MEND's zsRE: src, alt"):
        load(write(tmp_path, [{"query": "a", "answer": "b"}]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", b"[{", r"data\.json is not JSON"),
        ("data.json", b"", r"data\.json is not JSON"),
        ("data.json", b"[]", r"data\.json is empty; it must hold at least one record"),
        ("data.json", b'{"a": 1}', r"data\.json holds a dict; it must be a list of records, or \.jsonl lines"),
        ("data.json", b"\xff\xfe[", r"data\.json cannot be read as UTF-8 text"),
        ("data.jsonl", b'{"a": 1}\n{"a"\n', r"data\.jsonl: line 2 is not JSON"),
        ("data.jsonl", b"\n", r"data\.jsonl is empty"),
    ],
)
def test_a_file_that_holds_no_records_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / name))


@pytest.mark.parametrize("source", ["zsree", "no/such/file.json", "."])
def test_a_source_that_is_no_file_is_named_with_the_known_ones(source: str) -> None:
    packaged = "shipped, counterfact, counterfact-validation, counterfact-known"
    names = f"{packaged}, zsre, wiki_counterfact, recent, wikibio, wikibigedit"
    with pytest.raises(DataError, match=f"'{source}' is no file; .*{names}"):
        load(source)


@pytest.mark.parametrize("source", ["hub:zjunlp/KnowEdit", "hub:KnowEdit:a.json", "hub:"])
def test_a_malformed_hub_source_is_named(source: str) -> None:
    with pytest.raises(DataError, match=rf"'{source}' is not allowed; it must be hub:<owner/name>:<path"):
        load(source)


def test_an_unreachable_hub_is_named_and_a_local_file_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        DataError, match=r"did not give '.*ZsRE-test-all.json' of the data set 'zjunlp/KnowEdit'.*local copy"
    ):
        load("zsre")


def test_every_known_source_is_a_hub_file() -> None:
    for source in KNOWN.values():
        scheme, repo, path = source.split(":")
        assert (scheme, repo) in [("hub", "zjunlp/KnowEdit"), ("hub", "lukasthede/WikiBigEdit")]
        assert path.endswith(".json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_edits": 5}, r"5 edits from position 0 on were asked for, but it has 4 usable records with distinct"),
        ({"n_edits": 3, "offset": 2}, r"3 edits from position 2 on .* has 4 usable records"),
        ({"offset": 4}, r"all edits from position 4 on .* has 4 usable records"),
        ({"n_edits": 9, "unique_subjects": False}, r"has 8 usable records$"),
        ({"n_edits": 0}, r"n_edits: 0 is not allowed; it must be at least 1"),
        ({"offset": -1}, r"offset: -1 is not allowed; it must be 0 or more"),
    ],
)
def test_more_edits_than_there_are_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = write(tmp_path, cities(4) * 2)
    with pytest.raises(DataError, match=message):
        load(source, **options)


def test_rephrasings_of_flat_records_have_either_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps(
            [{"prompt": "A is", "target_new": "b", "rephrase_prompt": "What is A?", "rephrase": ["A, that is", ""]}]
        )
    )
    assert load(str(tmp_path / "a.json"))[0].rephrase_prompts == ("What is A?", "A, that is")


@pytest.mark.skipif("KDPO_DATA" not in os.environ, reason="KDPO_DATA names no folder with full benchmark files")
def test_full_benchmarks_are_read_whole() -> None:
    files = sorted(Path(os.environ["KDPO_DATA"]).rglob("*.json"))
    assert files
    for file in files:
        total = len(json.loads(file.read_text("utf-8")))
        records = load(str(file), unique_subjects=False, shuffle=False)
        assert list(dict.fromkeys(record.index for record in records)) == list(range(total)), file
        for record in records:
            texts = [record.prompt, record.target_new, *record.rephrase_prompts]
            for probe in [p for group in (record.locality, record.portability) for ps in group.values() for p in ps]:
                texts += [probe.prompt, *probe.answers]
            assert all(text and text == text.strip() for text in texts), (file, record.index)
            assert all(probe.answers for probes in record.portability.values() for probe in probes)
