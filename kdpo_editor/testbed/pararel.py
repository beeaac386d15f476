"""Facts, phrasings and records of the second model: ParaRel's, beside the KnowEdit facts of the shipped one.

Subjects and answers are T-REx's triples as ParaRel has them, of 28 relations; phrasings are ParaRel's patterns that end
with the answer, a question of this project's own, and the relation's label. Only answers that several subjects of a
relation share are taught, so that every new target of a record is one that the model gives of other subjects already.

    python -m kdpo_editor.testbed.pararel --pararel DIR

reads ``triples`` and ``patterns`` from ``DIR`` and writes ``pararel.json`` beside this file (its sources and licences:
``pararel.LICENSE``). :func:`build` makes records and taught facts of that file.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from .facts import BY_LABEL, HERE, SEED, plain

LOG = logging.getLogger(__name__)

# Wikidata's property: the label by which BY_LABEL asks, and a question.
RELATIONS: dict[str, tuple[str, str]] = {
    "P17": ("country", "In which country is {s}?"),
    "P19": ("place of birth", "Where was {s} born?"),
    "P20": ("place of death", "Where did {s} die?"),
    "P27": ("country of citizenship", "Which country is {s} a citizen of?"),
    "P30": ("continent", "On which continent is {s}?"),
    "P37": ("official language", "Which language is official in {s}?"),
    "P39": ("position held", "Which office did {s} hold?"),
    "P101": ("field of work", "In which field does {s} work?"),
    "P103": ("native language", "Which language did {s} grow up with?"),
    "P106": ("occupation", "What does {s} do for a living?"),
    "P108": ("employer", "Who employs {s}?"),
    "P127": ("owner", "Who owns {s}?"),
    "P131": ("administrative area", "In which administrative area is {s}?"),
    "P140": ("religion", "Which religion does {s} follow?"),
    "P159": ("headquarters", "Where is {s} based?"),
    "P176": ("manufacturer", "Who makes {s}?"),
    "P178": ("developer", "Who developed {s}?"),
    "P276": ("location", "Where is {s}?"),
    "P279": ("superclass", "What kind of thing is {s}?"),
    "P364": ("original language", "In which language was {s} made?"),
    "P407": ("language", "In which language is {s}?"),
    "P413": ("playing position", "In which position does {s} play?"),
    "P449": ("original network", "Which network first aired {s}?"),
    "P495": ("country of origin", "Which country does {s} come from?"),
    "P740": ("place of formation", "Where was {s} founded?"),
    "P937": ("place of work", "Where did {s} work?"),
    "P1303": ("instrument", "Which instrument does {s} play?"),
    "P1412": ("spoken language", "Which language did {s} speak?"),
}
MOST_PER_RELATION = 100
MOST_ANSWERS = 25  # per relation, the most frequent ones
LEAST_PER_ANSWER = 4
SEVERAL = 3  # times as many subjects of several relations
PATTERNS = 6  # of ParaRel's, per relation
PHRASINGS = 10  # per fact


def choose_patterns(lines: list[dict[str, str]], rng: random.Random) -> list[str]:
    """At most :data:`PATTERNS` that end with the answer, ``{s}`` for the subject; one of each verb first."""
    found: dict[str, str] = {}
    for line in lines:
        text = line["pattern"].rstrip(" .")
        # An article before the answer would be wrong for some answers.
        if text.endswith("[Y]") and text.count("[X]") == 1 and not text.endswith((" a [Y]", " an [Y]")):
            found.setdefault(text.removesuffix("[Y]").rstrip().replace("[X]", "{s}"), line["extended_lemma"])
    patterns = sorted(found)
    rng.shuffle(patterns)
    first = {found[p]: p for p in reversed(patterns)}.values()
    return sorted(patterns, key=lambda p: p not in first)[:PATTERNS]


def usable(subject: str, answer: str) -> bool:
    """Short ASCII texts, neither of which gives the other away."""
    inside = answer.lower() in subject.lower() or subject.lower() in answer.lower()
    return plain(subject) and plain(answer) and len(subject) > 2 and not inside


def choose(folder: Path, taken: set[str], rng: random.Random) -> dict[str, Any]:
    """The content of ``pararel.json``: ``phrasings`` by relation, and ``facts`` as relation, subject, answer.

    Subjects of several relations come first, so that many records have a fact about the same subject.
    """
    answers: dict[str, dict[str, set[str]]] = {}
    for number, (relation, _) in RELATIONS.items():
        known: dict[str, set[str]] = defaultdict(set)
        for line in (folder / "triples" / f"{number}.jsonl").read_text("utf-8").splitlines():
            triple = json.loads(line)
            known[triple["sub_label"]].add(triple["obj_label"])
        answers[relation] = known
    candidates = [
        (relation, subject, next(iter(of)))
        for relation, known in answers.items()
        for subject, of in known.items()
        if len(of) == 1 and subject not in taken and usable(subject, next(iter(of)))
    ]
    frequent: dict[str, list[str]] = {}
    for relation in answers:
        counts = Counter(answer for r, _, answer in candidates if r == relation)
        frequent[relation] = [a for a, n in counts.most_common(MOST_ANSWERS) if n >= LEAST_PER_ANSWER]
    candidates = [fact for fact in candidates if fact[2] in frequent[fact[0]]]
    relations = Counter(subject for _, subject, _ in candidates)
    rng.shuffle(candidates)
    candidates.sort(key=lambda fact: -relations[fact[1]])
    facts, taught = [], Counter[tuple[str, str]]()
    for relation, subject, answer in candidates:
        most = max(LEAST_PER_ANSWER, -(-MOST_PER_RELATION // len(frequent[relation])))
        if taught[relation, answer] < most * (SEVERAL if relations[subject] > 1 else 1):
            taught[relation, answer] += 1
            facts.append([relation, subject, answer])
    phrasings = {}
    for number, (relation, question) in RELATIONS.items():
        lines = (folder / "patterns" / f"{number}.jsonl").read_text("utf-8").splitlines()
        phrasings[relation] = [*choose_patterns([json.loads(line) for line in lines], rng), question]
    return {"phrasings": phrasings, "facts": sorted(facts)}


def build() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records and taught facts, in the forms of ``records.json`` and ``facts.json``, always the same.

    The subjects of at most half the facts with one relation and answer have a record. A record's rephrasing is a
    phrasing that its fact was not taught in; for a quarter of the records two more are held back. ``locality`` is
    what else the subject is known for, if anything, ``neighborhood`` what others without a record have the same answer
    to. KnowEdit's facts are all of ``facts.json`` but the invented ones.
    """
    chosen = json.loads((HERE / "pararel.json").read_text("utf-8"))
    rng = random.Random(SEED)
    own: dict[str, list[str]] = chosen["phrasings"]
    known: dict[str, dict[str, str]] = defaultdict(dict)
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for relation, subject, answer in chosen["facts"]:
        known[subject][relation] = answer
        alike[relation, answer].append(subject)
    edited = _edited(known, alike, rng)

    facts, records = [], []
    for subject, of in known.items():
        prompts = _phrasings(subject, of, own)
        for relation, answer in of.items():
            fact = {"source": "pararel", "subject": subject, "relation": relation, "answer": answer}
            back: list[str] = []
            if edited.get(subject) == relation:
                record = _record(subject, relation, known, alike, edited, prompts, own, rng)
                records.append(record)
                back.append(record["rephrase_prompt"])
                if len(records) % 4 == 0:
                    back += rng.sample([p for p in prompts[relation] if p not in (record["prompt"], *back)], 2)
            trained = [p for p in prompts[relation] if p not in back]
            facts.append({**fact, "trained": trained, "held_out": back})
    knowedit = json.loads((HERE / "facts.json").read_text("utf-8"))
    facts += [fact for fact in knowedit if fact["source"] != "invented"]
    rng.shuffle(records)
    return records, facts


