"""Answers as a user meets them: WILD (Yang et al. 2025, "The Mirage of Model Editing", arXiv 2502.11177).

The edit's prompt and its rephrasings are asked in three forms: alone, in an instruction, and as a chat by the model's
own template where it has one. The answer is generated greedily, up to fifty tokens, and ends where the model ends it or
at the first full stop or line break. It is right where it is the new answer and nothing more; a judge may be asked too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from ...requests.answers import is_answer
from ...requests.chat import as_chat
from ...requests.tokens import token_ids
from .datasets import Record
from .evaluate import Evaluator
from .judge import Judge

INSTRUCTION = "Please answer the question:\n\nQ: {}\nA:"  # the paper's
LONGEST = 50

Answers = dict[str, list[dict[str, Any]]]
"""By ``<group>.<form>``: of each prompt ``prompt``, ``wanted``, ``text``, ``stopped``, and ``judged``, ``None`` where
there is no judge."""


def forms(tok: Any, prompt: str) -> dict[str, list[int]]:
    """Token ids of ``prompt`` in each form."""
    found = {"question": token_ids(tok, prompt), "instruction": token_ids(tok, INSTRUCTION.format(prompt))}
    if getattr(tok, "chat_template", None):
        found["chat"] = tok(as_chat(tok, prompt), add_special_tokens=False)["input_ids"]
    return found


def observe(evaluator: Evaluator, records: Sequence[Record], judge: Judge | None) -> list[Answers]:
    """What is answered to each of ``records`` in each form, batched over all of them."""
    asked = [
        (i, f"{group}.{form}", prompt, ids)
        for i, record in enumerate(records)
        for group, prompts in (("rewrite", (record.prompt,)), ("rephrase", record.rephrase_prompts))
        for prompt in prompts
        for form, ids in forms(evaluator.tok, evaluator.asked(prompt)).items()
    ]
    found: list[Answers] = [{} for _ in records]
    said = evaluator.go_on([ids for *_, ids in asked], LONGEST)
    for (i, kind, prompt, _), (whole, stopped) in zip(asked, said, strict=True):
        text = first_sentence(whole)
        wanted = records[i].target_new
        judged = judge(prompt, wanted, text) if judge else None
        entry = {"prompt": prompt, "wanted": wanted, "text": text, "stopped": stopped or text != whole.strip()}
        found[i].setdefault(kind, []).append({**entry, "judged": judged})
    return found


def first_sentence(text: str) -> str:
    """What stands before the first full stop or line break."""
    return text.split(".", 1)[0].split("\n", 1)[0].strip()


def rows(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, float]]:
    """``wild.<group>.<form>_em``, the share of exact matches, and ``..._judge``, that of answers judged right."""
    for kind, said in answers.items():
        yield f"wild.{kind}_em", fmean(is_answer(entry["text"], entry["wanted"]) for entry in said)
        if all(entry["judged"] is not None for entry in said):
            yield f"wild.{kind}_judge", fmean(entry["judged"] for entry in said)
