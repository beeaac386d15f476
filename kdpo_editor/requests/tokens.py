"""From an EasyEdit request to token ids."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from .chat import chat_of
from .forms import NEEDED, check_texts, numbered, plain_requests, say_first, say_once
from .joint import joint
from .subjects import places_of, subject_of

# What a continuation is tried behind, so that a tokenizer which begins every text with a space adds none to it.
ANCHORS = ("", "\n", ":", "a", "1")


@dataclass(frozen=True)
class EditTokens:
    """The token ids of one edit.

    ``prompt``: ``[P]``, int64, exactly what the model is fed when it is asked. ``chosen``: ``[T]``, int64, the new
    answer ``y_w``. Both on the CPU. ``request``: the token ids of the prompt that this is another phrasing of, none
    where it is the request's own. ``text``: the prompt as it was given.

    ``subject``: ``(begin, end)``, nowhere (``(0, 0)``) unless that was asked for. ``begin`` is the first token of
    ``prompt`` that holds a character of the subject and ``end - 1`` the last one. Such a token counts whatever else is
    in it, such as punctuation or ``'s`` that merged with the subject's end. A space before the subject counts, also
    where it is a token of its own. A begin token, a line break before the subject, and what follows it in tokens of
    its own do not count.
    """

    prompt: Tensor
    chosen: Tensor
    subject: tuple[int, int] = (0, 0)
    request: tuple[int, ...] = ()
    text: str = ""

    @property
    def length(self) -> int:
        """Tokens of :attr:`sequence`."""
        return len(self.prompt) + len(self.chosen) - 1

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """``prompt``, to be compared and looked up by."""
        return tuple(self.prompt.tolist())

    @property
    def sequence(self) -> Tensor:
        """``x, y_w`` as fed to the model: ``[P + T - 1]``. The last answer token is only predicted."""
        return torch.cat([self.prompt, self.chosen[:-1]])


def tokenize(
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    *,
    append_eos: bool = False,
    with_subject: bool = False,
    names: Sequence[str] = (),
) -> list[list[EditTokens]]:
    """Tokenise each request's prompt and answer, and those of its ``rephrases``: other prompts for the same target.

    Between prompt and target stands what :func:`~kdpo_editor.requests.joint.joint` says, or the request's own
    ``separator``. The prompt's ids are those of the prompt alone, as it is fed when the model is asked. The answer's
    are what follows them in one tokenisation of the joined text. Where that does not begin with the prompt's ids, since
    the prompt's last token would merge with the answer, the rest of the text is tokenised by itself: ``"The capital is
    "`` ends in a token of its own, so its answer is ``"Paris"`` and not ``" Paris"``.

    No padding and no truncation takes place, so a tokenizer's settings for them do not matter. With ``append_eos`` the
    end token closes the answer. With ``with_subject`` each request's ``subject`` is found in its prompts, where it
    stands last, at whole words if it can; one that stands there twice is warned of, and so is one that is written there
    in another case or Unicode form. Where a request has none, it is what
    :func:`~kdpo_editor.requests.subjects.subject_of` says, of a prompt in the chat template without the template; what
    is taken is logged. What else a request may look like says :func:`~kdpo_editor.requests.forms.plain_request`. All
    requests are checked before any is returned.

    Raises :class:`~kdpo_editor.RequestError`, naming the request, by ``names`` or its position, and what is wrong with
    it; so also where the tokenizer cannot write the target.
    """
    plain = plain_requests(requests, names)
    names = names or numbered(plain)
    return [_tokenize_all(tok, r, name, append_eos, with_subject) for r, name in zip(plain, names, strict=True)]


def token_ids(tok: Any, text: str) -> list[int]:
    """Tokenise ``text`` as a model is fed it: with the begin token that the tokenizer adds, but never with two of them.

    An end token that the tokenizer adds after every text is left out, since an answer is to follow.
    """
    ids = _without_end(tok, list(tok(text)["input_ids"]))
    eos = getattr(tok, "eos_token", None)
    if eos and text.endswith(eos) and ids[-1:] != [tok.eos_token_id]:
        ids.append(tok.eos_token_id)
    # A chat template writes the begin token into its text, and the tokenizer puts another before it.
    added = _without_end(tok, list(tok("")["input_ids"]))
    n = len(added)
    doubled = n > 0 and ids[:n] == ids[n : 2 * n] == added
    return ids[n:] if doubled and set(added) <= set(tok.all_special_ids) else ids


def _without_end(tok: Any, ids: list[int]) -> list[int]:
    while len(ids) > 1 and ids[-1] == tok.eos_token_id:
        ids.pop()
    return ids


# One request ----------------------------------------------------------------------------------------------------


def _tokenize_all(
    tok: Any, request: Mapping[str, Any], name: str, append_eos: bool, with_subject: bool
) -> list[EditTokens]:
    check_texts(request, name, (*NEEDED, *(("subject",) if with_subject and "subject" in request else ())))
    rephrases = _rephrases(request, name)
    guessed = with_subject and "subject" not in request
    if guessed:
        request = {**request, "subject": _guessed(tok, request["prompt"], name)}
    first = _tokenize(tok, request, name, append_eos, with_subject)
    others = []
    for prompt in rephrases:
        other = {**request, "prompt": prompt}
        if guessed and not places_of(prompt, request["subject"], len(prompt)):
            other["subject"] = _guessed(tok, prompt, name)
        others.append(_tokenize(tok, other, name, append_eos, with_subject))
    return [first, *(replace(other, request=first.prompt_ids) for other in others)]


def _rephrases(request: Mapping[str, Any], name: str) -> Sequence[str]:
    prompts = request.get("rephrases") or ()
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise RequestError(f"{name}: 'rephrases' is {prompts!r}; it must be a list of prompts")
    return prompts


def _tokenize(tok: Any, request: Mapping[str, Any], name: str, append_eos: bool, with_subject: bool) -> EditTokens:
    separator = request.get("separator")
    if separator is None:
        separator = joint(tok, request["prompt"], request["target_new"])
        if separator == " " == request["target_new"][0]:
            say_once(
                f"the target {request['target_new']!r} begins with a space and gets another before it; strip it", name
            )
    if not isinstance(separator, str):
        raise RequestError(f"{name}: 'separator' is a {type(separator).__name__}; it must be text")
    prompt = token_ids(tok, request["prompt"])
    if not prompt:
        raise RequestError(f"{name}: the prompt {request['prompt']!r} gives no tokens")
    answer = f"{separator}{request['target_new']}"
    chosen = _answer_ids(tok, prompt, request["prompt"], answer, name)
    if not chosen:
        raise RequestError(f"{name}: the target {request['target_new']!r} gives no tokens after the prompt")
    _check_known(tok, prompt, chosen, answer, name)
    if append_eos:
        if tok.eos_token_id is None:
            raise RequestError(f"{name}: append_eos is set but the tokenizer has no end token")
        if chosen[-1] != tok.eos_token_id:
            chosen.append(tok.eos_token_id)
    subject = _find_subject(tok, request, name, prompt) if with_subject else (0, 0)
    return EditTokens(torch.tensor(prompt), torch.tensor(chosen), subject, text=request["prompt"])


def _answer_ids(tok: Any, prompt_ids: list[int], prompt: str, answer: str, name: str) -> list[int]:
    """The token ids of ``answer``, the separator in front included, that follow those of the prompt."""
    joined = token_ids(tok, prompt + answer)
    if joined[: len(prompt_ids)] == prompt_ids:
        return joined[len(prompt_ids) :]
    wanted = _decode(tok, joined)
    for anchor in ANCHORS:
        before, both = token_ids(tok, anchor), token_ids(tok, anchor + answer)
        ids = both[len(before) :]
        if both[: len(before)] == before and _decode(tok, prompt_ids + ids) == wanted:
            return ids
    raise RequestError(
        f"{name}: the tokenizer merges the end of the prompt {prompt[-20:]!r} with the answer {answer!r} and has no "
        "tokens for that answer alone; end the prompt elsewhere"
    )


def _check_known(tok: Any, prompt: list[int], chosen: list[int], answer: str, name: str) -> None:
    """Raise where the tokens do not say ``answer``; case, white space and Unicode's forms may differ."""
    head, whole = _decode(tok, prompt), _decode(tok, prompt + chosen)
    said = whole[len(head) :] if whole.startswith(head) else _decode(tok, chosen)
    if _folded(said) == _folded(answer):
        return
    lost = [character for character in dict.fromkeys(answer) if _folded(character) not in _folded(said)]
    what = f"{' '.join(map(repr, lost))} of the target" if lost else "the target"
    raise RequestError(f"{name}: the tokenizer cannot write {what} {answer.strip()!r}; its tokens say {said!r}")


