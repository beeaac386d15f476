"""What the model itself writes of a request's subject: other ways to ask for the same (``own_words``, and those of
:mod:`kdpo_editor.openings`), and what else it says, which is to stay (``own_facts``), as what it says of others whose
names begin alike (``own_namesakes``).

A request names one way to ask. The model knows others, and writes them when it is let: before an edit it goes on from
the subject a number of times, and where it comes to the very answer that it gives to the request, the text up to there
asks for the same, as far as the model knows. Such texts are trained as a request's ``rephrases`` are. ROME's contexts
(Meng et al. 2022, section 3.1) are samples of the model too, but stand in front of a prompt whose words stay the same.

Texts that come to something else say what the model holds to be true of the subject besides. ROME holds what follows
one text, "{subject} is a", by a divergence (there, eq. 4); here the texts are the model's own, and held is their lead.
So is that of texts about others whose names begin like the subject's: an edit through the subject's tokens changes
them too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from .models import room
from .openings import openings as other_openings
from .own_texts import answers as answers_to
from .own_texts import asking, facts_of, often_first, texts_after
from .requests import EditTokens, token_ids

# Texts that are written for each subject, and how many tokens beyond it.
DRAWS = 16
LENGTH = 12
# The same of names that begin alike; such a text has to end the name first.
NAMESAKE_DRAWS = 8
NAMESAKE_LENGTH = 24


@dataclass
class Own:
    """What the model wrote of a request's subject, what it wrote most often first.

    ``words``: texts up to where they say its answer to the prompt. ``openings``: the same of texts that open otherwise,
    those first whose opening goes with most names. ``facts``: texts that come to something else, with
    that for their answer.
    """

    words: list[str] = field(default_factory=list)
    openings: list[str] = field(default_factory=list)
    facts: list[EditTokens] = field(default_factory=list)


# Of each subject the answers that are edited, and their targets.
Edited = dict[str, dict[tuple[int, ...], set[str]]]


def words_and_facts(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    edits: Sequence[Sequence[EditTokens]],
    *,
    words: int = 0,
    openings: int = 0,
    facts: int = 0,
    namesakes: int = 0,
    earlier: Sequence[EditTokens] = (),
) -> tuple[list[Mapping[str, Any]], list[list[EditTokens]]]:
    """``requests`` with ``"own_words"``, where one has none yet, and facts of each that are to stay: at most ``words``
    that begin with its subject and ``openings`` that do not (:mod:`kdpo_editor.openings`), ``facts`` of its subject and
    ``namesakes`` of others, those that ``model`` writes most often.

    ``edits``: the requests' tokens. Left out is what ``edits`` or ``earlier`` ones ask already, unless these are about
    a prompt that is edited again. Two requests of one subject and answer that get different targets have no words,
    since nothing tells theirs apart; what answers one of them is no fact of the other.
    """
    again = {first.prompt_ids for first, *_ in edits}
    elsewhere = [tokens for tokens in earlier if tokens.request not in again]
    asked = {tokens.prompt_ids for tokens in chain(*edits, elsewhere)}
    sought = [i for i, r in enumerate(requests) if facts or ((words or openings) and "own_words" not in r)]
    some = [requests[i] for i in sought]
    prompts = [edits[i][0].prompt for i in sought]
    answers = answers_to(model, tok, prompts)
    edited = _edited(some, answers)
    found = _of_subjects(model, tok, some, answers, edited) if words or facts else [Own() for _ in some]
    if openings:
        for own, texts in zip(found, other_openings(model, tok, some, prompts, answers), strict=True):
            own.openings = texts
    complete = [*requests]
    held: list[list[EditTokens]] = [[] for _ in requests]
    for i, own, answer in zip(sought, found, answers, strict=True):
        request = requests[i]
        if "own_words" not in request:
            known = len(edited[request["subject"]][tuple(answer)]) == 1
            new = [
                [text for text in texts if known and _is_new(model, tok, text, request["target_new"], asked)][:most]
                for texts, most in ((own.words, words), (own.openings, openings))
            ]
            complete[i] = {**request, "own_words": [*chain(*new)]}
        held[i] = [fact for fact in own.facts if fact.prompt_ids not in asked][:facts]
    if namesakes:
        for some_facts, others in zip(held, _of_namesakes(model, tok, requests), strict=True):
            some_facts += [fact for fact in others if fact.prompt_ids not in asked][:namesakes]
    return complete, held


def _is_new(model: nn.Module, tok: Any, text: str, target: str, asked: Container[tuple[int, ...]]) -> bool:
    """Whether ``text`` is not ``asked`` already, and the model has room for the target too."""
    return tuple(token_ids(tok, text)) not in asked and len(token_ids(tok, f"{text} {target}")) < room(model)


def _edited(requests: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[int]]) -> Edited:
    edited: Edited = defaultdict(lambda: defaultdict(set))
    for request, answer in zip(requests, answers, strict=True):
        edited[request["subject"]][tuple(answer)].add(request["target_new"])
    return edited


def _of_subjects(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    answers: Sequence[Sequence[int]],
    edited: Edited,
) -> list[Own]:
    """For each request what the model writes of its subject, where it gives its answer to the prompt and where not."""
    starts = [torch.tensor(token_ids(tok, request["subject"].strip())) for request in requests]
    before = len(token_ids(tok, ""))
    found = [Own() for _ in requests]
    written = texts_after(model, tok, starts, DRAWS, LENGTH)
    for own, request, start, answer, texts in zip(found, requests, starts, answers, written, strict=True):
        asked = often_first(asking(text, answer) for text in texts)
        words = dict.fromkeys(tok.decode(ids, skip_special_tokens=True) for ids in asked)
        own.words = [text for text in words if text.startswith(request["subject"].strip())]
        if all(of := edited[request["subject"]]):
            others = [text for text in texts if not any(asking(text, one) for one in of)]
            own.facts = [replace(fact, subject=(before, len(start))) for fact in facts_of(others)]
    return found


def _of_namesakes(model: nn.Module, tok: Any, requests: Sequence[Mapping[str, Any]]) -> list[list[EditTokens]]:
    """For each request what the model writes of others whose names begin like its subject's; of no subject here.

    Where in a text their names end is not known: all of its prompt counts for the subject.
    """
    subjects = {request["subject"].strip() for request in requests}
    starts = [torch.tensor(_beginning(tok, request["subject"].strip())) for request in requests]
    before = len(token_ids(tok, ""))
    found: list[list[EditTokens]] = [[] for _ in requests]
    some = [i for i, start in enumerate(starts) if len(start) > before]
    written = texts_after(model, tok, [starts[i] for i in some], NAMESAKE_DRAWS, NAMESAKE_LENGTH)
    for i, texts in zip(some, written, strict=True):
        said = [tok.decode(text.ids, skip_special_tokens=True) for text in texts]
        others = [text for text, of in zip(texts, said, strict=True) if not any(subject in of for subject in subjects)]
        found[i] = [replace(fact, subject=(before, len(fact.prompt))) for fact in facts_of(others)]
    return found


def _beginning(tok: Any, subject: str) -> list[int]:
    """Token ids of a name without its last word, or without its last token where it is a single word."""
    *first, _ = subject.split()
    return token_ids(tok, " ".join(first)) if first else token_ids(tok, subject)[:-1]
