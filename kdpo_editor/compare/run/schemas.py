"""The schemas of knowledge-editing benchmarks, each read into one kind of record.

Prompt and target must be there. Everything else may be missing from some records or from all: then there is no probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DataError


@dataclass(frozen=True)
class Probe:
    """A question about what an edit should, or should not, have changed.

    ``answers``: every accepted answer; the first is the one for teacher forcing. Locality compares the model before
    and after the edit, so there it may be empty; elsewhere it has at least one entry.
    """

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """One edit and its probes. No text has spaces at either end: prompt and answer are joined by one.

    ``subject`` and ``ground_truth`` are ``""`` where the data has none. ``locality`` and ``portability`` are keyed as
    the data names its groups (``"Relation_Specificity"``, ``"Reasoning"``), or ``"neighborhood"``, ``"one_hop"``,
    ``"same_subject"`` where it names none; a group without probes is absent. ``index`` is the position in the file.

    ``case_size``: edits that the file makes one case of (MQuAKE). They share ``index``, and the last of them has the
    questions that all of them answer, as ``"multi_hop"``.
    """

    subject: str
    prompt: str
    target_new: str
    ground_truth: str
    rephrase_prompts: tuple[str, ...]
    locality: dict[str, tuple[Probe, ...]]
    portability: dict[str, tuple[Probe, ...]]
    index: int
    case_size: int = 1

    @property
    def subject_in_prompt(self) -> bool:
        """Whether the prompt holds the subject word for word, as ROME and its successors need it to."""
        return bool(self.subject) and self.subject in self.prompt


def schema_of(record: Any) -> str | None:
    """The name of the first schema of whose keys ``record`` lacks none, ``None`` where there is no such."""
    return next((name for name, (keys, _) in SCHEMAS.items() if all(_has(record, key) for key in keys)), None)


def _has(record: Any, path: str) -> bool:
    for key in path.split("."):
        record = record[0] if isinstance(record, list) and record else record
        if not isinstance(record, dict) or key not in record:
            return False
        record = record[key]
    return True


def _plain(record: dict[str, Any], index: int) -> list[Record]:
    """KnowEdit, EasyEdit's flat CounterFact and the shipped records, which differ in their probes alone."""
    local = record.get("locality")
    local = {"same_subject": local} if isinstance(local, list) else local
    neighbors = {"neighborhood": record.get("neighborhood")}
    return _record(
        record,
        index,
        "prompt",
        "target_new",
        rephrase=("rephrase_prompt", "rephrase"),
        locality={
            **_groups(local, "locality"),
            **_groups(neighbors, "locality"),
            **_columns(record, "neighborhood", "locality_prompt", "locality_ground_truth"),
        },
        portability={
            **_groups(record.get("portability"), "portability"),
            **_columns(record, "one_hop", "portability_prompt", "portability_ground_truth", answered=True),
        },
    )


def _wikibio(record: dict[str, Any], index: int) -> list[Record]:
    locality = _groups(record.get("locality"), "locality")
    return _record(record, index, "text", "labels", subject="concept", locality=locality)


def _mend(record: dict[str, Any], index: int) -> list[Record]:
    # `loc` keeps its "nq question: ": MEND, ROME and EasyEdit all show it to the model.
    locality = _columns(record, "neighborhood", "loc", "loc_ans")
    return _record(record, index, "src", "alt", old="answers", locality=locality, portability=_one_hop(record))


def _qaedit(record: dict[str, Any], index: int) -> list[Record]:
    locality = _groups({"neighborhood": record.get("locality")}, "locality", "loc", "loc_ans")
    return _record(record, index, "prompt", "target", locality=locality)


def _wikibigedit(record: dict[str, Any], index: int) -> list[Record]:
    personas = tuple(Probe(prompt, (_text(record, "ans"),)) for prompt in _texts(record.get("personas"), "personas"))
    hops = _columns(record, "multi_hop", "mhop", "mhop_ans", answered=True)
    locality = _columns(record, "neighborhood", "loc", "loc_ans")
    portability = {**({"personas": personas} if personas else {}), **hops}
    return _record(record, index, "update", "ans", locality=locality, portability=portability)


def _ultraeditbench(record: dict[str, Any], index: int) -> list[Record]:
    locality = _columns(record, "neighborhood", "loc", "loc_ans")
    return _record(record, index, "prompt", "ans", rephrase=("rephrase_prompt",), locality=locality)


def _unke(record: dict[str, Any], index: int) -> list[Record]:
    parts = _columns(record, "sub_questions", "sub_question", "sub_answer", answered=True)
    return _record(record, index, "question", "answer", rephrase=("para_question",), portability=parts)


