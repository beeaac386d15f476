"""The command ``kdpo``: edit models, and keep, undo, inspect and export the edits."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tqdm import tqdm

from ..errors import (
    DamagedFileError,
    EditDiverged,
    HyperParamsError,
    KDPOError,
    LedgerError,
    ModelError,
    RequestError,
    StorageError,
)
from ..hparams import KDPOHyperParams, ready_made, settings_folder
from .arguments import RECIPES, check_options, make_parser
from .terminal import columns, complain, put, say

if TYPE_CHECKING:
    from ..edits.ledger import EditLedger

STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, commands = make_parser(COMMANDS)
    check_options(parser, commands, arguments)
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        complain(f"interrupted{_how_to_go_on(args)}")
        return 130
    except BrokenPipeError:  # the reader of our output had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KDPOError, OSError, ModuleNotFoundError) as error:
        complain(str(error.strerror if isinstance(error, StorageError) else error))
        if isinstance(error, DamagedFileError) and "journal.jsonl, line" in str(error):
            complain("--skip-damaged leaves such lines out")
        return 1


# Commands -----------------------------------------------------------------------------------------------------


def edit(args: argparse.Namespace) -> int:
    """Edit a model, request by request, each journaled before the next."""
    from ..derived import complete
    from ..edits.ledger import EditLedger

    hparams, _ = chosen_settings(args)
    requests, skipped = _requests(args)
    if skipped and not args.keep_going:
        for text in skipped:
            complain(text)
        complain("nothing was edited; with --keep-going such lines are skipped")
        return 1
    with EditLedger(args.out, write=True, wait=args.wait, skip_damaged=args.skip_damaged) as ledger:
        _warn_of_damage(ledger)
        dtype = args.dtype or _stored_dtype(ledger) or ("float16" if hparams.fp16 else "float32")
        model, tok = _load(args.model, dtype, args, hparams.device)
        if args.chat:
            requests = [(where, _in_chat(tok, request)) for where, request in requests]
        found = complete(hparams, model)
        if found != hparams:
            complain(f"from the model's structure: {_derived(hparams, found)}; kdpo settings prints all settings")
        hparams = found
        good = []
        for where, request in requests:
            try:
                _check(model, tok, request, hparams)
                good.append((where, request))
            except KDPOError as error:
                skipped.append(str(error).replace("request 0", where, 1))
        for text in skipped:
            complain(text)
        if (len(good) < len(requests) and not args.keep_going) or not good:
            complain("nothing was edited" + ("" if args.keep_going else "; --keep-going skips such requests"))
            return 1
        ledger.restore(model)
        todo = _not_done(good, ledger.requests) if args.resume else good
        if len(todo) < len(good):
            complain(f"{len(good) - len(todo)} of {len(good)} edits are in the ledger already")
        missed = _edit_all(ledger, model, tok, todo, hparams, args)
    return 1 if missed or skipped else 0


def _edit_all(
    ledger: EditLedger,
    model: Any,
    tok: Any,
    todo: list[tuple[str, dict[str, Any]]],
    hparams: KDPOHyperParams,
    args: argparse.Namespace,
) -> int:
    """Edit one by one, or all at once if the schedule says so; the number that failed or missed their target."""
    together = hparams.schedule == "breadth_first"
    groups = [todo] if together and todo else [[one] for one in todo]
    missed = 0
    with tqdm(total=len(todo), unit="edit", disable=None) as bar:
        for group in groups:
            requests = [request for _, request in group]
            try:
                _, _, traces = ledger.edit(model, tok, requests, hparams)
            except EditDiverged as error:
                if not args.keep_going:
                    raise EditDiverged(f"{group[0][0]}: {error}") from None
                for where, request in group:
                    put({**_named(request), "error": str(error)})
                    complain(f"{where}: {error}")
                missed += len(group)
                continue
            for request, trace in zip(requests, traces, strict=True):
                put({"edit": ledger.head, **_named(request), "converged": trace.converged, "steps": trace.steps})
                missed += not trace.converged
            bar.update(len(group))
    return missed


def apply(args: argparse.Namespace) -> int:
    """Apply saved deltas to a model's ledger."""
    from ..edits.delta import EditDelta
    from ..edits.ledger import EditLedger

    deltas = [EditDelta.load(path) for path in args.delta]
    with EditLedger(args.out, write=True, wait=args.wait, skip_damaged=args.skip_damaged) as ledger:
        _warn_of_damage(ledger)
        specs = [change.before.spec for delta in deltas for change in delta.changes.values()]
        stored = STORED[specs[0].dtype] if specs else "float32"
        model, _ = _load(args.model, args.dtype or _stored_dtype(ledger) or stored, args)
        ledger.restore(model)
        for path, delta in zip(args.delta, deltas, strict=True):
            ledger.apply(model, delta, force=args.force)
            put({"edit": ledger.head, "delta": path, "requests": len(delta.info.requests), "bytes": delta.nbytes})
    return 0


