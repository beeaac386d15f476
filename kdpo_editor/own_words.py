"""Other ways to ask for the same, in the model's own words (``own_words``).

A request names one way to ask. The model knows others, and writes them when it is let: before an edit it goes on from
the subject a number of times, and where it comes to the very answer that it gives to the request, the text up to there
asks for the same, as far as the model knows. Such texts are trained as a request's ``rephrases`` are. ROME's contexts
(Meng et al. 2022, section 3.1) are samples of the model too, but stand in front of a prompt whose words stay the same.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from .requests import EditTokens, token_ids
from .writing import until_end, write

# Texts that are written for each subject, how many tokens beyond it, and for how many subjects at a time.
DRAWS = 16
LENGTH = 12
SUBJECTS = 8
# Tokens of the model's answer that are read, and the logits by which it must lead where it stands in a text.
ANSWER = 8
LEAD = 1.0


def with_own_words(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    edits: Sequence[Sequence[EditTokens]],
    most: int,
    earlier: Sequence[EditTokens] = (),
) -> list[Mapping[str, Any]]:
    """``requests`` with ``"own_words"``, where one has none yet: at most ``most`` prompts each, those that ``model``
    writes most often.

    ``edits``: the requests' tokens. Left out is what ``edits`` or ``earlier`` ones ask already, unless these are about
    a prompt that is edited again. Two requests of one subject and answer that get different targets have none, since
    nothing tells their words apart.
    """
    again = {first.prompt_ids for first, *_ in edits}
    elsewhere = [tokens for tokens in earlier if tokens.request not in again]
    asked = {tokens.prompt_ids for tokens in chain(*edits, elsewhere)}
    sought = [i for i, request in enumerate(requests) if "own_words" not in request]
    found = _found(model, tok, [requests[i] for i in sought], [edits[i][0].prompt for i in sought])
    complete = [*requests]
    for i, texts in zip(sought, found, strict=True):
        new = [text for text in texts if tuple(token_ids(tok, text)) not in asked]
        complete[i] = {**requests[i], "own_words": new[:most]}
    return complete


def _found(model: nn.Module, tok: Any, requests: Sequence[Mapping[str, Any]], prompts: list[Tensor]) -> list[list[str]]:
    """For each request what the model writes of its subject up to its answer to the prompt ``[P]``, often first."""
    room = getattr(model.config, "max_position_embeddings", None) or inf
    answers = _answers(model, tok, prompts, room)
    targets = defaultdict(set)
    for request, answer in zip(requests, answers, strict=True):
        targets[request["subject"], tuple(answer)].add(request["target_new"])
    starts = [torch.tensor(token_ids(tok, request["subject"].strip())) for request in requests]
    found: list[list[str]] = [[] for _ in requests]
    for members in _alike(starts, SUBJECTS):
        if len(starts[members[0]]) + LENGTH > room:
            continue
        written = _written(model, tok, torch.stack([starts[i] for i in members]).repeat_interleave(DRAWS, 0))
        for i in members:
            subject, target = requests[i]["subject"].strip(), requests[i]["target_new"]
            asking = [_asking(next(written), len(starts[i]), answers[i]) for _ in range(DRAWS)]
            often = [ids for ids, _ in Counter(filter(None, asking)).most_common()]
            texts = dict.fromkeys(tok.decode(ids, skip_special_tokens=True) for ids in often)
            fit = [text for text in texts if len(token_ids(tok, f"{text} {target}")) < room]
            if len(targets[requests[i]["subject"], tuple(answers[i])]) == 1:
                found[i] = [text for text in fit if text.startswith(subject)]
    return found


# A text, and of each token beyond its start: the model's first choice there, and by how many logits it led.
Written = tuple[list[int], list[int], list[float]]


def _written(model: nn.Module, tok: Any, starts: Tensor) -> Iterator[Written]:
    """``[B, S]`` to ``B`` texts."""
    choices, leads = [], []

    def note(_: Tensor, logits: Tensor) -> None:
        values, tokens = logits.topk(2)
        choices.append(tokens[:, 0].cpu())
        leads.append((values[:, 0] - values[:, 1]).cpu())

    ids = write(model, tok, starts, LENGTH, noting=note)
    for row, said, led in zip(ids, torch.stack(choices, 1).tolist(), torch.stack(leads, 1).tolist(), strict=True):
        yield until_end(tok, row, starts.shape[1]), said, led


def _asking(written: Written, start: int, answer: list[int]) -> tuple[int, ...] | None:
    """The text up to where it says ``answer``, as the model would by all means; not right after its start."""
    ids, said, led = written
    for at in range(start + 1, len(ids) - len(answer) + 1) if answer else ():
        here = slice(at - start, at - start + len(answer))
        if ids[at : at + len(answer)] == said[here] == answer and led[here.start] >= LEAD:
            return tuple(ids[:at])
    return None


def _answers(model: nn.Module, tok: Any, prompts: Sequence[Tensor], room: float) -> list[list[int]]:
    """What the model says to each prompt, up to a mark, or its end, or the last token that is read; nothing where
    ``room``, in tokens, would be left."""
    answers: list[list[int]] = [[] for _ in prompts]
    for members in _alike(prompts, SUBJECTS * DRAWS):
        if len(prompts[members[0]]) + ANSWER > room:
            continue
        rows = write(model, tok, torch.stack([prompts[i] for i in members]), ANSWER, greedy=True)
        for i, row in zip(members, rows, strict=True):
            start = len(prompts[i])
            for token in until_end(tok, row, start)[start:]:
                text = tok.decode([token])
                marks = [unicodedata.category(c).startswith("P") for c in text.strip()]
                if "\n" in text or (marks and all(marks)):
                    break
                answers[i].append(token)
    return answers


def _alike(rows: Sequence[Tensor], most: int) -> Iterator[list[int]]:
    """The positions of ``rows`` in groups of at most ``most`` of the same length."""
    lengths = defaultdict(list)
    for i, row in enumerate(rows):
        lengths[len(row)].append(i)
    for members in lengths.values():
        for first in range(0, len(members), most):
            yield members[first : first + most]
