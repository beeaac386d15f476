"""``kdpo edit`` and ``kdpo apply``: put edits into a ledger."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from ..errors import EditDiverged, KDPOError, RequestError
from ..hparams import KDPOHyperParams
from ..tracking import Track, tracking
from .loading import load_model, stored_dtype, writable_ledger
from .options import (
    Changes,
    Device,
    DtypeOption,
    HParams,
    LogTo,
    Model,
    Out,
    Recipe,
    RecipeOption,
    SkipDamaged,
    Trust,
    Wait,
)
from .settings import chosen_settings, derived
from .terminal import complain, put

if TYPE_CHECKING:
    from ..edits.ledger import EditLedger
    from ..requests.tokens import EditTokens

Requests = list[tuple[str, dict[str, Any]]]
"""Requests, each with where it stands."""

# Of so many edits in a row KDPO's still hold, on the models that were measured; of fifty half are lost.
FEW = 10
# The fields of a request that are prompts, or lists of such.
PROMPTS = ("prompt", "rephrases", "rephrase_prompt")


def edit(
    model: Model,
    out: Out,
    prompt: Annotated[str | None, typer.Option(help="What the model is asked.")] = None,
    target: Annotated[str | None, typer.Option(help="What it shall answer.")] = None,
    subject: Annotated[
        str | None, typer.Option(help="What the prompt asks about, word for word (for fact_token).")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompts into the model's own chat template.")] = False,
    file: Annotated[
        str | None, typer.Option(metavar="JSONL", help='Edits, one a line; "-" reads standard input.')
    ] = None,
    hparams: HParams = None,
    recipe: RecipeOption = Recipe.KDPO,
    changes: Changes = None,
    dtype: DtypeOption = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Skip what cannot be edited.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out edits that are in the ledger already.")] = False,
    log_to: LogTo = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    wait: Wait = 0.0,
    skip_damaged: SkipDamaged = False,
) -> int:
    """Edit a model, request by request, each journaled before the next."""
    from ..derived import complete
    from ..editing import check

    if file is not None and (prompt, target, subject) != (None, None, None):
        raise typer.BadParameter("give either --file, or --prompt, --target and, where it is needed, --subject")
    if file is None and (prompt is None or target is None):
        raise typer.BadParameter("give --prompt and --target, or --file")
    settings, _ = chosen_settings(model, hparams, recipe.value, changes or ())
    if file is None:
        request = {"prompt": prompt, "target_new": target} | ({} if subject is None else {"subject": subject})
        requests: Requests = [("--prompt", request)]
        skipped: list[str] = []
    else:
        requests, skipped = _read(file)
    if skipped and not keep_going:
        return _nothing(skipped, "with --keep-going such lines are skipped")
    if len(requests) > FEW and recipe is Recipe.KDPO and hparams is None:
        complain(f"the recipe KDPO is for single edits: {len(requests)} last better with --recipe KDPO-L")
    with writable_ledger(out, wait, skip_damaged, made=True) as ledger:
        wanted = dtype.value if dtype else stored_dtype(ledger) or ("float16" if settings.fp16 else "float32")
        loaded, tok = load_model(model, wanted, settings.device if device is None else device, trust_remote_code)
        if chat:
            requests = [(where, _in_chat(tok, request)) for where, request in requests]
        found = complete(settings, loaded)
        if found != settings:
            complain(f"from the model's structure: {derived(settings, found)}; kdpo settings prints all settings")
        good: Requests = []
        phrasings = {}
        for where, request in requests:
            try:
                [phrasings[where]], _ = check(loaded, tok, [request], found, [where])
                good.append((where, request))
            except KDPOError as error:
                skipped.append(str(error))
        if (len(good) < len(requests) and not keep_going) or not good:
            return _nothing(skipped, "" if keep_going or not good else "--keep-going skips such requests")
        for text in skipped:
            complain(text)
        ledger.restore(loaded)
        todo = _not_done(good, ledger.requests) if resume else good
        if len(todo) < len(good):
            complain(f"{len(good) - len(todo)} of {len(good)} edits are in the ledger already")
        if found.schedule == "breadth_first":
            todo, clashes = _without_clashes(todo, phrasings)
            if clashes and not keep_going:
                return _nothing(clashes, "--keep-going skips such requests")
            for text in clashes:
                complain(text)
            skipped += clashes
        guessed = _guessed(tok, todo, phrasings) if found.needs_subject else {}
        try:
            with tracking(log_to.value if log_to else None, out.name, found.to_dict()) as track:
                missed = _edit_all(ledger, loaded, tok, todo, found, keep_going, track, guessed)
        except KeyboardInterrupt:
            complain(f"the edits reported are in {out}, and the same command with --resume goes on from there")
            raise
    return 1 if missed or skipped else 0


def apply(
    delta: Annotated[
        list[Path], typer.Argument(metavar="DELTA...", help="Folders that kdpo export --as delta or EditDelta made.")
    ],
    model: Model,
    out: Out,
    dtype: DtypeOption = None,
    force: Annotated[bool, typer.Option("--force", help="Add the difference even if the model is another.")] = False,
    device: Device = None,
    trust_remote_code: Trust = False,
    wait: Wait = 0.0,
    skip_damaged: SkipDamaged = False,
) -> int:
    """Apply saved deltas to a model's ledger."""
    from ..edits.delta import EditDelta
    from ..edits.manifest import dtype_of

    deltas = [EditDelta.load(path) for path in delta]
    with writable_ledger(out, wait, skip_damaged, made=True) as ledger:
        stored = next(filter(None, (dtype_of(one.changes) for one in deltas)), "float32")
        wanted = dtype.value if dtype else stored_dtype(ledger) or stored
        loaded, _ = load_model(model, wanted, device, trust_remote_code)
        ledger.restore(loaded)
        for path, one in zip(delta, deltas, strict=True):
            ledger.apply(loaded, one, force=force, model_name=model)
            put({"edit": ledger.head, "delta": str(path), "requests": len(one.info.requests), "bytes": one.nbytes})
    return 0


