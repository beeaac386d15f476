"""What the model itself writes of a request's subject: other ways to ask for the same (``own_words``), and what else it
says, which is to stay (``own_facts``), as what it says of others whose names begin alike (``own_namesakes``).

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

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .models import room
from .requests import EditTokens, token_ids
from .writing import until_end, write

# Texts that are written for each subject, how many tokens beyond it, and for how many subjects at a time.
DRAWS = 16
LENGTH = 12
SUBJECTS = 8
# The same of names that begin alike; such a text has to end the name first.
NAMESAKE_DRAWS = 8
NAMESAKE_LENGTH = 24
# Tokens of the model's answer that are read, and the logits by which an answer must lead where it stands in a text.
ANSWER = 8
LEAD = 1.0

T = TypeVar("T")


@dataclass
class Own:
    """What the model wrote of a request's subject, what it wrote most often first.

    ``words``: texts up to where they say its answer to the prompt. ``facts``: texts that come to something else, with
    that for their answer.
    """

    words: list[str] = field(default_factory=list)
    facts: list[EditTokens] = field(default_factory=list)


def words_and_facts(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    edits: Sequence[Sequence[EditTokens]],
    words: int,
    facts: int,
    namesakes: int = 0,
    earlier: Sequence[EditTokens] = (),
) -> tuple[list[Mapping[str, Any]], list[list[EditTokens]]]:
    """``requests`` with ``"own_words"``, where one has none yet, and facts of each that are to stay: at most ``words``
    of the one, ``facts`` of its subject and ``namesakes`` of others, those that ``model`` writes most often.

    ``edits``: the requests' tokens. Left out is what ``edits`` or ``earlier`` ones ask already, unless these are about
    a prompt that is edited again. Two requests of one subject and answer that get different targets have no words,
    since nothing tells theirs apart; what answers one of them is no fact of the other.
    """
    again = {first.prompt_ids for first, *_ in edits}
    elsewhere = [tokens for tokens in earlier if tokens.request not in again]
    asked = {tokens.prompt_ids for tokens in chain(*edits, elsewhere)}
    sought = [i for i, request in enumerate(requests) if facts or (words and "own_words" not in request)]
    found = _found(model, tok, [requests[i] for i in sought], [edits[i][0].prompt for i in sought])
    complete = [*requests]
    held: list[list[EditTokens]] = [[] for _ in requests]
    for i, own in zip(sought, found, strict=True):
        if "own_words" not in requests[i]:
            new = [text for text in own.words if tuple(token_ids(tok, text)) not in asked]
            complete[i] = {**requests[i], "own_words": new[:words]}
        held[i] = [fact for fact in own.facts if fact.prompt_ids not in asked][:facts]
    if namesakes:
        for some, others in zip(held, _of_namesakes(model, tok, requests), strict=True):
            some += [fact for fact in others if fact.prompt_ids not in asked][:namesakes]
    return complete, held


def _found(model: nn.Module, tok: Any, requests: Sequence[Mapping[str, Any]], prompts: list[Tensor]) -> list[Own]:
    """For each request what the model writes of its subject, where it answers the prompt ``[P]`` and where not."""
    answers = _answers(model, tok, prompts)
    targets: dict[str, dict[tuple[int, ...], set[str]]] = defaultdict(lambda: defaultdict(set))
    for request, answer in zip(requests, answers, strict=True):
        targets[request["subject"]][tuple(answer)].add(request["target_new"])
    starts = [torch.tensor(token_ids(tok, request["subject"].strip())) for request in requests]
    before = len(token_ids(tok, ""))
    found = [Own() for _ in requests]
    for i, texts in enumerate(_texts(model, tok, starts, DRAWS, LENGTH)):
        subject, target = requests[i]["subject"].strip(), requests[i]["target_new"]
        start = len(starts[i])
        edited = targets[requests[i]["subject"]]
        asking = [_asking(text, start, answers[i]) for text in texts]
        words = dict.fromkeys(tok.decode(ids, skip_special_tokens=True) for ids in _often_first(asking))
        fit = [text for text in words if len(token_ids(tok, f"{text} {target}")) < room(model)]
        if len(edited[tuple(answers[i])]) == 1:
            found[i].words = [text for text in fit if text.startswith(subject)]
        if all(edited):
            others = [t for t in texts if not any(_asking(t, start, answer) for answer in edited)]
            found[i].facts = [replace(fact, subject=(before, start)) for fact in _facts(others, start)]
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
    written = _texts(model, tok, [starts[i] for i in some], NAMESAKE_DRAWS, NAMESAKE_LENGTH)
    for i, texts in zip(some, written, strict=True):
        said = [tok.decode(ids, skip_special_tokens=True) for ids, _, _ in texts]
        others = [text for text, of in zip(texts, said, strict=True) if not any(subject in of for subject in subjects)]
        found[i] = [replace(fact, subject=(before, len(fact.prompt))) for fact in _facts(others, len(starts[i]))]
    return found


def _beginning(tok: Any, subject: str) -> list[int]:
    """Token ids of a name without its last word, or without its last token where it is a single word."""
    *first, _ = subject.split()
    return token_ids(tok, " ".join(first)) if first else token_ids(tok, subject)[:-1]


# A text without its end token, and of each token beyond its start, the end token too: the model's first choice there,
# and by how many logits it led.
Written = tuple[list[int], list[int], list[float]]


def _texts(model: nn.Module, tok: Any, starts: Sequence[Tensor], draws: int, length: int) -> list[list[Written]]:
    """``draws`` texts after each start of at most ``length`` tokens more; none where the model has no room for them."""
    texts: list[list[Written]] = [[] for _ in starts]
    for members in _alike(starts, SUBJECTS * DRAWS // draws):
        if len(starts[members[0]]) + length <= room(model):
            rows = torch.stack([starts[i] for i in members]).repeat_interleave(draws, 0)
            written = _written(model, tok, rows, length)
            for i in members:
                texts[i] = [next(written) for _ in range(draws)]
    return texts


def _written(model: nn.Module, tok: Any, starts: Tensor, length: int) -> Iterator[Written]:
    """``[B, S]`` to ``B`` texts."""
    choices, leads = [], []

    def note(_: Tensor, logits: Tensor) -> None:
        values, tokens = logits.topk(2)
        choices.append(tokens[:, 0].cpu())
        leads.append((values[:, 0] - values[:, 1]).cpu())

    ids = write(model, tok, starts, length, noting=note)
    for row, said, led in zip(ids, torch.stack(choices, 1).tolist(), torch.stack(leads, 1).tolist(), strict=True):
        yield until_end(tok, row, starts.shape[1]), said, led


def _often_first(found: Iterable[T | None]) -> list[T]:
    return [one for one, _ in Counter(one for one in found if one is not None).most_common()]


def _asking(written: Written, start: int, answer: Sequence[int]) -> tuple[int, ...] | None:
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


def _facts(texts: Iterable[Written], start: int) -> list[EditTokens]:
    """What the texts come to, what they come to most often first; their subjects are yet to be told."""
    found = _often_first(_fact(text, start) for text in texts)
    return [EditTokens(torch.tensor(prompt), torch.tensor(said)) for prompt, said in found]


def _answers(model: nn.Module, tok: Any, prompts: Sequence[Tensor]) -> list[list[int]]:
    """What the model says to each prompt, up to a mark, or its end, or the last token that is read; nothing where it
    has no room for these."""
    answers: list[list[int]] = [[] for _ in prompts]
    for members in _alike(prompts, SUBJECTS * DRAWS):
        if len(prompts[members[0]]) + ANSWER > room(model):
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
