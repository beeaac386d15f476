"""What the buttons of ``kdpo ui`` do: ask a model before and after its edits, edit it, undo, pack the adapter."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from ..compare.run.datasets import Record
from ..compare.run.retrieval import words_of
from ..edits.ledger import EditLedger
from ..edits.switching import unedited
from ..engine.generation import answers
from ..errors import KDPOError, LedgerError, RequestError
from ..hparams import KDPOHyperParams
from ..requests.answers import begins_with
from ..requests.chat import as_chat

OFFERED = 3
# Words that do not tell what a prompt asks for.
FILLERS = frozenset({"a", "an", "the", "is", "was", "of", "in"})
Asked = list[tuple[str, str]]
"""Kind and prompt of each question."""


@dataclass(frozen=True)
class Form:
    """What the user typed. ``rephrasings`` are prompts and ``subjects`` other subjects, one a line."""

    prompt: str = ""
    subject: str = ""
    target: str = ""
    rephrasings: str = ""
    subjects: str = ""

    def questions(self) -> Asked:
        """All that the model is asked.

        Raises :class:`~kdpo_editor.RequestError` where other subjects are named, but none that the prompt contains.
        """
        asked = [("edit", self.prompt)] if self.prompt.strip() else []
        asked += [("rephrasing", line) for line in _lines(self.rephrasings)]
        subject, others = self.subject.strip(), _lines(self.subjects)
        if others and not (subject and subject in self.prompt):
            raise RequestError(f"other subjects take the subject's place, but {self.prompt!r} has no {subject!r}")
        return asked + [("neighbour", self.prompt.replace(subject, other)) for other in others]


def offer(prompt: str, subject: str, records: Sequence[Record]) -> tuple[str, str]:
    """Rephrasings of a prompt and other subjects, one a line, from the records whose prompt is most like it.

    It has the same words besides its subject, in any order and apart from :data:`FILLERS`.
    """
    subject = subject.strip()
    alike: dict[str, list[Record]] = {}
    for record in records:
        if record.subject_in_prompt:
            alike.setdefault(record.prompt.replace(record.subject, "{}"), []).append(record)
    wanted = prompt.replace(subject, "{}") if subject else ""
    asked = words_of(wanted) - FILLERS
    same = [template for template in alike if asked and words_of(template) - FILLERS == asked]
    found = [record for template in get_close_matches(wanted, same, n=1, cutoff=0) for record in alike[template]]
    phrased = [_about(subject, text, r.subject) for r in found for text in r.rephrase_prompts if r.subject in text]
    others = [r.subject for r in found if r.subject != subject]
    return "\n".join(list(dict.fromkeys(phrased))[:OFFERED]), "\n".join(others[:OFFERED])


class Trial:
    """A model that is being tried out.

    Args:
        model: in any state that ``ledger`` knows.
        tok: its tokenizer.
        ledger: open for writing; each edit goes into it.
        settings: of the edits.
        longest: tokens of an answer.
        chat: put prompts into the model's chat template.
    """

    def __init__(
        self, model: nn.Module, tok: Any, ledger: EditLedger, settings: KDPOHyperParams, longest: int, chat: bool
    ) -> None:
        self.model, self.tok, self.ledger, self.settings = model, tok, ledger, settings
        self.longest, self.chat = longest, chat

    def press(self, action: Callable[[Form], str], *fields: str) -> tuple[str, str | None]:
        """Do what a button says between asking before and after; what happened and the answers, both as HTML.

        After an error: its text and ``None``, nothing being changed.
        """
        form = Form(*fields)
        try:
            asked = form.questions()
            with unedited(self.model):
                before = self._answers(asked)
            said = action(form)
            after = self._answers(asked) if self.ledger.head else before
        except KDPOError as error:
            return error_text(error), None
        return f"<p>{escape(said)}</p>", _table(asked, before, after, form.target if self.ledger.head else "")

    def ask(self, form: Form) -> str:
        """Say which edits stand."""
        standing = [" → ".join(filter(None, (r.get("subject"), r["target_new"]))) for r in self.ledger.requests]
        count = "1 edit stands" if len(standing) == 1 else f"{len(standing)} edits stand"
        return f"{count}: {', '.join(standing)}." if standing else "No edit stands."

    def edit(self, form: Form) -> str:
        """Edit the model so that it answers the prompt with the new answer."""
        request: dict[str, Any] = {"prompt": self._framed(form.prompt), "target_new": form.target}
        if form.subject.strip():
            request["subject"] = form.subject.strip()
        if rephrasings := _lines(form.rephrasings):  # kept for `kdpo check`; they are not trained
            request["rephrase_prompt"] = [self._framed(line) for line in rephrasings]
        start = time.perf_counter()
        *_, (trace,) = self.ledger.edit(self.model, self.tok, [request], self.settings)
        reached = "reached its target" if trace.converged else "did not reach its target"
        return f"Edit {self.ledger.head} {reached}: {trace.steps} steps, {time.perf_counter() - start:.1f} s."

    def undo(self, form: Form) -> str:
        """Take the last edit back, bit for bit."""
        number = self.ledger.head
        self.ledger.undo(model=self.model)
        return f"Edit {number} is undone. {self.ask(form)}"

    def adapter(self, folder: Path) -> Path:
        """Write the edits that stand as a LoRA adapter, zipped, into ``folder``; the zip file.

        Raises :class:`~kdpo_editor.LedgerError` where no edit stands; other errors as :meth:`EditDelta.save_lora`.
        """
        if self.ledger.head == 0:
            raise LedgerError("no edit stands; there is no adapter to download")
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        self.ledger.delta(self.ledger.head, since=0).save_lora(folder / "adapter", self.model, self.tok)
        return Path(shutil.make_archive(str(folder / "adapter"), "zip", folder, "adapter"))

    def _framed(self, prompt: str) -> str:
        return as_chat(self.tok, prompt) if self.chat else prompt

    def _answers(self, asked: Asked) -> list[str]:
        return answers(self.model, self.tok, [self._framed(prompt) for _, prompt in asked], self.longest)


def error_text(error: Exception) -> str:
    """What the page shows of an error, as HTML."""
    return f'<p class="error">Nothing was changed: {escape(str(error))}</p>'


def _table(asked: Asked, before: Sequence[str], after: Sequence[str], target: str) -> str:
    """The answers as an HTML table, with a verdict on each where a ``target`` is given."""
    rows = []
    for (kind, prompt), old, new in zip(asked, before, after, strict=True):
        good = new == old if kind == "neighbour" else bool(target) and begins_with(new, target)
        word = ("kept" if good else "changed") if kind == "neighbour" else ("new answer" if good else "not reached")
        verdict = f'<b class="{"good" if good else "bad"}">{word}</b>' if target else ""
        cells = (("prompt", escape(prompt)), ("before", escape(old)), ("after", f"{escape(new)} {verdict}"))
        texts = "".join(f'<td data-head="{head}">{text}</td>' for head, text in cells)
        rows.append(f'<tr class="{kind}"><th scope="row">{kind}</th>{texts}</tr>')
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("", "prompt", "before", "after"))
    return f'<table class="answers"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _about(subject: str, text: str, other: str) -> str:
    """The sentence of ``text`` that is about ``other``, about ``subject`` instead; CounterFact puts one before it."""
    before, _, after = text.partition(other)
    return re.split(r"\. |\n", before)[-1] + subject + after


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