def _find_subject(tok: Any, request: Mapping[str, Any], name: str, prompt: list[int]) -> tuple[int, int]:
    """Where the tokens of the subject, where it stands last in the prompt, begin and where they have ended."""
    text, subject = request["prompt"], request["subject"].strip()
    # A chat template's end may say "assistant" or "model", which is no subject.
    end = chat_of(tok).end
    places = places_of(text, subject, len(text) - (len(end) if text.endswith(end) else 0))
    if not places:
        raise RequestError(f"{name}: 'subject' {subject!r} does not stand in the prompt {text!r}")
    start, stop = places[-1]
    if text[start:stop] != subject:
        say_once(f"the subject {subject!r} is taken for {text[start:stop]!r} in {text!r:.200}", name)
    if len(places) > 1:
        say_once(f"the subject {subject!r} stands more than once in {text!r:.200}; the last one is taken", name)
    # Characters are counted in what tokens say, so that whatever the tokenizer changes or loses counts on both sides.
    # Where a character has tokens of its bytes, only those ends of tokens are looked at that end a character too.
    preceding = token_ids(tok, text[:start].rstrip(" "))
    before = _length(tok, preceding)
    through = _length(tok, token_ids(tok, text[:stop]))
    begin = next((i for i, (a, b) in enumerate(zip(preceding, prompt, strict=False)) if a != b), len(preceding))
    begin = min(begin, len(prompt) - 1)
    while begin and _ends_within(tok, prompt[:begin]):
        begin -= 1
    reached = _length(tok, prompt[:begin])
    for n in range(begin + 1, len(prompt)):
        if _ends_within(tok, prompt[:n]):
            continue
        length = _length(tok, prompt[:n])
        if reached < length <= before:
            begin, reached = n, length
        if length >= through:
            return begin, n
    return begin, len(prompt)