def _record(
    record: dict[str, Any],
    index: int,
    prompt: str,
    target: str,
    *,
    subject: str = "subject",
    old: str = "ground_truth",
    rephrase: Sequence[str] = ("rephrase",),
    locality: dict[str, tuple[Probe, ...]] | None = None,
    portability: dict[str, tuple[Probe, ...]] | None = None,
) -> list[Record]:
    """One record from the keys that hold its parts."""
    return [
        Record(
            subject=_first(record.get(subject), subject),
            prompt=_text(record, prompt),
            target_new=_text(record, target),
            ground_truth=_first(record.get(old), old),
            rephrase_prompts=tuple(dict.fromkeys(text for key in rephrase for text in _texts(record.get(key), key))),
            locality=locality or {},
            portability=portability or {},
            index=index,
        )
    ]


def _rewrites(record: dict[str, Any], index: int) -> list[Record]:
    """CounterFact as published; MQuAKE, where one case has several edits; AKEW, of both with texts as answers."""
    rewrites = record.get("requested_rewrite")
    rewrites = rewrites if isinstance(rewrites, list) and rewrites else [rewrites]
    found = []
    for number, rewrite in enumerate(rewrites, 1):
        within = {"requested_rewrite": rewrite}
        subject = _text(within, "requested_rewrite.subject")
        template = _text(within, "requested_rewrite.prompt")
        if template.count("{}") != 1:
            raise DataError(f"'requested_rewrite.prompt' is {template!r}; it must have one {{}} where the subject goes")
        true = rewrite.get("target_true") or {}
        if not isinstance(true, dict):
            raise DataError(f"'requested_rewrite.target_true' is a {type(true).__name__}; it must be a dict")
        old = _first(true.get("str"), "requested_rewrite.target_true.str")
        # The neighbours were chosen because the edited subject's true answer is theirs too.
        neighbors = tuple(
            Probe(prompt, (old,) if old else ())
            for prompt in _texts(record.get("neighborhood_prompts"), "neighborhood_prompts")
        )
        cloze, question = template.replace("{}", subject), _first(rewrite.get("question"), "question")
        prompt, target = cloze, "requested_rewrite.target_new.str"
        portability = _one_hop(record)
        if "fact_new_uns" in rewrite:
            prompt = _first(rewrite.get("prompt_full"), "prompt_full") or question or cloze
            target = "requested_rewrite.fact_new_uns"
            portability |= _triplets(rewrite.get("unsfact_triplets_GPT"))
        if number == len(rewrites):
            portability |= _multi_hop(record)
        others = (*_texts(record.get("paraphrase_prompts"), "paraphrase_prompts"), question)
        found.append(
            Record(
                subject=subject,
                prompt=prompt,
                target_new=_text(within, target),
                ground_truth=old,
                rephrase_prompts=tuple(dict.fromkeys(other for other in others if other and other != prompt)),
                locality={"neighborhood": neighbors} if neighbors else {},
                portability=portability,
                index=index,
                case_size=len(rewrites),
            )
        )
    return found


def _multi_hop(record: dict[str, Any]) -> dict[str, tuple[Probe, ...]]:
    answers = _texts([record.get("new_answer"), record.get("new_answer_alias")], "new_answer")
    questions = _texts(record.get("questions"), "questions")
    return {"multi_hop": tuple(Probe(question, answers) for question in questions)} if answers and questions else {}


def _triplets(triplets: Any) -> dict[str, tuple[Probe, ...]]:
    """AKEW's facts of a text, each a subject, a prompt with ``{}`` for it, and the answer."""
    if triplets is not None and not isinstance(triplets, list):
        raise DataError(f"'unsfact_triplets_GPT' is a {type(triplets).__name__}; it must be a list")
    pairs = []
    for triplet in triplets or []:
        within = {"unsfact_triplets_GPT": triplet}
        prompt = _text(within, "unsfact_triplets_GPT.prompt")
        subject = _text(within, "unsfact_triplets_GPT.subject")
        pairs.append((prompt.replace("{}", subject), (_text(within, "unsfact_triplets_GPT.target"),)))
    probes = _probes(pairs, answered=True)
    return {"sub_questions": probes} if probes else {}


# A record is of the first schema of whose keys it lacks none; the reader checks the rest.
SCHEMAS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any], int], list[Record]]]] = {
    "KnowEdit, flat CounterFact or the shipped records": (("prompt", "target_new"), _plain),
    "QAEdit": (("prompt", "target"), _qaedit),
    "WikiBigEdit": (("update", "ans"), _wikibigedit),
    "UltraEditBench": (("prompt", "ans"), _ultraeditbench),
    "AKEW": (("requested_rewrite.fact_new_uns",), _rewrites),
    "MQuAKE": (("requested_rewrite", "questions"), _rewrites),
    "CounterFact": (("requested_rewrite",), _rewrites),
    "UnKE": (("question", "answer"), _unke),
    "WikiBio": (("text", "labels"), _wikibio),
    "MEND's zsRE": (("src", "alt"), _mend),
}


