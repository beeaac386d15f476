"""``kdpo show`` and ``kdpo export``: what edits do to answers, and the edited model as files."""

from __future__ import annotations

from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import LedgerError
from .loading import model_of, open_ledger
from .options import After, Device, Json, Ledger, LedgersModel, SkipDamaged, Trust
from .terminal import complain, put, table

# Whether an answer begins with the target, before and after the edits.
REACHED: dict[tuple[bool | None, bool | None], str] = {
    (False, True): "reached",
    (True, True): "reached before too",
    (True, False): "no longer reached",
    (False, False): "not reached",
}


class Form(str, Enum):
    """What is exported."""

    model = "model"
    lora = "lora"
    delta = "delta"


def show(
    ledger: Ledger,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Instead of the edits' own; can be repeated.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put --prompt into the model's chat template.")] = False,
    edit: After = None,
    longest: Annotated[int, typer.Option(metavar="T", min=1, help="Tokens to generate.")] = 24,
    json: Json = False,
    model: LedgersModel = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    skip_damaged: SkipDamaged = False,
) -> int:
    """Generate before and after the edits, side by side, and tell whether each answer begins with the target."""
    from ..edits.switching import edited
    from ..engine.generation import answers
    from ..requests.answers import begins_with_one
    from ..requests.chat import as_chat
    from ..requests.forms import right_answers

    opened = open_ledger(ledger, skip_damaged)
    number = opened.head if edit is None else edit
    if number == 0 and not prompt:
        complain(f"no edit stands in {ledger}")
        return 0
    delta = opened.delta(number, since=0) if number else None
    loaded, tok = model_of(opened, model, device, trust_remote_code)
    accepted = {r["prompt"]: right_answers(r) for r in (delta.info.requests if delta else [])}
    prompts = [as_chat(tok, text) if chat else text for text in prompt or []] or list(accepted)
    before = answers(loaded, tok, prompts, longest, progress="before")
    with edited(loaded, delta) if delta else nullcontext():
        after = answers(loaded, tok, prompts, longest, progress="after")
    rows = []
    for text, old, new in zip(prompts, before, after, strict=True):
        right = accepted.get(text) or ()
        target = right[0] if right else None
        was, now = (begins_with_one(answer, right) if right else None for answer in (old, new))
        if json:
            put({"prompt": text, "target_new": target, "before": old, "after": new,
                 "reached_before": was, "reached_after": now})  # fmt: skip
        rows.append((text, old, new, "" if target is None else f"{target} ({REACHED[was, now]})"))
    if not json:
        table(["prompt", "before", "after", "target"], rows)
    return 0


def export(
    ledger: Ledger,
    form: Annotated[Form, typer.Option("--as", help="What to write.")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; must not exist, or be empty.")],
    edit: After = None,
    since: Annotated[int, typer.Option(metavar="K", min=0, help="A delta without the edits up to K.")] = 0,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the adapter (default: the smallest that holds the edits).")
    ] = None,
    model: LedgersModel = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    skip_damaged: SkipDamaged = False,
) -> int:
    """Write the edited model, a LoRA adapter, or the change alone."""
    from ..edits.lora import check_place, served_rank

    opened = open_ledger(ledger, skip_damaged)
    number = opened.head if edit is None else edit
    if number == 0:
        raise LedgerError(f"no edit stands in {ledger}; there is nothing to export")
    check_place(to)
    delta = opened.delta(number, since=since)
    said: dict[str, Any] = {"as": form.value, "to": str(to), "edit": number}
    if form is Form.delta:
        said["bytes"] = delta.save(to)
        put(said)
        return 0
    if since:
        raise LedgerError("--since goes with --as delta; a model and an adapter have all edits")
    loaded, tok = model_of(opened, model, device, trust_remote_code)
    if form is Form.lora:
        said["rank"] = delta.save_lora(to, loaded, tok, rank=rank)
        said["max_lora_rank"] = served_rank(said["rank"])
    else:
        delta.apply(loaded)
        loaded.save_pretrained(to)
        tok.save_pretrained(to)
    put({**said, "bytes": sum(f.stat().st_size for f in to.rglob("*") if f.is_file())})
    return 0
