"""What ``kdpo demo`` does: edit real facts in a real pretrained model through EasyEdit, three methods side by side."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tqdm import tqdm

from .. import easyedit
from ..compare.run.datasets import Record, load
from ..compare.run.derived_settings import derive
from ..compare.run.evaluate import Evaluator, Reading
from ..compare.run.known import known_facts, right
from ..compare.run.scorer import HELD_OUT
from ..compare.run.scores import Outputs, observe, rows
from ..compare.run.statistics import read_text
from ..editing import prepare
from ..engine.generation import answers
from ..hparams import KDPOHyperParams, settings_folder
from ..models.loading import outline, whole_name
from .terminal import say as say_line

KNOWN = 30  # facts about other subjects that are asked
DOCUMENTS = 4  # of the held-out text
LONGEST = 8  # tokens of an answer


@dataclass
class Before:
    """What the unedited model says. ``known``: facts about other subjects that it answers right."""

    outputs: list[Outputs]
    known: list[Record]
    reading: Reading
    words: list[list[str]]


def run(model: str, edits: int, show: int, device: str | int) -> None:
    """Edit the first ``edits`` CounterFact records by each method, and print what happened.

    Raises ``ModuleNotFoundError`` where EasyEdit is not installed.
    """
    easyedit.require()
    model = whole_name(model)  # the framework loads it from another folder
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    records = load("counterfact", seed=0)[:edits]
    form = "upstream checkout" if easyedit.is_upstream() else "PyPI release"
    say(f"EasyEdit's {form} edits {len(records)} CounterFact records in {model}, one after another.")
    before: Before | None = None
    lines = []
    for label, hparams in methods(model, device).items():
        with easyedit.quietly():
            editor = timed(editor_for(hparams))
        evaluator = Evaluator(editor.model, editor.tok, progress=f"{label}: asking")
        if before is None:
            evaluator.progress = "before any edit"
            before = ask_before(evaluator, records, show)
        start = time.perf_counter()
        if isinstance(hparams, KDPOHyperParams):
            prepare(editor.model, editor.tok, hparams)
        set_up = time.perf_counter() - start
        seconds = [edit(editor, record) for record in tqdm(records, desc=label, unit="edit", disable=None, leave=False)]
        lines.append((label, [*score(evaluator, records, before), fmean(seconds), set_up]))
        if label == "KDPO-L":
            say_in_words(records[:show], before.words, ask_in_words(evaluator, records[:show]))
    assert before is not None
    say_table(before, lines)


def methods(model: str, device: str | int) -> dict[str, Any]:
    """Settings of the methods compared, as the installed form reads them, by the name in the table."""
    ft = "FT-M" if easyedit.is_upstream() else "FT-L"
    found: dict[str, Any] = {
        "KDPO": KDPOHyperParams(model_name=model, device=device),
        "KDPO-L": KDPOHyperParams.from_hparams(settings_folder() / "KDPO-L" / "auto", model_name=model),
    }
    found["KDPO-L"].device = device
    found[ft], _ = easyedit.settings({**derive(ft, outline(model), model), "device": device})
    return found


def editor_for(hparams: Any) -> Any:
    """EasyEdit's ``BaseEditor`` for these settings."""
    from easyeditor import BaseEditor

    return BaseEditor.from_hparams(hparams)


def timed(editor: Any, clock: Callable[[], float] = time.perf_counter) -> Any:
    """``editor``, noting in ``editor.seconds`` how long by ``clock`` its method took for the last edit."""
    method: Callable[..., Any] = editor.apply_algo

    def apply(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        result = method(*args, **kwargs)
        editor.seconds = clock() - start
        return result

    editor.apply_algo = apply
    return editor


def edit(editor: Any, record: Record) -> float:
    """Edit one record through the framework and keep the edit; the seconds that its method took."""
    keep = {"sequential_edit": True} if easyedit.is_upstream() else {"keep_original_weight": False}
    with easyedit.quietly():
        editor.edit(
            prompts=[record.prompt],
            target_new=[record.target_new],
            ground_truth=[record.ground_truth],
            subject=[record.subject],
            verbose=False,
            **keep,
        )
    return float(editor.seconds)


def ask_before(evaluator: Evaluator, records: Sequence[Record], show: int) -> Before:
    """Ask the unedited model everything that an edited one is asked."""
    known = known_facts(evaluator, "counterfact", KNOWN, records)
    return Before(
        observe(evaluator, records, LONGEST, fluency=0),
        known,
        evaluator.read(read_text(HELD_OUT)[:DOCUMENTS]),
        ask_in_words(evaluator, records[:show]),
    )


def score(evaluator: Evaluator, records: Sequence[Record], before: Before) -> list[float]:
    """Success, rephrasings, neighbours kept, known facts kept, and perplexity, after all edits."""
    now = observe(evaluator, records, LONGEST, fluency=0)
    of_all = [dict(rows(r, old, new)) for r, old, new in zip(records, before.outputs, now, strict=True)]
    means = [fmean(of[metric] for of in of_all) for metric in ("rewrite_acc", "rewrite_gen", "rephrase_acc", LOCALITY)]
    still = right(evaluator, before.known)
    return [*means, fmean(still) if still else math.nan, evaluator.read(read_text(HELD_OUT)[:DOCUMENTS]).perplexity]


LOCALITY = "locality.neighborhood_acc"
COLUMNS = ("success", "generated", "rephrase", "neighbours", "known", "perplexity", "s/edit", "set-up")


def ask_in_words(evaluator: Evaluator, records: Sequence[Record]) -> list[list[str]]:
    """The answers to each record's prompt, rephrasing and neighbour."""
    return [answers(evaluator.model, evaluator.tok, prompts_of(record), LONGEST) for record in records]


def prompts_of(record: Record) -> list[str]:
    """A record's prompt, a rephrasing of it, and a prompt about another subject."""
    return [record.prompt, record.rephrase_prompts[0], record.locality["neighborhood"][0].prompt]


def say_in_words(records: Sequence[Record], before: Sequence[list[str]], after: Sequence[list[str]]) -> None:
    """Print what the model said and says to some records."""
    say("\nIn words, before any edit and after all edits by KDPO-L:")
    for record, old, new in zip(records, before, after, strict=True):
        say(f"\n{record.subject}: {record.ground_truth} -> {record.target_new}")
        kinds = ("edited", "rephrased", "neighbour")
        for kind, prompt, was, now in zip(kinds, prompts_of(record), old, new, strict=True):
            # An answer of several lines is shown on one.
            say_line(f"  {kind:<10} {prompt}")
            say_line(f"  {'':<10} before: {was}")
            say_line(f"  {'':<10} after:  {now}")


def say_table(before: Before, lines: Sequence[tuple[str, list[float]]]) -> None:
    """Print the comparison."""
    say(f"\n{'method':<8}" + "".join(f"{column:>11}" for column in COLUMNS))
    for label, values in lines:
        say(f"{label:<8}" + "".join(f"{value:>11.2f}" for value in values))
    known, perplexity = len(before.known), before.reading.perplexity
    say(
        "\nAfter the last edit. success, rephrase: share of the new answer's tokens, under teacher forcing; generated:"
        "\nthe greedy answer begins with it. neighbours: tokens as before the edits. known: of "
        f"{known} facts about other\nsubjects answered right, those still right. perplexity: of held-out text, "
        f"{perplexity:.2f} before.\nset-up: seconds, once for each model."
    )


def say(text: str) -> None:
    """Print lines, at once."""
    for line in text.split("\n"):
        say_line(line)
    sys.stdout.flush()
