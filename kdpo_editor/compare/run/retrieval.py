"""Retrieval instead of editing: the edits that a prompt may be about are put before it, and no weight is changed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Retrieval:
    """A model beside a list of facts (``prompt``, ``target_new``, ``subject``). It answers as the model does.

    ``hparams.most``: facts before a prompt at most. ``hparams.least``: the similarity that a fact needs where its
    subject is not in the prompt; ``None`` finds facts by their subjects alone. ``hparams.template``: how a fact is
    put, with ``{prompt}`` and ``{target}``.
    """

    def __init__(self, model: Any, facts: Sequence[Mapping[str, Any]], hparams: Any) -> None:
        self.model, self.facts, self.hparams = model, list(facts), hparams
        self.words = [words_of(fact["prompt"]) for fact in self.facts]
        self.counts = Counter(word for words in self.words for word in words)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does."""
        return self.model.generate(*args, **kwargs)

    def context(self, prompt: str) -> str:
        """What is put before ``prompt``, the most similar fact last; ``""`` where no fact is found."""
        scores = [(self._score(i, prompt), i) for i in range(len(self.facts))]
        best = sorted((found for found in scores if found[0] > 0), reverse=True)[: self.hparams.most]
        chosen = [self.facts[i] for _, i in reversed(best)]
        parts = re.split(r"\{(prompt|target)\}", self.hparams.template)  # text and names in turn
        keys = {"prompt": "prompt", "target": "target_new"}
        return "".join(fact[keys[part]] if i % 2 else part for fact in chosen for i, part in enumerate(parts))

    def _score(self, i: int, prompt: str) -> float:
        """Over 1 where the subject is in ``prompt``, else the similarity of the words if that is enough, else 0."""
        similar = self._similarity(self.words[i], words_of(prompt))
        subject = str(self.facts[i].get("subject") or "")
        if subject and re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt, re.IGNORECASE):
            return 1 + similar
        least = self.hparams.least
        return similar if least is not None and similar >= least else 0.0

    def _similarity(self, one: set[str], other: set[str]) -> float:
        """The cosine of two bags of words, each word weighted by how few of the facts have it."""

        def square(words: Iterable[str]) -> float:
            return sum(math.log(1 + len(self.facts) / (self.counts[word] or 1)) ** 2 for word in words)

        norm = math.sqrt(square(one) * square(other))
        return square(one & other) / norm if norm else 0.0


def apply_retrieval_to_model(
    model: Any, tok: Any, requests: Sequence[Mapping[str, Any]], hparams: Any, **kwargs: Any
) -> tuple[Retrieval, dict[str, Any]]:
    """Add ``requests`` to the facts beside ``model``; one with a prompt that is there already takes its place."""
    base, facts = (model.model, model.facts) if isinstance(model, Retrieval) else (model, [])
    by_prompt = {fact["prompt"]: fact for fact in [*facts, *requests]}
    return Retrieval(base, list(by_prompt.values()), hparams), {}


def words_of(text: str) -> set[str]:
    """The different words of ``text``, without regard to case."""
    return set(re.findall(r"\w+", text.casefold()))