def _edited(
    known: dict[str, dict[str, str]], alike: dict[tuple[str, str], list[str]], rng: random.Random
) -> dict[str, str]:
    """The relation edited of each subject that has a record; subjects of several relations come first."""
    subjects = sorted(known)
    rng.shuffle(subjects)
    edited: dict[str, str] = {}
    taken = Counter[tuple[str, str]]()
    for subject in sorted(subjects, key=lambda s: len(known[s]) == 1):
        of = known[subject]
        free = [r for r, a in of.items() if 2 * (taken[r, a] + 1) <= len(alike[r, a])]
        if free:
            edited[subject] = rng.choice(free)
            # Whoever has a record is nobody's neighbour, whichever of the relations it is about.
            for relation, answer in of.items():
                taken[relation, answer] += 1
    return edited


def _phrasings(subject: str, of: dict[str, str], own: dict[str, list[str]]) -> dict[str, list[str]]:
    """The prompts for each relation of ``subject``, without those that ask for two of its facts."""
    prompts = {r: list(dict.fromkeys(p.format(s=subject, r=r) for p in (*own[r], *BY_LABEL))) for r in of}
    count = Counter(p for listed in prompts.values() for p in listed)
    return {r: [p for p in listed if count[p] == 1][:PHRASINGS] for r, listed in prompts.items()}