def settings(args: argparse.Namespace) -> int:
    """Print all settings for a model, as a YAML file to keep and change."""
    from ..derived import complete
    from ..models import outline

    chosen, source = chosen_settings(args)
    try:
        model = outline(args.model, trust_remote_code=args.trust_remote_code)
    except ModelError:
        if not Path(args.model).exists():
            raise
        # A kind of file without a configuration beside it.
        model, _ = _load(args.model, "auto", args, "cpu")
    found = complete(chosen, model)
    say(f"# {args.recipe} for {args.model}, from {source}. To be used with kdpo edit --hparams.")
    if found != chosen:
        say(f"# From the model's structure: {_derived(chosen, found)}.")
    lines = yaml.safe_dump(found.to_dict(), sort_keys=False, default_flow_style=None, allow_unicode=True, width=1000)
    for line in lines.splitlines():
        say(line)
    return 0


def _derived(chosen: KDPOHyperParams, found: KDPOHyperParams) -> str:
    """What ``found`` has beyond ``chosen``."""
    before, after = chosen.to_dict(), found.to_dict()
    return ", ".join(f"{key} {after[key]}" for key in after if after[key] != before[key])


def undo(args: argparse.Namespace) -> int:
    """Take back the last edits."""
    return _move(args, lambda ledger: ledger.undo(args.n))


def redo(args: argparse.Namespace) -> int:
    """Put back the last edits that were undone."""
    return _move(args, lambda ledger: ledger.redo(args.n))


def checkout(args: argparse.Namespace) -> int:
    """Go to the state after some edit."""
    return _move(args, lambda ledger: ledger.checkout(args.number))


def _move(args: argparse.Namespace, go: Any) -> int:
    from ..edits.ledger import EditLedger

    with EditLedger(args.ledger, write=_exists(args), wait=args.wait, skip_damaged=args.skip_damaged) as ledger:
        _warn_of_damage(ledger)
        go(ledger)
        put({"head": ledger.head, "edits": len(ledger.branch)})
    return 0


def log(args: argparse.Namespace) -> int:
    """List the edits."""
    ledger = _open(args)
    standing = {one.number for one in ledger.branch}
    for number, one in sorted(ledger.edits.items()):
        stands = number in standing
        if args.json:
            put({"edit": number, "parent": one.parent, "stands": stands, "head": number == ledger.head,
                  "date": one.info.date, "merged": one.merged, "requests": one.info.requests,
                  "outcomes": one.info.outcomes, "hparams": one.info.hparams})  # fmt: skip
            continue
        mark = "*" if number == ledger.head else " " if stands else "-"
        for i, request in enumerate(one.info.requests or [{}]):
            outcomes = one.info.outcomes
            missed = i < len(outcomes) and not outcomes[i]["converged"]
            text = f"{request.get('prompt', '(no request)')} -> {request.get('target_new', '')}"
            say(f"{mark} {number:>4}  {one.info.date}  {text}{'  (missed its target)' if missed else ''}")
    if not args.json:
        undone = len(ledger.edits) - len(standing)
        say(f"{len(standing)} edits stand{f', {undone} are undone (-)' if undone else ''}; * is the head")
    return 0


