"""What a model writes when it goes on from some tokens, and what its texts come to."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .engine.writing import Written, write
from .models import room
from .requests import EditTokens

# Texts that are written at a time.
ROWS = 128
# Tokens of the model's answer that are read, and the logits by which an answer must lead where it stands in a text.
ANSWER = 8
LEAD = 1.0

T = TypeVar("T")


def texts_after(
    model: nn.Module,
    tok: Any,
    starts: Sequence[Tensor],
    draws: int,
    length: int,
    *,
    greedy: bool = False,
    apart: bool = False,
) -> list[list[Written]]:
    """``draws`` texts after each start, ``[S]`` int64, of at most ``length`` tokens more; none where the model has no
    room for them.

    ``greedy``: the model's first choices. ``apart``: drawn anew for each few starts, as is needed where the starts
    have little to say in what follows.
    """
    texts: list[list[Written]] = [[] for _ in starts]
    for number, members in enumerate(alike(starts, max(1, ROWS // draws))):
        if len(starts[members[0]]) + length <= room(model):
            rows = torch.stack([starts[i] for i in members])
            written = write(model, tok, rows, length, draws=draws, greedy=greedy, seed=number if apart else 0)
            for row, i in enumerate(members):
                texts[i] = written[row * draws : (row + 1) * draws]
    return texts


def often_first(found: Iterable[T | None]) -> list[T]:
    """What is found, without ``None``, each once, what is found most often first."""
    return [one for one, _ in Counter(one for one in found if one is not None).most_common()]


def asking(text: Written, answer: Sequence[int]) -> tuple[int, ...] | None:
    """The text up to where it says ``answer``, as the model would by all means; not right after its start."""
    ids, start = text.ids, text.start
    answer = list(answer)
    for at in range(start + 1, len(ids) - len(answer) + 1) if answer else ():
        here = slice(at - start, at - start + len(answer))
        if ids[at : at + len(answer)] == text.choices[here] == answer and text.leads[here.start] >= LEAD:
            return tuple(ids[:at])
    return None


def _fact(text: Written) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """A text that came to its end, divided where all that follows is what the model would say by all means; not right
    after its start."""
    if not text.ended:
        return None
    ids, start = text.ids, text.start
    at = len(ids)
    while at > start + 1 and ids[at - 1] == text.choices[at - 1 - start] and text.leads[at - 1 - start] >= LEAD:
        at -= 1
    return (tuple(ids[:at]), tuple(ids[at:])) if at < len(ids) else None


def facts_of(texts: Iterable[Written]) -> list[EditTokens]:
    """What the texts come to, what they come to most often first; their subjects are yet to be told."""
    found = often_first(_fact(text) for text in texts)
    return [EditTokens(torch.tensor(prompt), torch.tensor(said)) for prompt, said in found]


def answers(model: nn.Module, tok: Any, prompts: Sequence[Tensor]) -> list[list[int]]:
    """What the model says to each prompt, ``[P]`` int64, up to a mark, or its end, or the last token that is read;
    nothing where it has no room for these."""
    answers: list[list[int]] = [[] for _ in prompts]
    written = texts_after(model, tok, prompts, 1, ANSWER, greedy=True)
    for answer, texts in zip(answers, written, strict=True):
        for token in chain(*(text.new for text in texts)):
            text = tok.decode([token])
            marks = [unicodedata.category(c).startswith("P") for c in text.strip()]
            if "\n" in text or (marks and all(marks)):
                break
            answer.append(token)
    return answers


def alike(rows: Sequence[Tensor], most: int) -> Iterator[list[int]]:
    """The positions of ``rows``, ``[L]`` each, in groups of at most ``most`` of the same length."""
    lengths = defaultdict(list)
    for i, row in enumerate(rows):
        lengths[len(row)].append(i)
    for members in lengths.values():
        for first in range(0, len(members), most):
            yield members[first : first + most]
