"""When a text gives an answer: the one rule for all that is generated.

A text gives an answer where it begins with it, and a word ends where the answer does. What a model goes on to say does
not count. :func:`normalised` says what is alike.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

# Chinese and Japanese, Thai, Lao, Tibetan, Burmese, Khmer: no spaces between words, so a word may end anywhere.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"
    "|[\U00020000-\U0003ffff]"
)
# Punctuation that is part of names and numbers ("C#", "AT&T", "5%", "3.5"), and what a word goes on with ("C++").
KEPT = "#&%."
JOINING = KEPT + "+"


def normalised(text: str) -> str:
    """``text`` as answers are compared: case, punctuation, spaces and an article at its beginning do not count.

    Hyphens within words and points within abbreviations go without a space ("Coca-Cola", "U.S."), and so does a
    possessive's end ("Paris's"). A point or comma between digits is part of the number.
    """
    return _forms(text)[0]


def _folded(text: str) -> str:
    """``text`` as :func:`normalised`, with its article."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub("['\u2018\u2019\u02bc`\u00b4]", "'", text)
    text = re.sub(r"(?<=\w)'s\b|'", "", text)
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<=[^\W\d_])[-.\u2010\u2011](?=[^\W\d_])", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text)
    text = "".join(" " if unicodedata.category(c)[0] == "P" and c not in KEPT else c for c in text)
    return " ".join(text.split())


def _forms(text: str) -> tuple[str, str]:
    """``text`` as :func:`normalised`, and with its article, which may be all of an answer ("A")."""
    whole = _folded(text)
    return re.sub(r"^(?:an?|the) (?=.)", "", whole), whole


def begins_with(text: str, answer: str) -> bool:
    """Whether ``text`` begins with ``answer``, at a word's end, both :func:`normalised`.

    "Paris, which" begins with "Paris", "Parisian" does not. In a script without spaces between words any character
    may end a word. An answer of nothing but punctuation must stand there as it is.
    """
    wanted = normalised(answer)
    if not wanted:
        return bool(answer.strip()) and text.strip().startswith(answer.strip())
    rests = [said[len(wanted) :] for said in _forms(text) if said.startswith(wanted)]
    return any(not rest or UNSPACED.match(wanted[-1]) is not None or _ends_a_word(rest[0]) for rest in rests)


def begins_with_one(text: str, answers: Iterable[str]) -> bool:
    """Whether ``text`` begins with one of ``answers``, as :func:`begins_with` says."""
    return any(begins_with(text, answer) for answer in answers)


def is_answer(text: str, answer: str) -> bool:
    """Whether ``text`` is ``answer`` and nothing more, both :func:`normalised`."""
    wanted = normalised(answer)
    return wanted in _forms(text) if wanted else text.strip() == answer.strip() != ""


def _ends_a_word(following: str) -> bool:
    """Whether a word can end before the character ``following``."""
    part = following.isalnum() or unicodedata.category(following)[0] == "M" or following in JOINING
    return not part or UNSPACED.match(following) is not None