def show(args: argparse.Namespace) -> int:
    """Generate before and after the edits, side by side, and tell whether each answer begins with the target."""
    from ..edits.switching import edited
    from ..engine.answers import begins_with
    from ..engine.generation import answers
    from ..requests import as_chat

    ledger = _open(args)
    number = ledger.head if args.edit is None else args.edit
    if number == 0 and not args.prompt:
        complain(f"no edit stands in {args.ledger}")
        return 0
    delta = ledger.delta(number, since=0) if number else None
    model, tok = _model_of(ledger, args)
    targets = {r["prompt"]: r.get("target_new", "") for r in (delta.info.requests if delta else [])}
    asked = [as_chat(tok, prompt) if args.chat else prompt for prompt in args.prompt or []]
    prompts = asked or list(targets)
    before = answers(model, tok, prompts, args.longest, progress="before")
    with edited(model, delta) if delta else nullcontext():
        after = answers(model, tok, prompts, args.longest, progress="after")
    rows = []
    for prompt, old, new in zip(prompts, before, after, strict=True):
        target = targets.get(prompt)
        was, now = (None if target is None else begins_with(text, target) for text in (old, new))
        if args.json:
            put({"prompt": prompt, "target_new": target, "before": old, "after": new,
                 "reached_before": was, "reached_after": now})  # fmt: skip
        rows.append((prompt, old, new, "" if target is None else f"{target} ({_REACHED[was, now]})"))
    for line in columns(["prompt", "before", "after", "target"], rows) if not args.json else ():
        say(line)
    return 0


def export(args: argparse.Namespace) -> int:
    """Write the edited model, a LoRA adapter, or the change alone."""
    from ..edits.lora import served_rank

    ledger = _open(args)
    number = ledger.head if args.edit is None else args.edit
    if number == 0:
        raise LedgerError(f"no edit stands in {args.ledger}; there is nothing to export")
    out = Path(args.to)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LedgerError(f"{out} exists and is not an empty folder")
    delta = ledger.delta(number, since=args.since)
    said: dict[str, Any] = {"as": getattr(args, "as"), "to": str(out), "edit": number}
    if said["as"] == "delta":
        said["bytes"] = delta.save(out)
        put(said)
        return 0
    if args.since:
        raise LedgerError("--since goes with --as delta; a model and an adapter have all edits")
    model, tok = _model_of(ledger, args)
    if said["as"] == "lora":
        said["rank"] = delta.save_lora(out, model, tok, rank=args.rank)
        said["max_lora_rank"] = served_rank(said["rank"])
    else:
        delta.apply(model)
        model.save_pretrained(out)
        tok.save_pretrained(out)
    put({**said, "bytes": sum(f.stat().st_size for f in out.rglob("*") if f.is_file())})
    return 0


def compact(args: argparse.Namespace) -> int:
    """Merge edits and remove what was undone."""
    from ..edits.ledger import EditLedger

    with EditLedger(args.ledger, write=_exists(args), wait=args.wait, skip_damaged=args.skip_damaged) as ledger:
        _warn_of_damage(ledger)
        put({"freed_bytes": ledger.compact(args.keep), "edits": len(ledger.edits)})
    return 0


COMMANDS = (edit, settings, apply, undo, redo, checkout, log, show, export, compact)


# Whether an answer begins with the target, before and after the edits.
_REACHED: dict[tuple[bool | None, bool | None], str] = {
    (False, True): "reached",
    (True, True): "reached before too",
    (True, False): "no longer reached",
    (False, False): "not reached",
}


# Their parts --------------------------------------------------------------------------------------------------


def _exists(args: argparse.Namespace) -> bool:
    """True; raises where there is no ledger, which opening it for writing would make."""
    _open(args)
    return True


def _open(args: argparse.Namespace) -> EditLedger:
    from ..edits.ledger import EditLedger

    ledger = EditLedger(args.ledger, skip_damaged=args.skip_damaged)
    _warn_of_damage(ledger)
    return ledger


def _warn_of_damage(ledger: EditLedger) -> None:
    for line in ledger.damaged:
        complain(f"skipped: {line}")


def _stored_dtype(ledger: EditLedger) -> str | None:
    return next((STORED[value.spec.dtype] for value in ledger.state(0).values()), None)


def _model_of(ledger: EditLedger, args: argparse.Namespace) -> tuple[Any, Any]:
    """The unedited model of a ledger."""
    name = args.model or ledger.model_name
    if name is None:
        raise LedgerError(f"{args.ledger} does not name its model; give --model")
    if args.trust_remote_code and not args.model:
        raise LedgerError("with --trust-remote-code name the model yourself, with --model")
    return _load(name, _stored_dtype(ledger) or "float32", args)


