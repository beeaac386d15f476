"""The command ``kdpo check``: whether the edits of a ledger or a delta still hold, and what they harmed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HyperParamsError, KDPOError, RequestError
from .sources import read_edits, unedited_model
from .terminal import columns, complain, put, say

if TYPE_CHECKING:
    from .checking import Answer, Bounds, Measure

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
    min_prompt: float = 1.0,
    min_rephrase: float = 1.0,
    min_chat: float = 1.0,
    min_known: float = 0.9,
    max_perplexity: float = 1.05,
    min_agreement: float = 0.9,
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
        min_prompt: the least share of edits whose answer begins with the target.
        min_rephrase: likewise of their rephrasings, where they have some.
        min_chat: likewise in a chat.
        min_known: the least share of known facts kept.
        max_perplexity: the most that the perplexity may be, as a multiple of the unedited model's.
        min_agreement: the least share of next tokens that the unedited model chooses too.
        as_json: write one JSON record rather than a table.
        device: CUDA index, "cpu" or "cuda:1"; by default the GPU where there is one.
        trust_remote_code: run code that comes with the model.
        skip_damaged: leave out damaged lines of the ledger.

    Returns:
        0: everything that was measured keeps to its bound. 1: something does not. 2: it could not be checked.
    """
    shares = {"min_prompt": min_prompt, "min_rephrase": min_rephrase, "min_chat": min_chat, "min_known": min_known,
              "min_agreement": min_agreement}  # fmt: skip
    try:
        _check_usage(shares, max_perplexity, known)
        from .checking import Bounds

        bounds = Bounds(min_prompt, min_rephrase, min_chat, min_known, max_perplexity, min_agreement)
        edits = read_edits(source, edit=edit, skip_damaged=skip_damaged)
        if not edits.delta.info.requests:
            raise RequestError(f"{source} does not say what was asked of its edits; there is nothing to check")
        loaded = unedited_model(edits, model, device=device, trust_remote_code=trust_remote_code)
        measures, answers = _examine(loaded, edits.delta, bounds, chat, known, known_from, text)
    except (KDPOError, OSError, ModuleNotFoundError) as error:
        complain(str(error))
        return 2
    for measure in measures:
        if measure.holds is None:
            complain(f"{LABELS[measure.name]}: not measured; the model knows too little of it, or there is no text")
    holds = all(measure.holds is not False for measure in measures)
    if as_json:
        put(_record(source, edits, model, measures, answers, holds))
    else:
        _say_table(measures, answers)
    return 0 if holds else 1


def _check_usage(shares: dict[str, float], max_perplexity: float, known: int) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise HyperParamsError(f"--{name.replace('_', '-')} {value}: it must be a share, from 0 to 1")
    if not (math.isfinite(max_perplexity) and max_perplexity > 0):
        raise HyperParamsError(f"--max-perplexity {max_perplexity}: it must be a multiple, above 0")
    if known < 0:
        raise HyperParamsError(f"--known {known}: it must be a number from 0")


def _examine(
    loaded: tuple[Any, Any],
    delta: Any,
    bounds: Bounds,
    chat: bool,
    known: int,
    known_from: str | None,
    text: str | None,
) -> tuple[list[Measure], list[Answer]]:
    from ..compare.run.scorer import HELD_OUT
    from ..compare.run.statistics import read_text
    from ..testbed import SHIPPED_MODEL, taught_texts
    from .checking import Probes, examine

    model, tok = loaded
    # The shipped model knows what it was taught and no other facts or texts.
    shipped = Path(str(model.config._name_or_path)).name == SHIPPED_MODEL
    documents = taught_texts("recent")[::9] if shipped and text is None else read_text(text or HELD_OUT)
    source = known_from or ("shipped" if shipped else "counterfact")
    return examine(model, tok, delta, Probes(chat, known, source, documents), bounds)


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
            f"{LABELS[m.name]} ({m.count})" if not m.at_most else LABELS[m.name],
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
        for line in columns(["prompt", "target", "answer"], [(a.prompt, a.target_new, a.after) for a in missed]):
            say(line)


def _figure(measure: Measure, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if measure.at_most else f"{value:.1%}"