def _text(record: dict[str, Any], path: str) -> str:
    """The text at ``path`` (keys joined by dots), without spaces at its ends. It must be there and not be empty."""
    value: Any = record
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise DataError(f"{path!r} is missing; it must be text")
        value = value[key]
    return _checked(value, path)


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name!r} is a {type(value).__name__}; it must be text")
    if not value.strip():
        raise DataError(f"{name!r} is empty; it must be text")
    return value.strip()


def _texts(value: Any, name: str) -> tuple[str, ...]:
    """Every text in ``value``, which is text, ``None``, or a list of these at any depth; empty and repeated ones go."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value.strip(),) if value.strip() else ()
    if not isinstance(value, list):
        raise DataError(f"{name!r} holds a {type(value).__name__}; it must be text or a list of text")
    return tuple(dict.fromkeys(text for item in value for text in _texts(item, name)))


def _first(value: Any, name: str) -> str:
    return next(iter(_texts(value, name)), "")


def _groups(
    groups: Any, name: str, prompt: str = "prompt", answer: str = "ground_truth"
) -> dict[str, tuple[Probe, ...]]:
    """The probes of ``{group: [{prompt, answer}, ...]}``."""
    if groups is None:
        return {}
    if not isinstance(groups, dict):
        raise DataError(f"{name!r} is a {type(groups).__name__}; it must be a dict of lists of probes")
    found = {}
    for group, probes in groups.items():
        where = f"{name}.{group}"
        if not isinstance(probes, (list, type(None))):
            raise DataError(f"{where!r} is a {type(probes).__name__}; it must be a list of probes")
        pairs = []
        for i, probe in enumerate(probes or []):
            if not isinstance(probe, dict) or not {prompt, answer} <= probe.keys():
                raise DataError(f"'{where}[{i}]' is {probe!r}; it must be a dict with {prompt!r} and {answer!r}")
            pairs.append(_pair(probe, prompt, answer, f"{where}[{i}]."))
        found[group] = _probes(pairs, answered=name == "portability")
    return {group: probes for group, probes in found.items() if probes}


def _columns(
    record: dict[str, Any], group: str, prompt: str, answer: str, *, answered: bool = False
) -> dict[str, tuple[Probe, ...]]:
    """The probes of a record that has a prompt, or a list of them, under one key and the answers under another."""
    prompts, answers = record.get(prompt), record.get(answer)
    if not isinstance(prompts, list):
        prompts, answers = [prompts], [answers]
    elif not isinstance(answers, list) or len(answers) != len(prompts):
        raise DataError(f"{answer!r} is {answers!r}; it must be a list as long as {prompt!r}, {len(prompts)}")
    pairs = [_pair({prompt: p, answer: a}, prompt, answer) for p, a in zip(prompts, answers, strict=True)]
    probes = _probes(pairs, answered=answered)
    return {group: probes} if probes else {}


def _one_hop(record: dict[str, Any]) -> dict[str, tuple[Probe, ...]]:
    portability = record.get("portability")
    if portability is None:
        return {}
    if not isinstance(portability, dict):
        raise DataError(f"'portability' is a {type(portability).__name__}; it must be a dict with 'New Question'")
    return _columns(portability, "one_hop", "New Question", "New Answer", answered=True)


def _pair(probe: dict[str, Any], prompt: str, answer: str, within: str = "") -> tuple[str, tuple[str, ...]]:
    """Prompt and answers of one probe, both empty where it has neither."""
    answers = _texts(probe[answer], within + answer)
    if not answers and (probe[prompt] is None or str(probe[prompt]).strip() == ""):
        return "", ()
    return _checked(probe[prompt], within + prompt), answers


def _probes(pairs: Iterable[tuple[str, tuple[str, ...]]], *, answered: bool) -> tuple[Probe, ...]:
    """Probes without those that ask nothing or, where they must be ``answered``, expect nothing.

    Where several answers are right, some files repeat the prompt for each and others list them under one: here a
    prompt becomes one probe that accepts them all.
    """
    merged: dict[str, list[str]] = {}
    for prompt, answers in pairs:
        if prompt and (answers or not answered):
            merged.setdefault(prompt, []).extend(answers)
    return tuple(Probe(prompt, tuple(dict.fromkeys(answers))) for prompt, answers in merged.items())