def _nothing(why: list[str], hint: str) -> int:
    """Say that nothing was edited; the exit code."""
    for text in why:
        complain(text)
    complain("nothing was edited" + (f"; {hint}" if hint else ""))
    return 1


def _read(file: str) -> tuple[Requests, list[str]]:
    """The requests of a file, and what is wrong with other lines."""
    from .request_file import read_lines

    name = "stdin" if file == "-" else file
    if file == "-":
        lines = read_lines(sys.stdin.buffer, name)
    else:
        with open(file, "rb") as stream:
            lines = read_lines(stream, name)
    if not lines:
        raise RequestError(f"{name} has no requests")
    good = [(f"{name}, line {line.number}", line.request) for line in lines if line.request is not None]
    return good, [line.error for line in lines if line.error is not None]


def _edit_all(
    ledger: EditLedger,
    model: Any,
    tok: Any,
    todo: Requests,
    hparams: KDPOHyperParams,
    keep_going: bool,
    track: Track,
    guessed: Mapping[str, str],
) -> int:
    """Edit one by one, or all at once if the schedule says so; the number that failed or missed their target.

    ``guessed``: the subjects that were guessed, by where their requests stand; each is told with its edit.
    """
    together = hparams.schedule == "breadth_first"
    groups = [todo] if together and todo else [[one] for one in todo]
    missed = 0
    with tqdm(total=len(todo), unit="edit", disable=None) as bar:
        for group in groups:
            requests = [request for _, request in group]
            start = time.perf_counter()
            try:
                _, _, traces = ledger.edit(model, tok, requests, hparams)
            except EditDiverged as error:
                if not keep_going:
                    raise EditDiverged(f"{group[0][0]}: {error}") from None
                for where, request in group:
                    put({**_named(request), "error": str(error)})
                    complain(f"{where}: {error}")
                missed += len(group)
                continue
            for (where, request), trace in zip(group, traces, strict=True):
                told = _named(request) | ({"subject": guessed[where]} if where in guessed else {})
                put({"edit": ledger.head, **told, "converged": trace.converged, "steps": trace.steps})
                missed += not trace.converged
            won = sum(trace.converged for trace in traces) / len(traces)
            steps = sum(trace.steps for trace in traces) / len(traces)
            track({"converged": won, "steps": steps, "seconds": time.perf_counter() - start}, ledger.head)
            bar.update(len(group))
    return missed


def _guessed(tok: Any, todo: Requests, phrasings: Mapping[str, Sequence[EditTokens]]) -> dict[str, str]:
    """The subject that is taken for each request without one, by where it stands."""
    without = [where for where, request in todo if "subject" not in request]
    own = {where: phrasings[where][0] for where in without}
    return {where: tok.decode(tokens.prompt_ids[slice(*tokens.subject)]).strip() for where, tokens in own.items()}


def _in_chat(tok: Any, request: dict[str, Any]) -> dict[str, Any]:
    """``request`` with its prompts in the model's chat template, as the ledger keeps it: so it is asked again."""
    from ..requests.chat import as_chat

    def framed(prompts: Any) -> Any:
        return [as_chat(tok, p) for p in prompts] if isinstance(prompts, list) else as_chat(tok, prompts)

    return {key: framed(value) if key in PROMPTS else value for key, value in request.items()}


def _not_done(wanted: Requests, done: list[dict[str, Any]]) -> Requests:
    """Those of ``wanted`` that are left, ``done`` being a ledger's requests; what is there once counts once."""
    made = Counter(tuple(_named(request).values()) for request in done)
    left = []
    for where, request in wanted:
        key = tuple(_named(request).values())
        if made[key]:
            made[key] -= 1
        else:
            left.append((where, request))
    return left


def _without_clashes(todo: Requests, phrasings: Mapping[str, Sequence[EditTokens]]) -> tuple[Requests, list[str]]:
    """Those of ``todo`` that one call can take, and what is wrong with the others: a prompt of theirs has a target."""
    from ..editing import Targets

    targets, good, clashes = Targets(), [], []
    for where, request in todo:
        try:
            targets.take(where, request, phrasings[where])
            good.append((where, request))
        except RequestError as error:
            clashes.append(str(error))
    return good, clashes


def _named(request: dict[str, Any]) -> dict[str, str]:
    return {"prompt": request["prompt"], "target_new": request.get("target_new", "")}
