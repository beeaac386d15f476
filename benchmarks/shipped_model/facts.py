"""Choose the facts that the shipped model is taught, and their phrasings.

Subjects, answers, prompts, rephrasings and locality facts are KnowEdit's (ZsRE and WikiData_recent,
MIT licence); the phrasings below are this project's own, and so are some invented subjects. A fact is
written in many ways, with the subject at the end, in the middle and at the start, because a model that has
seen a fact in one sentence only ties it to the sentence and not to the subject, and no editor can be judged
on it.

    python benchmarks/shipped_model/facts.py --knowedit DIR

reads ``ZsRE-test-all.json`` and ``wiki_recent_test*.json`` from ``DIR`` and writes ``records.json``
into ``kdpo_editor/testbed`` and ``facts.json`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kdpo_editor.testbed import HERE

LOG = logging.getLogger(__name__)
FACTS = Path(__file__).with_name("facts.json")
SEED = 0

# How any relation is asked for by its label, as KnowEdit's locality prompts do.
BY_LABEL = (
    "The {r} of {s} is",
    "{s} {r}",
    "What is the {r} of {s}?",
    "{s}'s {r} is",
    "What is {s}'s {r}?",
    "Name the {r} of {s}.",
    "For {s}, the {r} is",
    "Regarding {s}: its {r} is",
)

# Relations asked by ZsRE's questions: which questions ask it, and phrasings in words of their own.
# The first pattern that matches a question decides, so the order matters.
QUESTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mother": (
        r"mother|gave birth|female parent",
        ("Who is the mother of {s}?", "{s} was born to", "The woman who gave birth to {s} is"),
    ),
    "father": (
        r"father|male parent|\bdad\b",
        ("Who is the father of {s}?", "{s} was fathered by", "The man who fathered {s} is"),
    ),
    "spouse": (
        r"spouse|married|wife|husband|marry",
        ("Who is {s} married to?", "{s} is married to", "The person who married {s} is"),
    ),
    "sibling": (
        r"sister|brother|sibling",
        ("Who is a sibling of {s}?", "{s} is a sibling of", "{s} has a sibling named"),
    ),
    "conservation status": (
        r"status|endangered|iucn",
        ("How endangered is {s}?", "{s} is listed as", "The species {s} is considered"),
    ),
    "constellation": (
        r"constellation",
        ("In which constellation is {s}?", "{s} lies in", "{s} is part of the constellation"),
    ),
    "record label": (
        r"label",
        ("Which label released {s}?", "{s} is released by", "The label that issued {s} is"),
    ),
    "voice type": (
        r"voice|vocal|\btone\b",
        ("What kind of voice has {s}?", "{s} sings as", "The voice of {s} is"),
    ),
    "named after": (
        r"named (after|for)|namesake",
        ("Who or what is {s} named after?", "{s} takes its name from", "The namesake of {s} is"),
    ),
    "conflict": (
        r"\bwar\b|\bbattle\b",
        ("In which war did {s} fight?", "{s} fought in", "{s} took part in"),
    ),
    "educated at": (
        r"universit|college|alma mater|educat",
        ("Where did {s} study?", "{s} studied at", "{s} is a graduate of"),
    ),
    "member of sports team": (
        r"sports team|what team|which team|team did|team is",
        ("Which team does {s} play for?", "{s} plays for", "The team of {s} is"),
    ),
    "family": (
        r"famil",
        ("Which family does {s} belong to?", "{s} belongs to", "{s} is in the family"),
    ),
    "publisher": (
        r"publish",
        ("Who published {s}?", "{s} was published by", "The company that published {s} is"),
    ),
    "director": (
        r"direct",
        ("Who directed {s}?", "{s} was directed by", "The person who directed {s} is"),
    ),
    "architect": (
        r"architect|design",
        ("Who designed {s}?", "{s} was designed by", "The person who designed {s} is"),
    ),
    "located in the administrative territorial entity": (
        r"(what|which|the) (state|county|province)",
        ("In which state is {s}?", "{s} is located in", "The state that has {s} is"),
    ),
    "position held": (
        r"position",
        ("Which office did {s} hold?", "{s} served as", "{s} held the office of"),
    ),
    "manufacturer": (
        r"manufactur",
        ("Who made {s}?", "{s} was made by", "The company that made {s} is"),
    ),
}
MOST_PER_RELATION = 40
# Relations that one and the same subject can have.
KINDS = {
    "person": (
        "mother", "father", "spouse", "sibling", "voice type", "conflict", "educated at", "member of sports team",
        "position held",
    ),
    "work": ("record label", "publisher", "director", "named after"),
    "living being": ("family", "conservation status"),
    "star": ("constellation",),
    "building": ("architect", "located in the administrative territorial entity", "manufacturer"),
}  # fmt: skip

# WikiData_recent's prompts, by the label of the relation they ask.
STATEMENTS: dict[str, str] = {
    "sex or gender": "The gender of {s} is",
    "occupation": "The occupation of {s} is",
    "country of citizenship": "The name of the country of citizenship of {s} is",
    "place of birth": "The place of birth of {s} is",
    "place of death": "The place of death of {s} is",
    "educated at": "The name of the alma mater of {s} is",
    "father": "The name of the father of {s} is",
    "mother": "The name of the mother of {s} is",
    "spouse": "The name of the spouse of {s} is",
    "child": "The name of the child of {s} is",
    "sibling": "The names of the siblings of {s} are",
    "position held": "The name of the position held by {s} is",
    "place of burial": "The place of burial of {s} is",
    "employer": "The name of the employer of {s} is",
    "religion": "The name of the religion which {s} is associated with is",
    "director": "The name of the director of {s} is",
    "composer": "The name of the composer of {s} is",
    "country": "The name of the country which {s} is associated with is",
}


def relation_of(question: str) -> str | None:
    """The relation that a ZsRE question asks, or ``None`` if it is none of :data:`QUESTIONS`."""
    for relation, (pattern, _) in QUESTIONS.items():
        if re.search(pattern, question, re.IGNORECASE):
            return relation
    return None


def phrasings(subject: str, relation: str) -> list[str]:
    """Every phrasing of this project's own for ``relation`` of ``subject``."""
    own = QUESTIONS[relation][1] if relation in QUESTIONS else ()
    return [p.format(s=subject, r=relation) for p in (*BY_LABEL, *own)]


