"""Edits in a JSON Lines file."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..edits.manifest import texts_of
from ..edits.storage import MAX_JSON, parse_json
from ..errors import DamagedFileError, RequestError
from ..requests.forms import READ, check_texts, plain_request

ALIASES = {"target": "target_new"}


@dataclass(frozen=True)
class Line:
    """One line: its number, from 1, and the request, or what is wrong with it."""

    number: int
    request: dict[str, Any] | None
    error: str | None


def read_lines(lines: Iterable[bytes], name: str) -> list[Line]:
    """Read ``{"prompt": ..., "target_new": ...}`` from each line that is not blank.

    ``target`` is understood as ``target_new``, which may be a number or a list of answers
    (:func:`~kdpo_editor.requests.forms.plain_request`). Of what an edit does not read, texts and lists of texts are
    kept. A byte order mark at the beginning is passed over. Bad lines do not raise: each has an error that begins with
    ``name`` and the line's number.
    """
    found = []
    for number, data in enumerate(lines, 1):
        if not data.strip():
            continue
        what = f"{name}, line {number}"
        try:
            record = parse_json(data.removeprefix(BOM_UTF8)[: MAX_JSON + 1], what)
            found.append(Line(number, _request(record, what), None))
        except (DamagedFileError, RequestError) as error:
            found.append(Line(number, None, str(error)))
    return found


def _request(record: Any, what: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise RequestError(f'{what} is a {type(record).__name__}; it must be {{"prompt": ..., "target_new": ...}}')
    record = plain_request({ALIASES.get(key, key): value for key, value in record.items()}, what)
    check_texts(record, what)
    return texts_of(record) | {key: record[key] for key in READ if key in record}
