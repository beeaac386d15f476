"""Other questions about an edited subject, which an edit should not answer.

An edit may teach a model to say the new answer whenever the subject is named, whatever is asked. Rephrasings and
questions about other subjects do not show that. So each edited subject is put into prompts of other edits, of which no
longer word stands in its own prompt or rephrasings.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from .datasets import Record

WORD = re.compile(r"\w{4,}")


def other_questions(edited: Sequence[Record], each: int, seed: int = 0) -> list[tuple[int, Record]]:
    """For each of ``edited``, by its position, at most ``each`` records that ask something else of its subject.

    Their ``ground_truth`` is the edit's new answer. A record whose prompt lacks its subject gets none and lends none.
    """
    forms = {i: _form(record) for i, record in enumerate(edited) if record.subject_in_prompt}
    different = sorted(set(forms.values()))
    found = []
    for i in forms:
        record = edited[i]
        own = _words(" ".join([record.prompt.replace(record.subject, " "), *record.rephrase_prompts]))
        others = [form for form in different if not own & _words(" ".join(form))]
        some = random.Random(f"{seed} {i}").sample(others, min(each, len(others)))
        for form in some:
            found.append((i, replace(record, prompt=record.subject.join(form), ground_truth=record.target_new)))
    return found


def _form(record: Record) -> tuple[str, ...]:
    """What stands around the subject in the prompt."""
    return tuple(record.prompt.split(record.subject))


def _words(text: str) -> set[str]:
    return set(WORD.findall(text.casefold()))