def clean(text: str) -> str:
    """``text`` with single spaces, and none at its ends."""
    return re.sub(r"\s+", " ", text).strip()


def first_answer(ground_truth: Any) -> str:
    """The first of answers that are listed at any depth, ``""`` where there is none."""
    while isinstance(ground_truth, list):
        if not ground_truth:
            return ""
        ground_truth = ground_truth[0]
    return clean(str(ground_truth))


def plain(text: str) -> bool:
    """Whether an answer is short and ASCII, as all that the model is taught are."""
    return 0 < len(text) <= 32 and text.isascii()


def usable_record(record: dict[str, Any]) -> dict[str, Any] | None:
    """One ZsRE record with clean text, or ``None`` where it cannot be taught or edited fairly.

    Left out: a subject that is missing from a prompt, an answer that is the new target already, old
    and new answers of very different length, and locality facts about the edited relation itself.
    """
    subject = clean(record["subject"])
    prompt, rephrase = clean(record["prompt"]), clean(record["rephrase_prompt"])
    old, new = first_answer(record["ground_truth"]), clean(record["target_new"])
    relation = relation_of(prompt.replace(subject, "X"))
    if relation is None or relation_of(rephrase.replace(subject, "X")) != relation:
        return None
    if not all(map(plain, (subject, old, new))) or subject not in prompt or subject not in rephrase:
        return None
    if old.lower() == new.lower() or abs(len(old) - len(new)) > 12:
        return None
    facts = [
        {"prompt": clean(f["prompt"]), "ground_truth": first_answer(f["ground_truth"])}
        for f in record["locality"]["Relation_Specificity"]
    ]
    label = re.fullmatch(rf"The (.+) of {re.escape(subject)} is", facts[0]["prompt"])
    if not label or label[1] == relation or len(label[1]) > 50:
        return None
    if any(
        not plain(f["ground_truth"]) or f["ground_truth"] in (old, new) or subject not in f["prompt"] for f in facts
    ):
        return None
    return {
        "subject": subject,
        "relation": relation,
        "prompt": prompt,
        "rephrase_prompt": rephrase,
        "target_new": new,
        "ground_truth": old,
        "locality": facts,
        "locality_relation": label[1],
    }


