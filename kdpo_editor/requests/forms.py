"""What people hand over as requests, brought into the one form that is edited.

A request comes from pandas, JSON or a person. Here absence is made absence, a number text, a list of answers one answer
with others beside it. Nothing of this needs a tokenizer.
"""

from __future__ import annotations

import logging
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from math import inf
from typing import Any

from ..errors import SLIP, RequestError, nearest

LOG = logging.getLogger(__name__)
NEEDED = ("prompt", "target_new")
# What an edit reads of a request.
READ = (*NEEDED, "rephrases", "subject", "separator", "accepted")
# What was said. An edit is tokenised more than once; it is said once.
_SAID: set[str] = set()


def plain_request(request: Any, name: str) -> dict[str, Any]:
    """Bring one request into the form that is edited, as a new dict.

    - A field that holds ``None``, NaN or pandas' ``NA`` or ``NaT`` is left out: it is absent in the table it is from.
    - A number as ``target_new``, ``subject`` or accepted answer becomes text. ``16.0`` is ``"16"``: pandas turns whole
      numbers into such as soon as one of their column is missing.
    - A list as ``target_new`` is its first answer, which is trained, and ``accepted``, the others, which count as right
      too wherever answers are judged. A field ``accepted`` is joined to them.
    - An array becomes a list.

    A key that is nearly one of those that are read, and is not, is warned of once.

    Args:
        request: a mapping; whatever is wrong with its texts is left for :func:`~kdpo_editor.requests.tokens.tokenize`.
        name: of the request, for messages, such as ``"request 0"``.

    Raises:
        RequestError: it is no mapping, ``target_new`` is an empty list, an answer is neither text nor a number, or a
            text holds half a surrogate pair.
    """
    if not isinstance(request, Mapping):
        raise RequestError(f"{name} is a {type(request).__name__}; it must be a dict")
    plain = {str(key): listed(value) for key, value in request.items()}
    missing = [key for key in READ if key not in plain]
    for key in plain:
        if key not in READ and (near := nearest(key, missing, SLIP)):
            say_once(f"the key {key!r} is not read; did you mean {near!r}?", name)
    plain = {key: value for key, value in plain.items() if not _is_absent(value) or (key in NEEDED and value is None)}
    answers: list[Any] = []
    for key in ("target_new", "accepted"):
        value = plain.get(key)
        if isinstance(value, list):
            if key == "target_new" and not value:
                raise RequestError(f"{name}: 'target_new' is an empty list; it must have an answer")
            answers += [_text(one, key, name) for one in value if not _is_absent(one)]
        elif value is not None:
            answers.append(_text(value, key, name))
    if plain.get("target_new") is not None:
        if not answers:
            raise RequestError(f"{name}: 'target_new' has no answer")
        plain["target_new"], *others = dict.fromkeys(answers)
        plain.pop("accepted", None)
        if others:
            for other in others:
                if not other.strip():
                    raise RequestError(f"{name}: one of the accepted answers is empty")
            plain["accepted"] = others
    if isinstance(plain.get("subject"), (numbers.Real, Decimal)):
        plain["subject"] = _text(plain["subject"], "subject", name)
    for key, value in plain.items():
        if any(_is_broken(text) for text in [key, *(value if isinstance(value, list) else [value])]):
            raise RequestError(f"{name}: {key!r} holds half a surrogate pair, which is no character")
    return plain


def plain_requests(requests: Any, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Bring every request into the form that is edited; see :func:`plain_request`.

    ``names``: of each, for messages; none: "request 0" and so on.

    Raises :class:`~kdpo_editor.RequestError` where ``requests`` is no list, or is empty.
    """
    if isinstance(requests, (str, Mapping)) or not isinstance(requests, Sequence) or not requests:
        hint = "; a table's are its .to_dict('records')" if hasattr(requests, "to_dict") else ""
        raise RequestError("requests must be a list of at least one {'prompt': ..., 'target_new': ...}" + hint)
    named = zip(requests, names or numbered(requests), strict=True)
    return [plain_request(request, name) for request, name in named]


def numbered(requests: Sequence[Any]) -> list[str]:
    """The names of ``requests`` in messages, where they have no others."""
    return [f"request {i}" for i in range(len(requests))]


def right_answers(request: Mapping[str, Any]) -> tuple[str, ...]:
    """Name every answer that counts as right for ``request``, the one that is trained first."""
    plain = plain_request(request, "the request")
    return (plain["target_new"], *plain.get("accepted", ())) if "target_new" in plain else ()


def same_request(request: Mapping[str, Any]) -> tuple[Any, ...]:
    """Make of a plain request what two requests have in common that ask for the very same edit."""
    keys = ("prompt", "target_new", "rephrases", "subject", "separator")
    return tuple(tuple(value) if isinstance(value := request.get(key), list) else value for key in keys)


def standing(requests: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Leave out the requests whose prompt a later one edits again."""
    latest = {request["prompt"]: request for request in requests}
    return [request for request in requests if latest[request["prompt"]] is request]


def check_texts(request: Mapping[str, Any], name: str, keys: Iterable[str] = NEEDED) -> None:
    """Raise :class:`~kdpo_editor.RequestError` where one of ``keys`` is missing, no text or empty."""
    for key in keys:
        if key not in request:
            raise RequestError(f"{name} has no {key!r}; it has {', '.join(map(repr, request))[:200] or 'nothing'}")
        if not isinstance(request[key], str):
            raise RequestError(f"{name}: {key!r} is a {type(request[key]).__name__}; it must be text")
        if not request[key].strip():
            raise RequestError(f"{name}: {key!r} is empty")


def say_once(text: str, name: str, level: int = logging.WARNING, more: str = "") -> None:
    """Log ``text``, behind ``name``, unless that was said before; ``more`` behind it does not count."""
    if text not in _SAID:
        _SAID.add(text)
        LOG.log(level, "%s: %s%s", name, text, more)


def say_first(kind: str, text: str, name: str) -> None:
    """Log ``text`` once: the first of its ``kind`` as a warning, the others at level INFO."""
    if kind in _SAID:
        say_once(text, name, logging.INFO)
    else:
        _SAID.add(kind)
        say_once(text, name, more="; others like it are said at level INFO")


def listed(value: Any) -> Any:
    """``value``, as a list where it is an array or a tuple; what parquet files and ``to_dict`` give."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        return value
    whole = value.tolist() if hasattr(value, "tolist") else value
    return list(whole) if isinstance(whole, (list, tuple)) else whole


def _is_broken(text: Any) -> bool:
    """Whether ``text`` holds what UTF-8 has no bytes for, and no file could keep."""
    return isinstance(text, str) and re.search("[\ud800-\udfff]", text) is not None


def _is_absent(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas', without importing it
        return True
    return isinstance(value, (numbers.Real, Decimal)) and value != value  # NaN


def _text(value: Any, key: str, name: str) -> str:
    """``value`` as text, or :class:`RequestError`."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, Decimal)) or abs(value) == inf:
        raise RequestError(f"{name}: {key!r} is a {type(value).__name__}; it must be text, a number or a list of them")
    text = str(value)
    if not isinstance(value, Decimal) and not _is_absent(value) and int(value) == value:  # type: ignore[call-overload]
        text = str(int(value))  # type: ignore[call-overload]
    say_first("a number", f"the number {text} as {key!r} is taken as text", name)
    return text
