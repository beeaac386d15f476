"""What a model writes when it goes on from some tokens, and what its texts come to."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .models import room
from .requests import EditTokens
from .writing import until_end, write

# Texts that are written at a time.
ROWS = 128
# Tokens of the model's answer that are read, and the logits by which an answer must lead where it stands in a text.
ANSWER = 8
LEAD = 1.0

T = TypeVar("T")

# A text without its end token, and of each token beyond its start, the end token too: the model's first choice there,
# and by how many logits it led.
Written = tuple[list[int], list[int], list[float]]


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
            rows = torch.stack([starts[i] for i in members]).repeat_interleave(draws, 0)
            written = _written(model, tok, rows, length, greedy, number if apart else 0)
            for i in members:
                texts[i] = [next(written) for _ in range(draws)]
    return texts


def _written(model: nn.Module, tok: Any, starts: Tensor, length: int, greedy: bool, seed: int) -> Iterator[Written]:
    """``[B, S]`` to ``B`` texts."""
    choices, leads = [], []

    def note(_: Tensor, logits: Tensor) -> None:
        values, tokens = logits.topk(2)
        choices.append(tokens[:, 0].cpu())
        leads.append((values[:, 0] - values[:, 1]).cpu())

    ids = write(model, tok, starts, length, greedy=greedy, seed=seed, noting=note)
    for row, said, led in zip(ids, torch.stack(choices, 1).tolist(), torch.stack(leads, 1).tolist(), strict=True):
        yield until_end(tok, row, starts.shape[1]), said, led


def often_first(found: Iterable[T | None]) -> list[T]:
    """What is found, without ``None``, each once, what is found most often first."""
    return [one for one, _ in Counter(one for one in found if one is not None).most_common()]


def asking(written: Written, start: int, answer: Sequence[int]) -> tuple[int, ...] | None:
    """The text up to where it says ``answer``, as the model would by all means; not right after its start."""
    ids, said, led = written
    answer = list(answer)
    for at in range(start + 1, len(ids) - len(answer) + 1) if answer else ():
        here = slice(at - start, at - start + len(answer))
        if ids[at : at + len(answer)] == said[here] == answer and led[here.start] >= LEAD:
            return tuple(ids[:at])
    return None


def _fact(written: Written, start: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """A text that came to its end, divided where all that follows is what the model would say by all means; not right
    after its start."""
    ids, said, led = written
    at = len(ids)
    if at - start == len(said):
        return None
    while at > start + 1 and ids[at - 1] == said[at - 1 - start] and led[at - 1 - start] >= LEAD:
        at -= 1
    return (tuple(ids[:at]), tuple(ids[at:])) if at < len(ids) else None


def facts_of(texts: Iterable[Written], start: int) -> list[EditTokens]:
    """What the texts come to, what they come to most often first; their subjects are yet to be told."""
    found = often_first(_fact(text, start) for text in texts)
    return [EditTokens(torch.tensor(prompt), torch.tensor(said)) for prompt, said in found]


def answers(model: nn.Module, tok: Any, prompts: Sequence[Tensor]) -> list[list[int]]:
    """What the model says to each prompt, ``[P]`` int64, up to a mark, or its end, or the last token that is read;
    nothing where it has no room for these."""
    answers: list[list[int]] = [[] for _ in prompts]
    written = texts_after(model, tok, prompts, 1, ANSWER, greedy=True)
    for answer, prompt, texts in zip(answers, prompts, written, strict=True):
        for token in chain(*(ids[len(prompt) :] for ids, _, _ in texts)):
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
