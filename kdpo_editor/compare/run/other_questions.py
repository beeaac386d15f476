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
    # What stands around the subject in each prompt.
    forms = {i: tuple(r.prompt.split(r.subject)) for i, r in enumerate(edited) if r.subject_in_prompt}
    words = {form: _words(" ".join(form)) for form in sorted(set(forms.values()))}
    found = []
    for i, form in forms.items():
        record = edited[i]
        own = words[form] | _words(" ".join(record.rephrase_prompts))
        others = [other for other in words if not own & words[other]]
        some = random.Random(f"{seed} {i}").sample(others, min(each, len(others)))
        prompts = [record.subject.join(other) for other in some]
        found += [(i, replace(record, prompt=prompt, ground_truth=record.target_new)) for prompt in prompts]
    return found


def _words(text: str) -> set[str]:
    return set(WORD.findall(text.casefold()))
