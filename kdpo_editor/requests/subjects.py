"""Where a request's subject stands in its prompt, and what the subject is where the request names none."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from .answers import UNSPACED

# A pair of quotation marks with a title between them; straight ones not within a word.
QUOTED = re.compile(
    r"[\u201c\u201e]([^\u201c\u201d\u201e]+)[\u201d\u201c]|\u00ab\s*([^\u00ab\u00bb]+?)\s*\u00bb|\u00bb([^\u00ab\u00bb]+)\u00ab"
    r"|[\u300c\u300e\u300a]([^\u300c-\u300f\u300a\u300b]+)[\u300d\u300f\u300b]|\"([^\"]+)\"|(?<!\w)['\u2018](\S[^'\u2018\u2019]*)['\u2019](?!\w)"
)
# A word with what may stand within one: apostrophes, hyphens, points between letters and after initials.
WORD = re.compile(r"[^\W_](?:[\w&]|['\u2019.\-\u2010\u2011\u2013](?=\w)|(?<=\b\w)\.(?=\s))*|&")
POSSESSIVE = re.compile(r"(?<=\w)['\u2019]s$", re.IGNORECASE)
# Words in lower case that stand within names.
PARTICLES = re.compile(
    "of|the|and|de|da|dos?|das|del|della|di|du|des|la|les?|van|von|der|den|ter|ten|a[fv]|zu|bin|ibn|al|el|y|e|i|&"
)
# Capitalised only because a sentence begins with them; names do not begin so, or carry the same without them.
OPENERS = re.compile(
    "an?|the|in|on|at|by|of|for|from|to|with|as|who|whom|whose|what|where|when|which|why|how|is|are|was|were|do|does|"
    "did|can|has|have|had|it|he|she|they|we|i|you|his|her|its|their|our|my|your|this|that|these|those|there"
)


def subject_of(text: str) -> str:
    """Guess whom or what ``text`` is about: the longest name in it, or, failing that, all but its last words.

    A name is what stands in quotation marks, or a run of capitalised words (and numbers behind one), with particles
    such as "of" or "van" within. A word that opens a sentence, such as "The" or "What", is no part of it. Of several
    the longest is taken, of those equally long the first. Where there is no name, as in scripts without capitals,
    the last two words are left off, or the last one of two or three. In scripts without spaces each character is a
    word.

    Returns "" for a text without words.
    """
    names = [found for match in QUOTED.finditer(text) if (found := next(filter(None, match.groups()), "").strip())]
    names = names or [re.sub(POSSESSIVE, "", name) for name in _names(text)]
    if names:
        return max(names, key=len)
    words = [match.span() for match in _WORDS.finditer(text)]
    if not words:
        return ""
    kept = words[: len(words) - (2 if len(words) > 3 else 1)] or words
    return text[kept[0][0] : kept[-1][1]]


# A character of a script without spaces, with its marks, or a word.
_WORDS = re.compile(
    f"{UNSPACED.pattern}[\\u0e31\\u0e34-\\u0e3a\\u0e47-\\u0e4e]*|[^\\W_](?:(?!{UNSPACED.pattern})[\\w'\\u2019.\\-])*"
)


def _names(text: str) -> Iterator[str]:
    """Runs of capitalised words, with numbers before and behind them, and particles within."""
    words = list(WORD.finditer(text))
    begin = 0
    while begin < len(words):
        last = None  # the last word of the name that begins here, if one does
        for i in range(begin, len(words)):
            word = words[i].group()
            if i > begin and not _is_space(text[words[i - 1].end() : words[i].start()]):
                break
            if _is_capitalised(word) and not (
                i == begin and OPENERS.fullmatch(word.lower()) and _opens(text, words[i])
            ):
                last = i
            elif word[0].isdigit():
                last = i if last is not None else None
            elif last is None or not PARTICLES.fullmatch(word.lower()):
                break
        if last is not None:
            yield text[words[begin].start() : words[last].end()]
        begin = begin + 1 if last is None else last + 1


def _is_space(between: str) -> bool:
    return not between.strip() and "\n" not in between


def _opens(text: str, word: re.Match[str]) -> bool:
    """Whether a sentence begins with ``word``."""
    before = text[: word.start()].rstrip()
    return not before or before[-1] in ".!?:;\u00bf\u00a1" or "\n" in text[len(before) : word.start()]


def _is_capitalised(word: str) -> bool:
    return word[0].isupper() or word[0].istitle()


def places_of(text: str, subject: str, end: int) -> list[tuple[int, int]]:
    """Find ``subject`` in ``text`` up to ``end``: the begin and end of every place, in order.

    As it is written; where it is not there, in any case and Unicode form: canonical decomposition and case folding on
    both sides, whole characters with their marks. Places at whole words go before such within words.
    """
    begins = [match.start() for match in re.finditer(f"(?={re.escape(subject)})", text[:end])]
    found = [(begin, begin + len(subject)) for begin in begins] or _folded_places(text[:end], subject)
    whole = [place for place in found if _is_whole(text, *place)]
    return whole or found


def _folded_places(text: str, subject: str) -> list[tuple[int, int]]:
    wanted = "".join(folded for folded, _, _ in _folded(subject))
    pieces = list(_folded(text))
    joined = "".join(folded for folded, _, _ in pieces)
    # Where, in the folded text, a character begins, and which of the original's.
    begins, ends, at = {}, {}, 0
    for folded, begin, end in pieces:
        if folded:
            begins[at] = begin
            at += len(folded)
            ends[at] = end
    matches = (match.start() for match in re.finditer(f"(?={re.escape(wanted)})", joined)) if wanted else ()
    return [(begins[m], ends[m + len(wanted)]) for m in matches if m in begins and m + len(wanted) in ends]


def _folded(text: str) -> Iterator[tuple[str, int, int]]:
    """Each character of ``text`` with its marks, decomposed and in lower case; its begin and end in ``text``."""
    begin = 0
    for i in range(1, len(text) + 1):
        if i == len(text) or not unicodedata.combining(text[i]):
            decomposed = unicodedata.normalize("NFD", text[begin:i])
            yield unicodedata.normalize("NFD", decomposed.casefold()), begin, i
            begin = i


def _is_whole(text: str, begin: int, end: int) -> bool:
    """Whether no word goes on across ``begin`` or ``end``."""
    return not (_joins(text[begin - 1 : begin], text[begin]) or _joins(text[end - 1], text[end : end + 1]))


def _joins(left: str, right: str) -> bool:
    return bool(
        left and right and left.isalnum() and right.isalnum() and not UNSPACED.match(left) and not UNSPACED.match(right)
    )