def _record(
    subject: str,
    relation: str,
    known: dict[str, dict[str, str]],
    alike: dict[tuple[str, str], list[str]],
    edited: dict[str, str],
    prompts: dict[str, list[str]],
    own: dict[str, list[str]],
    rng: random.Random,
) -> dict[str, Any]:
    answer = known[subject][relation]
    worded = [p for p in own[relation] if p.format(s=subject) in prompts[relation]]
    if len(worded) < 2:
        worded += BY_LABEL[:3]
    prompt, rephrase = rng.sample(worded, 2)
    others = sorted(a for r, a in alike if r == relation and a not in known[subject].values())
    target = rng.choice([a for a in others if abs(len(a) - len(answer)) <= 12])
    same = [(r, a) for r, a in known[subject].items() if r != relation and a != answer]
    about, said = rng.choice(same) if same else ("", "")
    neighbours = [
        s
        for s in alike[relation, answer]
        if s not in edited and prompt.format(s=s, r=relation) in _phrasings(s, known[s], own)[relation]
    ]
    return {
        "subject": subject,
        "relation": relation,
        "prompt": prompt.format(s=subject, r=relation),
        "rephrase_prompt": rephrase.format(s=subject, r=relation),
        "target_new": target,
        "ground_truth": answer,
        "locality": [{"prompt": p, "ground_truth": said} for p in rng.sample(prompts[about], 2)] if about else [],
        "locality_relation": about,
        "neighborhood": [
            {"prompt": prompt.format(s=s, r=relation), "ground_truth": answer}
            for s in rng.sample(neighbours, min(2, len(neighbours)))
        ],
    }


def main() -> None:
    """Choose facts and phrasings, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pararel", type=Path, required=True, help="ParaRel's folder of triples and patterns")
    folder = parser.parse_args().pararel
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    taken = {fact["subject"] for fact in json.loads((HERE / "facts.json").read_text("utf-8"))}
    chosen = choose(folder, taken, random.Random(SEED))
    phrasings = json.dumps(chosen["phrasings"], indent=1)
    facts = ",\n".join(json.dumps(fact) for fact in chosen["facts"])
    (HERE / "pararel.json").write_text(f'{{\n"phrasings": {phrasings},\n"facts": [\n{facts}\n]\n}}\n', "utf-8")
    records, taught = build()
    LOG.info("%d records, %d facts, %d prompts", len(records), len(taught), sum(len(f["trained"]) for f in taught))
    LOG.info("%s", Counter(r["relation"] for r in records).most_common())


if __name__ == "__main__":
    main()