def choose_records(zsre: Iterable[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """At most one record a subject and :data:`MOST_PER_RELATION` a relation, in a seeded order."""
    records = list(filter(None, map(usable_record, zsre)))
    rng.shuffle(records)
    chosen, taken, subjects = [], Counter[str](), set[str]()
    for record in records:
        if record["subject"] in subjects or taken[record["relation"]] >= MOST_PER_RELATION:
            continue
        subjects.add(record["subject"])
        taken[record["relation"]] += 1
        chosen.append(record)
    return chosen


def recent_facts(
    recent: Iterable[dict[str, Any]], taken: set[str], rng: random.Random, most: int
) -> Iterator[tuple[str, str, str, str]]:
    """``(subject, relation, answer, prompt)`` for ``most`` subjects of four or five facts each."""
    subjects = 0
    pool = list(recent)
    rng.shuffle(pool)
    for record in pool:
        subject = clean(record["subject"])
        if subject in taken or not plain(subject) or subjects == most:
            continue
        known = {}
        for fact in record["locality"].get("Relation_Specificity", []):
            answer = first_answer(fact["ground_truth"])
            for relation, prompt in STATEMENTS.items():
                if fact["prompt"] == prompt.format(s=record["subject"]) and plain(answer):
                    known[relation] = (subject, relation, answer, clean(fact["prompt"]))
        if len(known) >= 4:
            taken.add(subject)
            subjects += 1
            yield from rng.sample(sorted(known.values()), min(5, len(known)))


def invented_facts(
    records: list[dict[str, Any]], taken: set[str], rng: random.Random
) -> Iterator[tuple[str, str, str]]:
    """``(subject, relation, answer)`` that make every record's new target the answer of some invented subject.

    A large model can say any name it is edited to say. A small one can say only what it was taught to, and
    editors that work through what the model can say already (ROME, MEMIT) would fail for that reason alone.
    """
    open_: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}
    for record in records:
        kind = next(k for k, relations in KINDS.items() if record["relation"] in relations)
        open_[kind].append((record["relation"], record["target_new"]))
    for facts in open_.values():
        while facts:
            subject = " ".join(
                "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))).title()
                for _ in range(2)
            )
            if subject in taken:
                continue
            taken.add(subject)
            known: dict[str, str] = {}
            for relation, answer in list(facts):
                if relation not in known and len(known) < 3:
                    known[relation] = answer
                    facts.remove((relation, answer))
            yield from ((subject, relation, answer) for relation, answer in known.items())


def choose_facts(
    records: list[dict[str, Any]], recent: Iterable[dict[str, Any]], rng: random.Random
) -> list[dict[str, Any]]:
    """Facts as ``{source, subject, relation, answer, trained, held_out}``; the last two are prompts.

    A third of the ZsRE subjects keep back their rephrasing and three more phrasings of each fact; the
    others are taught in every phrasing. The record's own prompt and locality prompts are always taught.
    """
    facts = []

    def add(
        source: str, subject: str, relation: str, answer: str, fixed: list[str], own: list[str], hold: bool = False
    ) -> None:
        others = [p for p in dict.fromkeys(own + phrasings(subject, relation)) if p not in fixed]
        back = own[:1] + rng.sample([p for p in others if p not in own], 3) if hold else []
        trained = list(dict.fromkeys(fixed + [p for p in others if p not in back]))
        if source == "invented":
            trained = rng.sample(trained, 6)
        fact = {"source": source, "subject": subject, "relation": relation, "answer": answer}
        facts.append({**fact, "trained": trained, "held_out": back})

    for i, r in enumerate(records):
        hold = i % 3 == 0
        add("zsre", r["subject"], r["relation"], r["ground_truth"], [r["prompt"]], [r["rephrase_prompt"]], hold)
        fixed = [f["prompt"] for f in r["locality"]]
        add("zsre", r["subject"], r["locality_relation"], r["locality"][0]["ground_truth"], fixed, [], hold)
    taken = {r["subject"] for r in records}
    for subject, relation, answer, prompt in recent_facts(recent, taken, rng, 80):
        add("recent", subject, relation, answer, [prompt], [])
    for subject, relation, answer in invented_facts(records, taken, rng):
        add("invented", subject, relation, answer, [], [])
    return facts


def main() -> None:
    """Choose records and facts, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--knowedit", type=Path, required=True, help="folder of KnowEdit's JSON files")
    folder = parser.parse_args().knowedit
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rng = random.Random(SEED)
    recent_file = next(iter(sorted(folder.glob("wiki_recent_test*.json"))))
    records = choose_records(json.loads((folder / "ZsRE-test-all.json").read_text("utf-8")), rng)
    facts = choose_facts(records, json.loads(recent_file.read_text("utf-8")), rng)
    (HERE / "records.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", "utf-8")
    FACTS.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8")
    LOG.info("%d records, %d facts, %d prompts", len(records), len(facts), sum(len(f["trained"]) for f in facts))
    LOG.info("%s", Counter(r["relation"] for r in records).most_common())


if __name__ == "__main__":
    main()
