"""Other ways to ask for a fact that open otherwise than with its subject (``own_openings``).

A model that goes on from a subject never writes what comes before one: *What is the occupation of*. Here it goes on
from what it says itself, a prompt with its answer and a full stop, to whatever comes next. Of the openings of many such
texts, those that are followed by one name here and by another there are where a name is asked about. Those are kept for
a request whose texts come to what might well answer it, the subject is put behind them, and where the model then comes
to the very answer that it gives to the request, the text up to there asks for the same, as far as the model knows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .engine.weights import as_found
from .own_texts import ROWS, alike, asking, texts_after
from .requests import token_ids

# Texts that are written behind each prompt, and at least in all, and their tokens; of these, those that may hold what a
# text comes to are the last.
DRAWS = 16
TEXTS = 1024
LENGTH = 24
LAST = 4
# An opening is one of several texts, followed by so many different words, and by no word more than so often on average.
WORDS = 3
OFTEN = 3
# Tokens that might answer a prompt, openings that are tried for it, and the tokens behind the subject.
LIKELY = 20
TRIED = 8
BEHIND = 10


def openings(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    prompts: Sequence[Tensor],
    answers: Sequence[Sequence[int]],
) -> list[list[str]]:
    """For each request the prompts that open otherwise, those first whose opening goes with most names.

    ``prompts``: the requests' token ids, ``[P]`` each; ``answers``: the model's, none of a request that is left out.
    """
    some = [i for i, answer in enumerate(answers) if answer]
    if not some:
        return [[] for _ in requests]
    said = [f"{requests[i]['prompt']} {tok.decode(answers[i]).strip()}." for i in some]
    names = _names_by_answer(model, tok, said)
    likely = dict(zip(some, _likely(model, tok, [prompts[i] for i in some]), strict=True))
    subjects = [request["subject"].strip() for request in requests]
    tried = [(i, opening) for i in some for opening in _best(names, likely[i])]
    starts = [torch.tensor(token_ids(tok, f"{opening} {subjects[i]}")) for i, opening in tried]
    found: list[list[str]] = [[] for _ in requests]
    written = texts_after(model, tok, starts, 1, BEHIND, greedy=True)
    for (i, _), texts in zip(tried, written, strict=True):
        asked = [ids for text in texts if (ids := asking(text, answers[i])) is not None]
        new = [tok.decode(ids, skip_special_tokens=True) for ids in asked]
        found[i] += [text for text in new if subjects[i] in text and not text.startswith(subjects[i])]
    return [[*dict.fromkeys(texts)] for texts in found]


def _names_by_answer(model: nn.Module, tok: Any, said: Sequence[str]) -> dict[int, dict[str, set[str]]]:
    """For each token that a text ends with, the openings of such texts, and of each the words that follow it there."""
    starts = [torch.tensor(token_ids(tok, text)) for text in said] * -(-TEXTS // (DRAWS * len(said)))
    ended: list[tuple[list[str], list[int]]] = []
    for texts in texts_after(model, tok, starts, DRAWS, LENGTH, apart=True):
        new = [text.new for text in texts if text.ended]
        ended += [(tok.decode(ids, skip_special_tokens=True).split(), ids[-LAST:]) for ids in new]
    divided = [[(" ".join(words[:n]), words[n], last) for n in range(1, len(words))] for words, last in ended]
    following: dict[str, list[str]] = defaultdict(list)
    for opening, word, _ in chain(*divided):
        following[opening].append(word)
    different = {opening: len(set(words)) for opening, words in following.items()}
    names: dict[int, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for opening, word, last in chain(*divided):
        if different[opening] >= WORDS and len(following[opening]) <= OFTEN * different[opening]:
            for token in last:
                names[token][opening].add(word)
    return names


@torch.no_grad()
def _likely(model: nn.Module, tok: Any, prompts: Sequence[Tensor]) -> list[list[int]]:
    """The tokens that the model holds most likely after each prompt, without the end token."""
    likely: list[list[int]] = [[] for _ in prompts]
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    with as_found(model):
        for members in alike(prompts, ROWS):
            logits = model(torch.stack([prompts[i] for i in members]).to(device)).logits[:, -1]
            for i, tokens in zip(members, logits.topk(min(LIKELY, logits.shape[-1])).indices.tolist(), strict=True):
                likely[i] = [token for token in tokens if token != tok.eos_token_id]
    return likely


def _best(names: Mapping[int, Mapping[str, set[str]]], likely: Sequence[int]) -> list[str]:
    """The openings that go with most names, two at least, in texts that end with a ``likely`` token."""
    together: dict[str, set[str]] = defaultdict(set)
    for token in likely:
        for opening, words in names.get(token, {}).items():
            together[opening] |= words
    several = [opening for opening, words in together.items() if len(words) > 1]
    return sorted(several, key=lambda opening: (-len(together[opening]), opening))[:TRIED]
