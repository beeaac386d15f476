"""Context templates: short texts before a prompt, so that an edit holds wherever its subject is spoken of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Sentences about something else, of the text in this folder. On validation records more known facts are kept than with
# openings of two or three words.
TEMPLATES = (
    "It has a blade that folds into the handle. {}",
    "Usually, it means people going around the world. {}",
    "The top of the mountain is mostly covered by snow and glaciers. {}",
)


def in_contexts(tok: Any, requests: Sequence[Mapping[str, Any]], count: int) -> Sequence[Mapping[str, Any]]:
    """The requests, each with its prompt behind ``count`` of :data:`TEMPLATES` among its ``"rephrases"``.

    A prompt that begins with a special token, such as a chat template's, has no text before it and gets none.
    Malformed requests come out as they went in, for :func:`~kdpo_editor.requests.tokens.tokenize` to refuse.
    """
    if not count or isinstance(requests, (str, Mapping)):
        return requests
    special = tuple(tok.all_special_tokens)
    return [_in_contexts(request, special, count) for request in requests]


def _in_contexts(request: Any, special: tuple[str, ...], count: int) -> Any:
    prompt = request.get("prompt") if isinstance(request, Mapping) else None
    others = request.get("rephrases") or () if isinstance(request, Mapping) else None
    if not isinstance(prompt, str) or not isinstance(others, (list, tuple)) or prompt.startswith(special):
        return request
    return {**request, "rephrases": [*others, *(template.format(prompt) for template in TEMPLATES[:count])]}
