"""Read knowledge-editing benchmarks, whatever their schema, into one kind of record.

Read are KnowEdit (ZsRE, WikiData_counterfact, WikiData_recent, WikiBio; arXiv 2401.01286), CounterFact as published
(arXiv 2202.05262) and in EasyEdit's flat form, MEND's zsRE (arXiv 2110.11309), and the records of the shipped model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError

LOG = logging.getLogger(__name__)

HERE = Path(__file__).parents[1] / "data"
PACKAGED = {
    "counterfact": HERE / "counterfact.json.xz",
    "counterfact-validation": HERE / "counterfact-validation.json.xz",
}
"""Files of the package by name: CounterFact's records, and others of other subjects."""

KNOWN = {
    "zsre": "hub:zjunlp/KnowEdit:benchmark/ZsRE/ZsRE-test-all.json",
    "wiki_counterfact": "hub:zjunlp/KnowEdit:benchmark/wiki_counterfact/test_cf.json",
    "recent": "hub:zjunlp/KnowEdit:benchmark/wiki_recent/recent_test.json",
    "wikibio": "hub:zjunlp/KnowEdit:benchmark/WikiBio/wikibio-test-all.json",
}
"""Files of the hub by name. Besides these there is ``"shipped"``, the facts that the shipped model knows."""


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
    """

    subject: str
    prompt: str
    target_new: str
    ground_truth: str
    rephrase_prompts: tuple[str, ...]
    locality: dict[str, tuple[Probe, ...]]
    portability: dict[str, tuple[Probe, ...]]
    index: int

    @property
    def subject_in_prompt(self) -> bool:
        """Whether the prompt holds the subject word for word, as ROME and its successors need it to."""
        return bool(self.subject) and self.subject in self.prompt


def load(
    source: str,
    *,
    n_edits: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    offset: int = 0,
    unique_subjects: bool = True,
    drop_bad: bool = False,
) -> list[Record]:
    """Records of ``source``, checked, in an order that ``seed`` alone decides.

    ``source`` is ``"shipped"``, a name in :data:`PACKAGED` or :data:`KNOWN`, the path of a ``.json`` file (a list) or
    ``.jsonl`` file (one record a line), either of them compressed as ``.xz`` or not, or ``"hub:<owner/name>:<path>"``,
    a file of a data set on the Hugging Face hub.

    Records ``offset`` to ``offset + n_edits`` of that order are returned (all from ``offset`` on where ``n_edits`` is
    ``None``), so fewer edits are always a prefix of more. With ``unique_subjects`` only the first record of each
    subject is kept, and every record without one. With ``drop_bad`` malformed records are skipped and logged.

    Raises :class:`~kdpo_editor.errors.DataError`, naming the file, the record's position and the key, where a record
    is malformed or of another schema than those before it, where the file is unreadable, and where it has too few.
    """
    if n_edits is not None and n_edits < 1:
        raise DataError(f"n_edits: {n_edits} is not allowed; it must be at least 1, or None for all")
    if offset < 0:
        raise DataError(f"offset: {offset} is not allowed; it must be 0 or more")
    records = _parse(source, _read(_locate(source)), drop_bad)
    if shuffle:
        random.Random(seed).shuffle(records)
    if unique_subjects:
        first: dict[Any, Record] = {}
        for record in records:
            first.setdefault(record.subject or record.index, record)
        records = list(first.values())
    if offset + (n_edits or 1) > len(records):
        asked = f"{n_edits or 'all'} edits from position {offset} on were asked for"
        distinct = " with distinct subjects" if unique_subjects else ""
        raise DataError(f"{source}: {asked}, but it has {len(records)} usable records{distinct}")
    return records[offset:] if n_edits is None else records[offset : offset + n_edits]


def in_validation(record: Record) -> bool:
    """Whether a record is of the validation split: that of a fifth of the subjects, which a hash picks."""
    return hashlib.sha256((record.subject or record.prompt).encode()).digest()[0] % 5 == 0


def content_hash(records: Iterable[Record]) -> str:
    """SHA-256, in hex, of everything in ``records`` and of their order: a key for results computed from them."""
    text = json.dumps([asdict(record) for record in records], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _locate(source: str) -> Path:
    if source in PACKAGED:
        return PACKAGED[source]
    source = KNOWN.get(source, source)
    if source == "shipped":
        from ... import testbed

        return testbed.HERE / "records.json"
    if source.startswith("hub:"):
        return _download(source)
    path = Path(source)
    if not path.is_file():
        names = ", ".join(["shipped", *PACKAGED, *KNOWN])
        raise DataError(f"{source!r} is no file; it must be one, or hub:<owner/name>:<path>, or one of {names}")
    return path


def _download(source: str) -> Path:
    repo, _, path = source.removeprefix("hub:").partition(":")
    if repo.count("/") != 1 or not path:
        raise DataError(f"{source!r} is not allowed; it must be hub:<owner/name>:<path in the repository>")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, path, repo_type="dataset"))
    except Exception as error:  # the hub's errors have no base in common, and it differs between versions
        raise DataError(
            f"{source}: the hub did not give {path!r} of the data set {repo!r} ({type(error).__name__}: {error}); "
            "the path of a local copy works too"
        ) from error


def _read(path: Path) -> list[Any]:
    try:
        content = path.read_bytes()
        text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if path.name.removesuffix(".xz").endswith(".jsonl"):
        records = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                records.append(_json(line, f"{path}: line {number}"))
    else:
        records = _json(text, str(path))
    if not isinstance(records, list):
        raise DataError(f"{path} holds a {type(records).__name__}; it must be a list of records, or .jsonl lines")
    if not records:
        raise DataError(f"{path} is empty; it must hold at least one record")
    return records


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name} is not JSON: {error}") from error


def _parse(source: str, raw: list[Any], drop_bad: bool) -> list[Record]:
    schemas = [_schema(record) for record in raw]
    schema = next(filter(None, schemas), None)
    if schema is None:
        known = "; ".join(f"{name}: {', '.join(keys)}" for name, (keys, _) in SCHEMAS.items())
        raise DataError(f"{source}: no record has the keys of a known schema, which are {known}")
    records, bad = [], []
    for index, (record, own) in enumerate(zip(raw, schemas, strict=True)):
        if own not in (schema, None):
            raise DataError(f"{source}: record {index} has the keys of {own}, those before it the keys of {schema}")
        try:
            if not isinstance(record, dict):
                raise DataError(f"is a {type(record).__name__}; it must be a dict")
            records.append(SCHEMAS[schema][1](record, index))
        except DataError as error:
            if not drop_bad:
                raise DataError(f"{source}: record {index}: {error}") from None
            bad.append(f"record {index}: {error}")
    if bad:
        named = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
        LOG.warning("%s: %d of %d records are malformed and skipped: %s", source, len(bad), len(raw), named)
    return records


def _schema(record: Any) -> str | None:
    keys = record if isinstance(record, dict) else ()
    return next((name for name, (needed, _) in SCHEMAS.items() if all(key in keys for key in needed)), None)


def _shipped(record: dict[str, Any], index: int) -> Record:
    groups = {"same_subject": record.get("locality"), "neighborhood": record.get("neighborhood")}
    return _named(record, index, _groups(groups, "locality"), {})


def _knowedit(record: dict[str, Any], index: int) -> Record:
    locality = _groups(record.get("locality"), "locality")
    return _named(record, index, locality, _groups(record.get("portability"), "portability"))


def _flat(record: dict[str, Any], index: int) -> Record:
    locality = _columns(record, "neighborhood", "locality_prompt", "locality_ground_truth")
    portability = _columns(record, "one_hop", "portability_prompt", "portability_ground_truth", answered=True)
    return _named(record, index, locality, portability)


def _named(
    record: dict[str, Any],
    index: int,
    locality: dict[str, tuple[Probe, ...]],
    portability: dict[str, tuple[Probe, ...]],
) -> Record:
    """The part that the shipped records, KnowEdit and flat CounterFact have in common."""
    return Record(
        subject=_text(record, "subject"),
        prompt=_text(record, "prompt"),
        target_new=_text(record, "target_new"),
        ground_truth=_first(record.get("ground_truth"), "ground_truth"),
        rephrase_prompts=_texts(record.get("rephrase_prompt"), "rephrase_prompt"),
        locality=locality,
        portability=portability,
        index=index,
    )


def _wikibio(record: dict[str, Any], index: int) -> Record:
    return Record(
        subject=_text(record, "concept"),
        prompt=_text(record, "text"),
        target_new=_text(record, "labels"),
        ground_truth="",
        rephrase_prompts=(),
        locality=_groups(record.get("locality"), "locality"),
        portability={},
        index=index,
    )


def _counterfact(record: dict[str, Any], index: int) -> Record:
    subject = _text(record, "requested_rewrite.subject")
    template = _text(record, "requested_rewrite.prompt")
    if template.count("{}") != 1:
        raise DataError(f"'requested_rewrite.prompt' is {template!r}; it must have one {{}} where the subject goes")
    old = _text(record, "requested_rewrite.target_true.str")
    # The neighbours were chosen because the edited subject's true answer is theirs too.
    neighbours = tuple(
        Probe(prompt, (old,)) for prompt in _texts(record.get("neighborhood_prompts"), "neighborhood_prompts")
    )
    return Record(
        subject=subject,
        prompt=template.replace("{}", subject),
        target_new=_text(record, "requested_rewrite.target_new.str"),
        ground_truth=old,
        rephrase_prompts=_texts(record.get("paraphrase_prompts"), "paraphrase_prompts"),
        locality={"neighborhood": neighbours} if neighbours else {},
        portability=_one_hop(record),
        index=index,
    )


def _mend(record: dict[str, Any], index: int) -> Record:
    # `loc` keeps its "nq question: ": MEND, ROME and EasyEdit all show it to the model.
    return Record(
        subject=_text(record, "subject") if "subject" in record else "",
        prompt=_text(record, "src"),
        target_new=_text(record, "alt"),
        ground_truth=_first(record.get("answers"), "answers"),
        rephrase_prompts=_texts(record.get("rephrase"), "rephrase"),
        locality=_columns(record, "neighborhood", "loc", "loc_ans"),
        portability=_one_hop(record),
        index=index,
    )


# A record is of the first schema of whose keys it lacks none; the reader checks the rest.
SCHEMAS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any], int], Record]]] = {
    "the shipped records": (("prompt", "target_new", "locality", "locality_relation"), _shipped),
    "KnowEdit": (("prompt", "target_new", "locality"), _knowedit),
    "flat CounterFact": (("prompt", "target_new"), _flat),
    "WikiBio": (("text", "labels"), _wikibio),
    "CounterFact": (("requested_rewrite",), _counterfact),
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


def _groups(groups: Any, name: str) -> dict[str, tuple[Probe, ...]]:
    """The probes of ``{group: [{"prompt", "ground_truth"}, ...]}``."""
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
            if not isinstance(probe, dict) or not {"prompt", "ground_truth"} <= probe.keys():
                raise DataError(f"'{where}[{i}]' is {probe!r}; it must be a dict with 'prompt' and 'ground_truth'")
            pairs.append(_pair(probe, "prompt", "ground_truth", f"{where}[{i}]."))
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