def _load(name: str, dtype: str, args: argparse.Namespace, device: str | int | None = None) -> tuple[Any, Any]:
    """Model and tokenizer; only safetensors are read."""
    from transformers.utils import logging

    from ..models import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    wanted = device if args.device is None else args.device
    return load(name, dtype=dtype, device=wanted, trust_remote_code=args.trust_remote_code, safetensors_only=True)


def chosen_settings(args: argparse.Namespace) -> tuple[KDPOHyperParams, str]:
    """Settings, and where they are from; then what ``--set`` says. Those that the model decides may be left out.

    They are those of the file that was named; or the recipe's ready-made ones for the model; or those that the recipe
    has for any model.
    """
    recipe = getattr(args, "recipe", RECIPES[0])
    folder = settings_folder() / recipe
    file = ready_made(args.model, recipe)
    if args.hparams:
        file = Path(args.hparams)
        if not file.exists() and not file.with_name(file.name + ".yaml").exists() and file.name == args.hparams:
            file = folder / args.hparams
    elif file is None and (folder / "auto.yaml").exists():
        file = folder / "auto.yaml"
    elif file is None and recipe != RECIPES[0]:
        raise HyperParamsError(f"--recipe {recipe}: it has no settings for {args.model}; give --hparams")
    if file is None:
        chosen = KDPOHyperParams(model_name=args.model)
    else:
        chosen = KDPOHyperParams.from_hparams(file, args.model)
    values = chosen.to_dict()
    for pair in args.set:
        key, equals, text = pair.partition("=")
        if not equals:
            raise HyperParamsError(f"--set {pair}: write it as key=value")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            values[key] = text
    if values["ledger"] is not None:
        raise HyperParamsError("ledger: here the ledger is what --out names")
    source = "the defaults, which are the paper's" if file is None else f"{file.parent.name}/{file.name}"
    return KDPOHyperParams.from_config({**values, "model_name": args.model}), source


def _requests(args: argparse.Namespace) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """The requests, each with where it stands, and what is wrong with other lines."""
    from .request_file import read_lines

    if args.file is None:
        request = {"prompt": args.prompt, "target_new": args.target}
        return [("--prompt", request | ({} if args.subject is None else {"subject": args.subject}))], []
    if args.file == "-":
        name, lines = "stdin", read_lines(sys.stdin.buffer, "stdin")
    else:
        name = args.file
        with open(name, "rb") as file:
            lines = read_lines(file, name)
    if not lines:
        raise RequestError(f"{name} has no requests")
    good = [(f"{name}, line {line.number}", line.request) for line in lines if line.request is not None]
    return good, [line.error for line in lines if line.error is not None]


def _in_chat(tok: Any, request: dict[str, Any]) -> dict[str, Any]:
    """``request`` with its prompts in the model's chat template, as the ledger keeps it: so it is asked again."""
    from ..requests import as_chat

    rephrases = request.get("rephrases")
    others = {"rephrases": [as_chat(tok, p) for p in rephrases]} if isinstance(rephrases, list) else {}
    return {**request, "prompt": as_chat(tok, request["prompt"]), **others}


def _check(model: Any, tok: Any, request: dict[str, Any], hparams: KDPOHyperParams) -> None:
    """Raise what an edit of ``request`` would raise before it changes anything."""
    from ..editing import check

    check(model, tok, [request], hparams)


def _not_done(wanted: list[tuple[str, dict[str, Any]]], done: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Those of ``wanted`` that are left, ``done`` being a ledger's requests in order."""
    rest: Iterator[dict[str, Any]] = iter(done)
    for i, (_, request) in enumerate(wanted):
        if not any(_named(other) == _named(request) for other in rest):
            return wanted[i:]
    return []


def _named(request: dict[str, Any]) -> dict[str, str]:
    return {"prompt": request["prompt"], "target_new": request.get("target_new", "")}


def _how_to_go_on(args: argparse.Namespace) -> str:
    if args.command != "edit":
        return ""
    return f"; the edits reported are in {args.out}, and the same command with --resume goes on from there"


if __name__ == "__main__":
    sys.exit(main())
