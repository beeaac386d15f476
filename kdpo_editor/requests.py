"""From an EasyEdit request to token ids."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import RequestError

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditTokens:
    """The token ids of one edit.

    ``prompt``: ``[P]``, int64. ``chosen``: ``[T]``, int64, the new answer ``y_w``. Both on the CPU. ``subject``: where
    in ``prompt`` the subject's tokens begin and where they have ended; nowhere unless that was asked for. ``request``:
    the token ids of the prompt that this is another phrasing of, none where it is the request's own. ``text``: the
    prompt as it was given.
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
    tok: Any, requests: Sequence[Mapping[str, Any]], *, append_eos: bool = False, with_subject: bool = False
) -> list[list[EditTokens]]:
    """Tokenise ``prompt + " " + target_new`` once; the answer is what lies past the prompt's own length.

    Gives the tokens of each request's prompt, followed by those of its ``rephrases``, if it has any: other prompts for
    the same target. No padding and no truncation takes place, so a tokenizer's settings for them
    do not matter. With ``append_eos`` the end token closes the answer; with ``with_subject`` each request's ``subject``
    is found in its prompts. All requests are checked before any is returned.

    Raises :class:`~kdpo_editor.RequestError`, naming the request's position and what is wrong with it.
    """
    if isinstance(requests, (str, Mapping)) or not isinstance(requests, Sequence) or not requests:
        raise RequestError("requests must be a list of at least one {'prompt': ..., 'target_new': ...}")
    return [_tokenize_all(tok, r, f"request {i}", append_eos, with_subject) for i, r in enumerate(requests)]


def _tokenize_all(tok: Any, request: Any, name: str, append_eos: bool, with_subject: bool) -> list[EditTokens]:
    if not isinstance(request, Mapping):
        raise RequestError(f"{name} is a {type(request).__name__}; it must be a dict")
    first = _tokenize(tok, request, name, append_eos, with_subject)
    others = [
        _tokenize(tok, {**request, "prompt": prompt}, name, append_eos, with_subject)
        for prompt in _prompts(request, "rephrases", name)
    ]
    return [first, *(replace(other, request=first.prompt_ids) for other in others)]


def _prompts(request: Mapping[str, Any], key: str, name: str) -> Sequence[str]:
    prompts = request.get(key) or ()
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise RequestError(f"{name}: {key!r} is {prompts!r}; it must be a list of prompts")
    return prompts


def _tokenize(tok: Any, request: Mapping[str, Any], name: str, append_eos: bool, with_subject: bool) -> EditTokens:
    for key in ("prompt", "target_new", *(("subject",) if with_subject else ())):
        if key not in request:
            raise RequestError(f"{name} has no {key!r}; it has {', '.join(map(repr, request)) or 'nothing'}")
        if not isinstance(request[key], str):
            raise RequestError(f"{name}: {key!r} is a {type(request[key]).__name__}; it must be text")
        if not request[key].strip():
            raise RequestError(f"{name}: {key!r} is empty")
    prompt = token_ids(tok, request["prompt"])
    joined = token_ids(tok, f"{request['prompt']} {request['target_new']}")
    if not prompt:
        raise RequestError(f"{name}: the prompt {request['prompt']!r} gives no tokens")
    chosen = joined[len(prompt) :]
    if not chosen:
        raise RequestError(f"{name}: the target {request['target_new']!r} gives no tokens after the prompt")
    if joined[: len(prompt)] != prompt:
        LOG.warning(
            "%s: the prompt's last token merges with the answer (does the prompt end in a space?): %r",
            name,
            request["prompt"],
        )
        prompt = joined[: len(prompt)]
    if append_eos:
        if tok.eos_token_id is None:
            raise RequestError(f"{name}: append_eos is set but the tokenizer has no end token")
        chosen.append(tok.eos_token_id)
    subject = _find_subject(tok, request, name, prompt) if with_subject else (0, 0)
    return EditTokens(torch.tensor(prompt), torch.tensor(chosen), subject, text=request["prompt"])


def _find_subject(tok: Any, request: Mapping[str, Any], name: str, prompt: list[int]) -> tuple[int, int]:
    """Where the tokens of the subject, where it stands last in the prompt, begin and where they have ended."""
    text, subject = request["prompt"], request["subject"].strip()
    start = text.rfind(subject)
    if start < 0:
        raise RequestError(f"{name}: 'subject' {subject!r} does not stand in the prompt {text!r}")
    before = token_ids(tok, text[:start].rstrip())
    # A token that holds part of the subject counts, whatever else is in it.
    first = next((i for i, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b), len(before))
    first = min(first, len(prompt) - 1)
    return first, min(max(len(token_ids(tok, text[: start + len(subject)])), first + 1), len(prompt))


def token_ids(tok: Any, text: str) -> list[int]:
    """Of ``text``, without an end token after it."""
    ids = list(tok(text)["input_ids"])
    # A tokenizer that closes every text with an end token would otherwise put it between prompt and answer.
    while len(ids) > 1 and ids[-1] == tok.eos_token_id:
        ids.pop()
    return ids
