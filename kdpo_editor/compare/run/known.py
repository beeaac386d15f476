"""Facts that a model knows: asked before any edit, to be asked again after.

A model knows a fact where its greedy answer begins with it. Candidates are the records of a data set with their old
answers; which of them a model knows is found once, in blocks, and kept in the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ...requests.tokens import token_ids
from .datasets import Record, content_hash, load
from .evaluate import Evaluator
from .unedited import Kept, kept_for

LOG = logging.getLogger(__name__)
BLOCK = 250  # candidates that are asked at a time, until enough are known
FEW = 5  # with fewer a share says nothing
# Candidates beyond those of a source, where it alone holds too few that a small model knows.
MORE = {"counterfact": ["counterfact-known"]}
MARGIN = 3  # tokens generated beyond those of the answer: it may be told in others, and its last word must end


def known_facts(
    evaluator: Evaluator,
    source: str,
    most: int,
    edited: Sequence[Record],
    kept: Kept | None = None,
) -> list[Record]:
    """Records of ``source`` whose ``ground_truth`` the model gives, in the order of the data, at most ``most``.

    Where ``counterfact`` holds too few of them, ``counterfact-known`` is asked, too. None of them is about a
    subject of ``edited``. ``kept``: where answers are kept; the package's cache by default. Warns where there are fewer
    than a handful, and then gives none.
    """
    kept = kept or kept_for(evaluator.model)
    subjects = {_subject(record) for record in edited}
    prompts = {record.prompt for record in edited}
    sources = [source, *MORE.get(source, [])]
    candidates = [record for name in sources for record in load(name, shuffle=False) if record.ground_truth]
    found: list[Record] = []
    for start in range(0, len(candidates), BLOCK):
        block = candidates[start : start + BLOCK]
        known = kept({"known": content_hash(block)}, lambda block=block: right(evaluator, block))  # type: ignore[misc]
        found += [
            record
            for record, knows in zip(block, known, strict=True)
            if knows and _subject(record) not in subjects and record.prompt not in prompts
        ]
        if len(found) >= most:
            break
    if len(found) < min(FEW, most):
        LOG.warning(
            "the model knows %d of %d facts of %s: too few to measure known", len(found), len(candidates), source
        )
        return []
    return found[:most]


def right(evaluator: Evaluator, facts: Sequence[Record]) -> list[bool]:
    """For each of ``facts``, whether the greedy answer begins with its ``ground_truth``."""
    lengths = [len(token_ids(evaluator.tok, f" {fact.ground_truth}")) + MARGIN for fact in facts]
    found = [False] * len(facts)
    for length in sorted(set(lengths)):
        asked = [i for i, own in enumerate(lengths) if own == length]
        for i, said in zip(asked, evaluator.generate([facts[i].prompt for i in asked], length), strict=True):
            found[i] = said.answers([facts[i].ground_truth])
    return found


def _subject(record: Record) -> str:
    return (record.subject or record.prompt).casefold()
