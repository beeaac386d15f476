"""The command ``kdpo push``: the edits of a ledger or a delta to a repository of the Hugging Face hub."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import After, Device, LedgersModel, SkipDamaged, Trust
from .sources import Edits, read_edits
from .terminal import complain, put

if TYPE_CHECKING:
    from ..edits.card import Base


def push(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A ledger or a saved delta.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository, made if it is not there.")],
    edit: After = None,
    public: Annotated[bool, typer.Option("--public", help="Make a public repository, or push to one.")] = False,
    adapter: Annotated[bool, typer.Option(help="A LoRA adapter beside the delta; loads the model.")] = True,
    checked: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What kdpo check --json said of these edits, for the card.")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="ID", help="The name by which others find the model.")] = None,
    base_revision: Annotated[str | None, typer.Option(metavar="REV", help="Its revision (default: as loaded).")] = None,
    licence: Annotated[str | None, typer.Option(help="Its licence (default: what its own card says).")] = None,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Of the repository.")] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Of the commit.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Push without asking.")] = False,
    model: LedgersModel = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    skip_damaged: SkipDamaged = False,
) -> int:
    """Push edits to the Hugging Face hub, privately, once what leaves this machine was shown and confirmed."""
    from ..edits.hub import base_of, check_push, revision_in_cache
    from ..edits.storage import read_json

    edits = read_edits(source, edit=edit, skip_damaged=skip_damaged)
    measured = None if checked is None else read_json(checked)
    check_push(repo_id, edits.delta.changes, measured)
    with ExitStack() as stack:
        folder = None
        if adapter:
            loaded, tok = edits.load(model, device, trust_remote_code)
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="kdpo-"))) / "adapter"
            edits.delta.save_lora(folder, loaded, tok)
            # The model that is loaded was found to have the matrices that the edits began from.
            used = model or edits.model_name or ""
            base_revision = base_revision or (revision_in_cache(used) if base in (None, used) else None)
        of = base_of(edits.delta.info, base or edits.model_name or model, revision=base_revision, licence=licence)
        complain("\n".join(_leaving(edits, repo_id, public, of, folder is not None)))
        if not yes:
            if not sys.stdin.isatty():
                complain("nothing was pushed: there is nobody to confirm it; --yes does without")
                return 2
            if not _confirmed():
                complain("nothing was pushed")
                return 1
        url = edits.delta.push_to_hub(
            repo_id,
            private=not public,
            base=of,
            adapter=folder,
            measured=measured,
            revision=revision,
            message=message,
        )
    put({"pushed": repo_id, "private": not public, "edits": len(edits.delta.info.requests), "commit": url})
    return 0


def _leaving(edits: Edits, repo_id: str, public: bool, base: Base, adapter: bool) -> list[str]:
    """What is uploaded, every text of the requests included, line by line."""
    requests = edits.delta.info.requests
    lines = [f"to {repo_id}, {'PUBLIC: anybody can read it' if public else 'private if it is new'}, will be uploaded:"]
    for request in requests:
        lines.append(f"  {_line(request['prompt'])} -> {_line(request['target_new'])}")
        rest = {key: value for key, value in request.items() if key not in ("prompt", "target_new")}
        lines += [f"    {key}: {_line(value)}" for key, value in rest.items()]
    lines.append(f"  {', '.join(edits.delta.changes)}, before and after the edits, {edits.delta.nbytes} bytes")
    if adapter:
        lines.append("  a LoRA adapter")
    licence = base.licence or "a licence that is not known"
    lines.append(f"  a card, the settings of the edits, versions and hashes; base model {base.name} under {licence}")
    return lines


def _line(value: Any) -> str:
    return "; ".join(value) if isinstance(value, list) else str(value)


def _confirmed() -> bool:
    sys.stderr.write("push? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().casefold() in ("y", "yes")
