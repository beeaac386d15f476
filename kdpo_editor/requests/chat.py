"""How a tokenizer's chat template puts a prompt, and where in it a question stands."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from ..errors import RequestError


def as_chat(tok: Any, prompt: str) -> str:
    """Put ``prompt`` into the tokenizer's chat template, up to where the model's answer begins.

    Raises :class:`~kdpo_editor.RequestError` if the tokenizer has no chat template, or one that does not take a
    question by a user.
    """
    if not getattr(tok, "chat_template", None):
        raise RequestError(
            f"{getattr(tok, 'name_or_path', '') or 'the tokenizer'} has no chat template to put a prompt in"
        )
    return _rendered(tok, [{"role": "user", "content": prompt}], True)


class Chat(NamedTuple):
    """How prompts of a tokenizer begin and end in its template, with what that puts before answers; special tokens.

    ``begin`` is what stands directly before a question, from the last special token on.
    """

    begin: str
    end: str
    before_answer: str
    special: tuple[str, ...]


def chat_of(tok: Any) -> Chat:
    """Find how ``tok``'s template puts a question; of a tokenizer without one, all but the special tokens is empty."""
    template = getattr(tok, "chat_template", None)
    return _chat_with(tok, repr(template), len(getattr(tok, "added_tokens_decoder", ())))


@lru_cache(maxsize=2)  # Rendering a template takes a millisecond, and a comparison tokenises thousands of prompts.
def _chat_with(tok: Any, template: str, added: int) -> Chat:
    tokens = getattr(tok, "added_tokens_decoder", {}).values()
    special = tuple(str(token) for token in tokens if token.special and str(token))
    try:
        asked = as_chat(tok, "QUESTION")
        question = {"role": "user", "content": "QUESTION"}
        answered = _rendered(tok, [question, {"role": "assistant", "content": "ANSWER"}], False)
    except RequestError:
        return Chat("", "", "", special)
    between = answered[len(asked) :].partition("ANSWER")[0]
    whole = answered.startswith(asked) and (between.isspace() or not between)
    before, found, end = asked.rpartition("QUESTION")
    if not found:
        return Chat("", "", between if whole else "", special)
    last = max((before.rfind(mark) for mark in special if mark in before), default=0)
    return Chat(before[last:], end, between if whole else "", special)


def _rendered(tok: Any, messages: list[dict[str, str]], ask: bool) -> str:
    try:
        return str(tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except Exception as error:  # a template is a program of the model's own and may raise anything
        raise RequestError(f"the chat template fails: {error}") from None
