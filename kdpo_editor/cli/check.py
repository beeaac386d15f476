"""The command ``kdpo check``: whether the edits of a ledger or a delta still hold, and what they harmed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HyperParamsError, KDPOError, RequestError
from .sources import read_edits, unedited_model
from .terminal import columns, complain, put, say

if TYPE_CHECKING:
    from .checking import Answer, Measure, Probes

LABELS = {
    "prompt": "edits answered",
    "rephrase": "rephrasings answered",
    "chat": "edits answered in a chat",
    "known": "known facts kept",
    "perplexity": "perplexity",
    "agreement": "next tokens alike",
}
VERDICTS = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}


def check(
    source: str,
    *,
    edit: int | None = None,
    model: str | None = None,
    chat: bool = False,
    known: int = 50,
    known_from: str | None = None,
    text: str | None = None,
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    min_prompt: float = 1.0,
    min_rephrase: float = 1.0,
    min_chat: float = 1.0,
    min_known: float = 0.9,
    max_perplexity: float = 1.05,
    min_agreement: float = 0.9,
    max_task_loss: float = 0.02,
    as_json: bool = False,
    device: str | int | None = None,
    trust_remote_code: bool = False,
    skip_damaged: bool = False,
) -> int:
    """Check that edits still hold and left the rest alone, for a person or for someone's CI.

    Args:
        source: a ledger's folder or a saved delta's.
        edit: up to which edit of the ledger; by default its head.
        model: the unedited model, where the edits do not name it or it lies elsewhere.
        chat: ask every edit in the model's chat template too.
        known: how many facts that the unedited model knows are asked, 0 for none.
        known_from: the data set that they are from; by default CounterFact.
        text: a text file that perplexity and agreement are measured on; by default the package's held-out paragraphs.
        tasks: of the evaluation harness, by name or as task files; none are run by default.
        task_limit: examples of each task at most.
        min_prompt: the least share of edits whose answer begins with the target.
        min_rephrase: likewise of their rephrasings, where they have some.
        min_chat: likewise in a chat.
        min_known: the least share of known facts kept.
        max_perplexity: the most that the perplexity may be, as a multiple of the unedited model's.
        min_agreement: the least share of next tokens that the unedited model chooses too.
        max_task_loss: the most that a task's figure may be below the unedited model's.
        as_json: write one JSON record rather than a table.
        device: CUDA index, "cpu" or "cuda:1"; by default the GPU where there is one.
        trust_remote_code: run code that comes with the model.
        skip_damaged: leave out damaged lines of the ledger.

    Returns:
        0: everything that was measured keeps to its bound. 1: something does not. 2: it could not be checked.
    """
    shares = {"min_prompt": min_prompt, "min_rephrase": min_rephrase, "min_chat": min_chat, "min_known": min_known,
              "min_agreement": min_agreement, "max_task_loss": max_task_loss}  # fmt: skip
    try:
        _check_usage(shares, max_perplexity, known, task_limit)
        from .checking import Bounds, examine

        bounds = Bounds(min_prompt, min_rephrase, min_chat, min_known, max_perplexity, min_agreement, max_task_loss)
        edits = read_edits(source, edit=edit, skip_damaged=skip_damaged)
        if not edits.delta.info.requests:
            raise RequestError(f"{source} does not say what was asked of its edits; there is nothing to check")
        loaded = unedited_model(edits, model, device=device, trust_remote_code=trust_remote_code)
        probes = _probes(loaded[0], chat, known, known_from, text, tasks, task_limit)
        measures, answers = examine(*loaded, edits.delta, probes, bounds)
    except (KDPOError, OSError, ModuleNotFoundError) as error:
        complain(str(error))
        return 2
    for measure in measures:
        if measure.holds is None:
            complain(f"{_label(measure)}: not measured; the model knows too little of it, or there is no text")
    holds = all(measure.holds is not False for measure in measures)
    if as_json:
        put(_record(source, edits, model, measures, answers, holds))
    else:
        _say_table(measures, answers)
    return 0 if holds else 1


def _check_usage(shares: dict[str, float], max_perplexity: float, known: int, task_limit: int | None) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise HyperParamsError(f"--{name.replace('_', '-')} {value}: it must be a share, from 0 to 1")
    if not (math.isfinite(max_perplexity) and max_perplexity > 0):
        raise HyperParamsError(f"--max-perplexity {max_perplexity}: it must be a multiple, above 0")
    if known < 0:
        raise HyperParamsError(f"--known {known}: it must be a number from 0")
    if task_limit is not None and task_limit < 1:
        raise HyperParamsError(f"--task-limit {task_limit}: it must be a number from 1")


def _probes(
    model: Any,
    chat: bool,
    known: int,
    known_from: str | None,
    text: str | None,
    tasks: Sequence[str],
    task_limit: int | None,
) -> Probes:
    from ..compare.run.scorer import HELD_OUT
    from ..compare.run.statistics import read_text
    from ..testbed import SHIPPED_MODEL, taught_texts
    from .checking import Probes

    # The shipped model knows what it was taught and no other facts or texts.
    shipped = Path(str(model.config._name_or_path)).name == SHIPPED_MODEL
    documents = taught_texts("recent")[::9] if shipped and text is None else read_text(text or HELD_OUT)
    source = known_from or ("shipped" if shipped else "counterfact")
    return Probes(chat, known, source, documents, tasks, task_limit)


def _record(
    source: str, edits: Any, model: str | None, measures: list[Measure], answers: list[Answer], holds: bool
) -> dict[str, Any]:
    from ..edits.manifest import state_hash

    return {
        "source": source,
        "edit": edits.number,
        "model": model or edits.model_name,
        "edits": len(edits.delta.info.requests),
        "state_sha256": state_hash(edits.delta.changes),
        "holds": holds,
        "measures": [measure.to_json() for measure in measures],
        "answers": [answer.to_json() for answer in answers],
    }


def _say_table(measures: list[Measure], answers: list[Answer]) -> None:
    rows = [
        (
            f"{_label(m)} ({m.count})" if m.count and not m.at_most else _label(m),
            _figure(m, m.before),
            _figure(m, m.after),
            f"at {'most' if m.at_most else 'least'} {_figure(m, m.bound)}",
            VERDICTS[m.holds],
        )
        for m in measures
    ]
    for line in columns(["", "before", "after", "allowed", ""], rows):
        say(line)
    missed = [a for a in answers if not a.reached]
    if missed:
        say("")
        say(f"{len(missed)} of {len(answers)} answers do not begin with their target:")
        for line in columns(["prompt", "target", "answer"], [(a.prompt, a.right[0], a.after) for a in missed]):
            say(line)


def _label(measure: Measure) -> str:
    return LABELS.get(measure.name, measure.name.removeprefix("tasks."))


def _figure(measure: Measure, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if measure.at_most else f"{value:.1%}"
