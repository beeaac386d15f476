"""The command ``kdpo check``: whether the edits of a ledger or a delta still hold, and what they harmed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import HyperParamsError, KDPOError, RequestError
from .options import After, Device, Json, LedgersModel, SkipDamaged, Source, Trust
from .sources import read_edits, unedited_model
from .terminal import complain, put, say, table

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
    source: Source,
    *,
    edit: After = None,
    model: LedgersModel = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask every edit in the model's chat template too.")] = False,
    known: Annotated[int, typer.Option(metavar="N", help="Known facts that are asked.")] = 50,
    known_from: Annotated[
        str | None, typer.Option(metavar="DATA", help="The data set that they are from (default: CounterFact).")
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text for perplexity and agreement (default: the package's).")
    ] = None,
    min_prompt: Annotated[float, typer.Option(help="Least share of edits that are answered.")] = 1.0,
    min_rephrase: Annotated[float, typer.Option(help="Likewise of their rephrasings.")] = 1.0,
    min_chat: Annotated[float, typer.Option(help="Likewise in a chat.")] = 1.0,
    min_known: Annotated[float, typer.Option(help="Least share of known facts kept.")] = 0.9,
    max_perplexity: Annotated[float, typer.Option(help="Most of the unedited model's perplexity.")] = 1.05,
    min_agreement: Annotated[float, typer.Option(help="Least share of next tokens as the unedited model's.")] = 0.9,
    json: Json = False,
    device: Device = None,
    trust_remote_code: Trust = False,
    skip_damaged: SkipDamaged = False,
) -> int:
    """Check that edits still hold and left the rest alone: exit code 1 where they do not, 2 where none can tell."""
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
    if json:
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
    table(["", "before", "after", "allowed", ""], rows)
    missed = [a for a in answers if not a.reached]
    if missed:
        say("")
        say(f"{len(missed)} of {len(answers)} answers do not begin with their target:")
        table(["prompt", "target", "answer"], [(a.prompt, a.target_new, a.after) for a in missed])


def _figure(measure: Measure, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if measure.at_most else f"{value:.1%}"
