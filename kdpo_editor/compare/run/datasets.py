"""Read knowledge-editing benchmarks, whatever their schemas, into one kind of record.

Read are KnowEdit (ZsRE, WikiData_counterfact, WikiData_recent, WikiBio; arXiv 2401.01286), CounterFact as published
(arXiv 2202.05262) and in EasyEdit's flat form, MEND's zsRE (arXiv 2110.11309), QAEdit (2502.11177), WikiBigEdit
(2503.05683), MQuAKE (2305.14795), UnKE (2405.15349), AKEW (2402.18909), UltraEditBench (2505.14679), and the records of
the shipped model. Their schemas are those of :mod:`~.schemas`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...errors import DataError
from .schemas import SCHEMAS, Probe, Record, schema_of

__all__ = ["KNOWN", "PACKAGED", "SCHEMAS", "Probe", "Record", "content_hash", "in_validation", "load", "whole_cases"]

LOG = logging.getLogger(__name__)

HERE = Path(__file__).parents[1] / "data"
PACKAGED = {
    "counterfact": HERE / "counterfact.json.xz",
    "counterfact-validation": HERE / "counterfact-validation.json.xz",
    "counterfact-known": HERE / "counterfact-known.json.xz",
}
"""Files of the package by name: CounterFact's records, those that settings are chosen on, and those of which a model is
asked what it knows. No two of them share a subject."""

KNOWN = {
    "zsre": "hub:zjunlp/KnowEdit:benchmark/ZsRE/ZsRE-test-all.json",
    "wiki_counterfact": "hub:zjunlp/KnowEdit:benchmark/wiki_counterfact/test_cf.json",
    "recent": "hub:zjunlp/KnowEdit:benchmark/wiki_recent/recent_test.json",
    "wikibio": "hub:zjunlp/KnowEdit:benchmark/WikiBio/wikibio-test-all.json",
    "wikibigedit": "hub:lukasthede/WikiBigEdit:wiki_big_edit_20240201_20240220.json",
}
"""Files of the hub by name. Besides these there is ``"shipped"``, the facts that the shipped model knows."""


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

    Each record of a file may be of another schema. The edits of one case stay together.

    Records ``offset`` to ``offset + n_edits`` of that order are returned (all from ``offset`` on where ``n_edits`` is
    ``None``), so fewer edits are always a prefix of more. With ``unique_subjects`` only the first record of each
    subject is kept, and every record without one. With ``drop_bad`` malformed records are skipped and logged.

    Raises :class:`~kdpo_editor.errors.DataError`, naming the file, the record's position and the key, where a record
    is malformed or of no known schema, where the file is unreadable, and where it has too few.
    """
    if n_edits is not None and n_edits < 1:
        raise DataError(f"n_edits: {n_edits} is not allowed; it must be at least 1, or None for all")
    if offset < 0:
        raise DataError(f"offset: {offset} is not allowed; it must be 0 or more")
    cases = _parse(source, _read(_locate(source)), drop_bad)
    if shuffle:
        random.Random(seed).shuffle(cases)
    if unique_subjects:
        cases = _of_new_subjects(cases)
    records = [record for case in cases for record in case]
    if offset + (n_edits or 1) > len(records):
        asked = f"{n_edits or 'all'} edits from position {offset} on were asked for"
        distinct = " with distinct subjects" if unique_subjects else ""
        raise DataError(f"{source}: {asked}, but it has {len(records)} usable records{distinct}")
    return whole_cases(records[offset:] if n_edits is None else records[offset : offset + n_edits])


def whole_cases(records: Sequence[Record], alone: bool = False) -> list[Record]:
    """The records, without the questions of a case whose edits are not all among them.

    ``alone``: each is made on its own, so of cases with several edits none has such questions.
    """
    found = Counter(record.index for record in records)
    return [
        record
        if record.case_size == (1 if alone else found[record.index]) or "multi_hop" not in record.portability
        else replace(record, portability={k: v for k, v in record.portability.items() if k != "multi_hop"})
        for record in records
    ]


def _of_new_subjects(cases: Sequence[list[Record]]) -> list[list[Record]]:
    """The cases all of whose subjects are none of an earlier one's; a record without a subject is always new."""
    seen: set[str] = set()
    found = []
    for case in cases:
        subjects = {record.subject for record in case} - {""}
        if not subjects & seen:
            found.append(case)
            seen |= subjects
    return found


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
        return json.loads(text, parse_constant=lambda name: None)  # NaN is what pandas writes for nothing
    except json.JSONDecodeError as error:
        raise DataError(f"{name} is not JSON: {error}") from error


def _parse(source: str, raw: list[Any], drop_bad: bool) -> list[list[Record]]:
    """The edits of each entry of a file, one but for MQuAKE's cases."""
    schemas = [schema_of(record) for record in raw]
    if not any(schemas):
        known = "; ".join(f"{name}: {', '.join(keys)}" for name, (keys, _) in SCHEMAS.items())
        raise DataError(f"{source}: no record has the keys of a known schema, which are {known}")
    cases, bad = [], []
    for index, (record, schema) in enumerate(zip(raw, schemas, strict=True)):
        try:
            if not isinstance(record, dict):
                raise DataError(f"is a {type(record).__name__}; it must be a dict")
            if schema is None:
                # One of the file's own schema most likely, so its reader says what is missing.
                schema = next(filter(None, schemas))
            cases.append(SCHEMAS[schema][1](record, index))
        except DataError as error:
            if not drop_bad:
                raise DataError(f"{source}: record {index}: {error}") from None
            bad.append(f"record {index}: {error}")
    if bad:
        named = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
        LOG.warning("%s: %d of %d records are malformed and skipped: %s", source, len(bad), len(raw), named)
    return cases
