"""Damaged files of every kind: only the documented errors, whatever is in them.

``KDPO_FUZZ`` is the number of damaged inputs altogether, 900 unless set. Some are damaged as bytes; others are sound
JSON, with checksums that fit, in which values were exchanged, so that what lies behind the checksums is reached.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_records import BENCHMARKS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import Small, add, change, make

from kdpo_editor import EditDelta, EditLedger, KDPOError
from kdpo_editor.cli.request_file import read_lines
from kdpo_editor.compare.run.datasets import load
from kdpo_editor.edits.journal import line_of
from kdpo_editor.requests.forms import plain_request

TARGETS = 6
fuzz = settings(
    max_examples=max(int(os.environ.get("KDPO_FUZZ", "900")) // TARGETS, 1),
    deadline=None,
    database=None,
    derandomize="KDPO_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)

NASTY = st.sampled_from([
    b"\x00", b"\n", b"\r\n", b"{", b"}", b"[" * 3000, b'{"a":' * 3000, b'"', b"\\", b"\\ud800", b"NaN", b"-Infinity",
    b"1e999", b"9" * 5000, b"\xff\xfe", b"\xed\xa0\x80", b"null", b"true", b"../", b"\x80" * 8, b"\x00" * 64,
])  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(1 << 70), max_value=1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(
        ["../../etc/passwd", "F32", "I8", "0" * 64, "edit", "move", "ledger", "a.weight", "before:a.weight"]
    )
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=8), SCALARS, max_size=3)


@st.composite
def broken_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """``whole`` with a few of its bytes changed, cut out, repeated or added."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        to = min(at + draw(st.integers(0, 200)), len(data))
        kind = draw(st.sampled_from(["flip", "cut", "tail", "repeat", "insert", "overwrite"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:to]
        elif kind == "tail":
            del data[at:]
        elif kind == "repeat":
            data[at:at] = data[at:to]
        elif kind == "insert":
            data[at:at] = draw(NASTY | st.binary(max_size=40))
        elif kind == "overwrite":
            new = draw(NASTY | st.binary(max_size=40))
            data[at : at + len(new)] = new
    return bytes(data)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys or indices."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        found += [(value, key) for key in value]
    elif isinstance(value, list):
        found += [(value, i) for i in range(len(value))]
    for container, key in list(found):
        found += places(container[key])
    return found


@st.composite
def broken_json(draw: st.DrawFn, whole: Any) -> Any:
    """``whole``, a JSON value, with a few of its parts exchanged, removed or moved."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        around = places(value)
        if not around:
            return draw(VALUES)
        container, key = around[draw(st.integers(0, len(around) - 1))]
        kind = draw(st.sampled_from(["new", "new", "remove", "other", "add"]))
        if kind == "new":
            container[key] = draw(VALUES)
        elif kind == "remove":
            del container[key]
        elif kind == "other":
            other, name = around[draw(st.integers(0, len(around) - 1))]
            container[key] = copy.deepcopy(other[name]) if _has(other, name) else None
        elif isinstance(container, dict):
            container[draw(st.text(max_size=8))] = draw(VALUES)
        else:
            container.append(draw(VALUES))
    return value


def _has(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)


class Samples:
    """A sound delta and a sound ledger, in a folder that the tests write damaged files into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = Small()
        EditDelta.of(model, change(model, 1), [{"prompt": "a", "target_new": "b"}]).save(folder / "delta")
        make(folder / "ledger", 3)
        with EditLedger(folder / "ledger", write=True) as ledger:
            model = Small()
            ledger.restore(model)
            ledger.undo(1, model)
            add(ledger, model, 4)
        self.manifest = folder / "delta" / "manifest.json"
        self.tensors = next((folder / "delta").glob("*.safetensors"))
        self.journal = folder / "ledger" / "journal.jsonl"
        self.sound = {path: path.read_bytes() for path in (self.manifest, self.tensors, self.journal)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return Samples(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def samples(saved: Samples) -> Iterator[Samples]:
    """Sound again after each test."""
    yield saved
    for path, data in saved.sound.items():
        path.write_bytes(data)


def use_delta(samples: Samples) -> None:
    """All that can be done with a delta from elsewhere; what is in the model afterwards is finite."""
    model = Small()
    try:
        delta = EditDelta.load(samples.folder / "delta")
        repr(delta)
        delta.tensors()
        delta.apply(model)
        delta.revert(model)
    except KDPOError:
        pass
    assert all(torch.isfinite(p).all() for p in model.parameters())


def use_ledger(samples: Samples) -> None:
    """All that can be done with a ledger from elsewhere."""
    for skip in (False, True):
        model = Small()
        try:
            ledger = EditLedger(samples.folder / "ledger", skip_damaged=skip)
            assert ledger.requests is not None
            ledger.restore(model)
            if ledger.head:
                delta = ledger.delta(ledger.head, since=0)
                repr(delta)
                delta.revert(model)
            for number in sorted(ledger.edits):
                ledger.delta(number)
        except KDPOError:
            pass


@pytest.mark.slow
def test_damaged_bytes_of_a_manifest(samples: Samples) -> None:
    @fuzz
    @given(broken_bytes(samples.sound[samples.manifest]))
    def check(data: bytes) -> None:
        samples.manifest.write_bytes(data)
        use_delta(samples)

    check()


@pytest.mark.slow
def test_exchanged_values_of_a_manifest(samples: Samples) -> None:
    @fuzz
    @given(broken_json(json.loads(samples.sound[samples.manifest])))
    def check(value: Any) -> None:
        samples.manifest.write_text(json.dumps(value), "utf-8")
        use_delta(samples)

    check()


@pytest.mark.slow
def test_damaged_bytes_of_tensors(samples: Samples) -> None:
    @fuzz
    @given(broken_bytes(samples.sound[samples.tensors]))
    def check(data: bytes) -> None:
        samples.tensors.write_bytes(data)
        use_delta(samples)

    check()


@pytest.mark.slow
def test_damaged_bytes_of_a_journal(samples: Samples) -> None:
    @fuzz
    @given(broken_bytes(samples.sound[samples.journal]))
    def check(data: bytes) -> None:
        samples.journal.write_bytes(data)
        use_ledger(samples)

    check()


@pytest.mark.slow
def test_exchanged_values_of_a_journal(samples: Samples) -> None:
    records = [json.loads(line)["record"] for line in samples.sound[samples.journal].splitlines()]

    @fuzz
    @given(broken_json(records))
    def check(value: Any) -> None:
        lines = value if isinstance(value, list) else [value]
        samples.journal.write_bytes(b"".join(line_of(record) for record in lines))
        use_ledger(samples)

    check()


REQUESTS = b"".join(
    json.dumps({"prompt": f"Who is {i}? \u00e9\U0001f600", "target_new": "X", "subject": "s"}).encode() + b"\n"
    for i in range(4)
)


@pytest.mark.slow
def test_damaged_bytes_of_requests() -> None:
    @fuzz
    @given(broken_bytes(REQUESTS))
    def check(data: bytes) -> None:
        for line in read_lines(data.splitlines(keepends=True), "f.jsonl"):
            assert (line.request is None) != (line.error is None)
            if line.request is not None:
                assert line.request["prompt"].strip()
                assert line.request["target_new"].strip()
                json.dumps(line.request, ensure_ascii=False).encode("utf-8")
            else:
                assert f"f.jsonl, line {line.number}" in str(line.error)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_exchanged_values_of_a_benchmarks_records(name: str, tmp_path: Path) -> None:
    file = tmp_path / "data.json"

    @fuzz
    @given(broken_json(BENCHMARKS[name]()[:3]))
    def check(value: Any) -> None:
        file.write_text(json.dumps(value), "utf-8")
        try:
            records = load(str(file))
        except KDPOError:
            return
        assert all(record.prompt and record.target_new for record in records)

    check()


@pytest.mark.slow
def test_exchanged_values_of_a_request() -> None:
    request = {"prompt": "Who?", "target_new": ["a", 16.0], "subject": None, "rephrases": ["Whom?"], "accepted": "c"}

    @fuzz
    @given(broken_json(request))
    def check(value: Any) -> None:
        try:
            plain = plain_request(value, "request 0")
        except KDPOError:
            return
        assert all(isinstance(answer, str) for answer in plain.get("accepted", ()))

    check()
