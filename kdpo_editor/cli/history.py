"""``kdpo undo``, ``redo``, ``checkout``, ``log`` and ``compact``: what a ledger holds, and where it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .loading import open_ledger, writable_ledger
from .options import Json, Ledger, SkipDamaged, Wait
from .terminal import put, say

if TYPE_CHECKING:
    from ..edits.ledger import EditLedger

Count = Annotated[int, typer.Option("-n", metavar="N", min=1, help="How many edits.")]


def undo(ledger: Ledger, n: Count = 1, wait: Wait = 0.0, skip_damaged: SkipDamaged = False) -> int:
    """Take back the last edits."""
    with writable_ledger(ledger, wait, skip_damaged) as opened:
        opened.undo(n)
        return _where(opened)


def redo(ledger: Ledger, n: Count = 1, wait: Wait = 0.0, skip_damaged: SkipDamaged = False) -> int:
    """Put back the last edits that were undone."""
    with writable_ledger(ledger, wait, skip_damaged) as opened:
        opened.redo(n)
        return _where(opened)


def checkout(
    ledger: Ledger,
    number: Annotated[int, typer.Argument(min=0, help="The edit; 0 is the unedited model.")],
    wait: Wait = 0.0,
    skip_damaged: SkipDamaged = False,
) -> int:
    """Go to the state after some edit."""
    with writable_ledger(ledger, wait, skip_damaged) as opened:
        opened.checkout(number)
        return _where(opened)


def _where(ledger: EditLedger) -> int:
    put({"head": ledger.head, "edits": len(ledger.branch)})
    return 0


def log(ledger: Ledger, json: Json = False, skip_damaged: SkipDamaged = False) -> int:
    """List the edits."""
    opened = open_ledger(ledger, skip_damaged)
    standing = {one.number for one in opened.branch}
    for number, one in sorted(opened.edits.items()):
        stands = number in standing
        if json:
            put({"edit": number, "parent": one.parent, "stands": stands, "head": number == opened.head,
                  "date": one.info.date, "merged": one.merged, "requests": one.info.requests,
                  "outcomes": one.info.outcomes, "hparams": one.info.hparams})  # fmt: skip
            continue
        mark = "*" if number == opened.head else " " if stands else "-"
        for i, request in enumerate(one.info.requests or [{}]):
            outcomes = one.info.outcomes
            missed = i < len(outcomes) and not outcomes[i]["converged"]
            text = f"{request.get('prompt', '(no request)')} -> {request.get('target_new', '')}"
            say(f"{mark} {number:>4}  {one.info.date}  {text}{'  (missed its target)' if missed else ''}")
    if not json:
        undone = len(opened.edits) - len(standing)
        say(f"{len(standing)} edits stand{f', {undone} are undone (-)' if undone else ''}; * is the head")
    return 0


def compact(
    ledger: Ledger,
    keep: Annotated[int, typer.Option(metavar="N", min=0, help="Edits that can still be undone.")] = 0,
    wait: Wait = 0.0,
    skip_damaged: SkipDamaged = False,
) -> int:
    """Merge edits and remove what was undone."""
    with writable_ledger(ledger, wait, skip_damaged) as opened:
        put({"freed_bytes": opened.compact(keep), "edits": len(opened.edits)})
    return 0