def _guessed(tok: Any, text: str, name: str) -> str:
    """The subject of a prompt whose request names none."""
    chat = chat_of(tok)
    # A chat template may put a system's message before the question, which is about others.
    begin = text.rfind(chat.begin) + len(chat.begin) if chat.begin and chat.begin in text else 0
    inside = text[begin : len(text) - len(chat.end)] if chat.end and text.endswith(chat.end) else text
    for mark in chat.special:
        inside = inside.replace(mark, "\n")
    subject = subject_of(inside) or inside.strip()
    if not subject:
        raise RequestError(f"{name} has no 'subject', and none can be found in {text!r}")
    say_first("a subject", f"no 'subject' is given for {text!r:.200}; {subject!r} is taken", name)
    return subject


# Text -----------------------------------------------------------------------------------------------------------


def _decode(tok: Any, ids: list[int]) -> str:
    return str(tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _folded(text: str) -> str:
    return "".join(unicodedata.normalize("NFKD", text).casefold().split())


def _length(tok: Any, ids: list[int]) -> int:
    """How many characters ``ids`` say, spaces left out."""
    return len(_decode(tok, ids).replace(" ", ""))


def _ends_within(tok: Any, ids: list[int]) -> bool:
    """Whether the last character of ``ids`` lacks some of its bytes."""
    return _decode(tok, ids).endswith("\ufffd")
