"""What stands between a prompt and its answer."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from .chat import chat_of

# Scripts that write no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, Chinese and Japanese, the last two
# with their punctuation and full-width forms.
WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\u1a20-\u1aaf\u2e80-\u312f\u31a0-\u31ff\u3400-\u9fff"
    "\uaa60-\uaa7f\uf900-\ufaff\ufe30-\ufe4f\uff01-\uff9f\U0001b000-\U0001b16f\U00020000-\U000323af]"
)
# Marks that open in English or French and close in German, and what opens there.
CLOSES = {"\u201c": "\u201e", "\u2018": "\u201a", "\u00ab": "\u00bb", "\u2039": "\u203a"}


def joint(tok: Any, prompt: str, target: str) -> str:
    """Say what stands between ``prompt`` and ``target``, where the request has no ``separator`` of its own.

    Nothing, where one of these holds; one space else:

    - ``prompt`` ends in white space, or ``target`` begins with a line break or a tab;
    - ``prompt`` ends in an opening bracket, or in a quotation mark that opens;
    - ``prompt`` ends in a special token, or as the tokenizer's chat template ends before an answer. Where the template
      itself puts white space before its answers (Llama-2's a space, GLM-4's a line break), that is taken;
    - ``prompt`` and ``target`` are of scripts that write no spaces (Chinese, Japanese, Thai, ...). The letters that are
      nearest to the joint decide; digits and Western punctuation are looked past. Where one side has no letters, the
      other decides.

    Before a target that begins with a space there stands another, as in the paper's records and in EasyEdit's scores.
    """
    if prompt[-1:].isspace() or (target[:1].isspace() and target[0] != " "):
        return ""
    chat = chat_of(tok)
    if chat.end and prompt.endswith(chat.end):
        return chat.before_answer
    if prompt.endswith(chat.special) or _opens(prompt):
        return ""
    sides = _writes_no_spaces(reversed(prompt)), _writes_no_spaces(target)
    return "" if True in sides and False not in sides else " "


def _opens(text: str) -> bool:
    """Whether ``text`` ends in an opening bracket or quotation mark."""
    mark, before = text[-1:], text[:-1]
    kind = unicodedata.category(mark) if mark else ""
    if kind == "Ps":
        return True
    if mark in ('"', "`"):
        return text.count(mark) % 2 == 1
    if kind not in ("Pi", "Pf") and mark != "'":
        return False
    if not before or before[-1].isspace() or _opens(before):
        return True
    # Directly behind a word an apostrophe, a closing mark, or a German text's that closes what another opened.
    opened = CLOSES.get(mark, "")
    return kind == "Pi" and not (opened and before.rfind(opened) > before.rfind(mark))


def _writes_no_spaces(characters: Any) -> bool | None:
    """Whether the first letter of ``characters`` is of a script without spaces; ``None`` where there is no letter."""
    for character in characters:
        if WITHOUT_SPACES.match(character):
            return True
        if character.isalpha():
            return False
    return None
