"""Names that a text mentions, which an edit must tell apart from its subject.

An edit through a subject's last token harms facts about other names most, since their last tokens are alike. Names are
few among a text's words, so they are read by themselves as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .contexts import TEMPLATES

CAPITAL = "[A-ZÀ-ÖØ-ÞΑ-ΩА-Я]"  # alphabets without capitals have no names here
# Words with capitals that do not begin a sentence, with the small words that stand inside names.
WORD = rf"{CAPITAL}[\w'\u2019-]+"
NAME = re.compile(rf"(?<![.!?:] )(?<!^)\b(?=\w{{3}}){WORD}(?: (?:(?:of the|of|de|der|du|la|van|von) )?{WORD})*")
MOST = 3000  # names
# What names and the texts that they are read in depend on, for what is kept of them on disk.
RULE = f"{NAME.pattern} {MOST} {TEMPLATES}"


def names_in(lines: Iterable[str]) -> list[str]:
    """The first different names in ``lines``, :data:`MOST` of them."""
    found: dict[str, None] = {}
    for line in lines:
        found.update(dict.fromkeys(NAME.findall(line)))
        if len(found) >= MOST:
            break
    return list(found)[:MOST]


def name_windows(tok: Any, names: Sequence[str], longest: int) -> list[Tensor]:
    """Token ids ``[S]``, int64, of each name alone and behind one of the context templates in turn.

    Left out are those of more than ``longest`` tokens and of a single one, which has no text before it.
    """
    texts = [text for i, name in enumerate(names) for text in (name, TEMPLATES[i % len(TEMPLATES)].format(name))]
    windows = [torch.tensor(tok(text)["input_ids"], dtype=torch.int64) for text in texts]
    return sorted((ids for ids in windows if 1 < len(ids) <= longest), key=len)
