"""The command ``kdpo check``: whether the edits of a ledger or a delta still hold, and what they harmed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..edits.measures import figure, label
from ..errors import HyperParamsError, KDPOError, RequestError, explained
from .options import After, Device, Json, LedgersModel, SkipDamaged, Trust
from .sources import Edits, read_edits
from .terminal import complain, put, say, table

if TYPE_CHECKING:
    from .checking import Answer, Measure, Probes

VERDICTS = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}


def _share(text: str) -> Any:
    return typer.Option(metavar="SHARE", help=text)


def check(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A ledger or a saved delta.")],
    edit: After = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask each edit in the model's chat template too.")] = False,
    known: Annotated[int, typer.Option(metavar="N", help="Facts that the model knows to ask, 0 for none.")] = 50,
    known_from: Annotated[
        str | None, typer.Option(metavar="NAME", help="The data set that they are from (default: CounterFact).")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to read (default: the package's held-out paragraphs).")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A task of lm-evaluation-harness; can be repeated.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(metavar="N", help="Examples of each task at most.")] = None,
    min_prompt: Annotated[float, _share("The least share of edits answered.")] = 1.0,
    min_rephrase: Annotated[float, _share("The least share of their rephrasings answered.")] = 1.0,
    min_chat: Annotated[float, _share("The least share of edits answered in a chat.")] = 1.0,
    min_known: Annotated[float, _share("The least share of known facts kept.")] = 0.9,
    max_perplexity: Annotated[float, typer.Option(metavar="X", help="Times the unedited model's, at most.")] = 1.05,
    min_agreement: Annotated[float, _share("The least share of next tokens that both models choose.")] = 0.9,
    max_task_loss: Annotated[float, _share("The most that a task's figure may go down.")] = 0.02,
    json: Json = False,
    model: LedgersModel = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    skip_damaged: SkipDamaged = False,
) -> int:
    """Check that edits still hold and left the rest alone; exits with 1 where they do not, with 2 where it cannot.

    Everything is asked of the unedited model and of the edited one. An edit is answered where the answer begins with
    its target.
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
        loaded = edits.load(model, device, trust_remote_code)
        probes = _probes(loaded[0], chat, known, known_from, text, task or (), task_limit)
        measures, answers = examine(*loaded, edits.delta, probes, bounds)
    except (KDPOError, OSError, ModuleNotFoundError) as error:
        complain(explained(error))
        return 2
    for measure in measures:
        if measure.holds is None:
            complain(f"{label(measure.name)}: not measured; the model knows too little of it, or there is no text")
    holds = all(measure.holds is not False for measure in measures)
    if json:
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
    text: Path | None,
    tasks: Sequence[str],
    task_limit: int | None,
) -> Probes:
    from ..compare.run.scorer import HELD_OUT
    from ..compare.run.statistics import read_text
    from ..testbed import SHIPPED_MODEL, unedited_texts
    from .checking import Probes

    # The shipped model knows its records' facts and no other facts or texts.
    shipped = Path(str(model.config._name_or_path)).name == SHIPPED_MODEL
    documents = unedited_texts() if shipped and text is None else read_text(text or HELD_OUT)
    source = known_from or ("shipped" if shipped else "counterfact")
    return Probes(chat, known, source, documents, tasks, task_limit)


def _record(
    source: Path, edits: Edits, model: str | None, measures: list[Measure], answers: list[Answer], holds: bool
) -> dict[str, Any]:
    from ..edits.manifest import state_hash

    return {
        "source": str(source),
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
            f"{label(m.name)} ({m.count})" if m.count and not m.at_most else label(m.name),
            figure(m.name, m.before, "-"),
            figure(m.name, m.after, "-"),
            f"at {'most' if m.at_most else 'least'} {figure(m.name, m.bound, '-')}",
            VERDICTS[m.holds],
        )
        for m in measures
    ]
    table(["", "before", "after", "allowed", ""], rows)
    missed = [a for a in answers if not a.reached]
    if missed:
        say(f"{len(missed)} of {len(answers)} answers do not begin with their target:")
        table(["prompt", "target", "answer"], [(a.prompt, a.right[0], a.after) for a in missed])
