"""The command ``kdpo push``: the edits of a ledger or a delta to a repository of the Hugging Face hub."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .sources import Edits, read_edits, unedited_model
from .terminal import complain, put

if TYPE_CHECKING:
    from ..edits.card import Base


def push(
    source: str,
    repo_id: str,
    *,
    edit: int | None = None,
    public: bool = False,
    adapter: bool = True,
    checked: str | None = None,
    model: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    licence: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    yes: bool = False,
    device: str | int | None = None,
    trust_remote_code: bool = False,
    skip_damaged: bool = False,
) -> int:
    """Push edits to the hub, after what leaves this machine was shown and confirmed.

    Args:
        source: a ledger's folder or a saved delta's.
        repo_id: ``OWNER/NAME``; made where it is not there.
        edit: up to which edit of the ledger; by default its head.
        public: make a new repository public, and push to one that is.
        adapter: put a LoRA adapter beside the delta, for PEFT and transformers; the model is loaded for that.
        checked: a file with what ``kdpo check --json`` said of these edits, for the card.
        model: the unedited model, where the edits do not name it or it lies elsewhere.
        base: the name by which others find that model; by default the one that it was edited by.
        base_revision: its revision; by default that of the model loaded for the adapter.
        licence: its licence; by default what the hub, or the model's own card, says.
        revision: the branch of the repository.
        message: of the commit.
        yes: ask nobody.
        device: of the model; by default the GPU where there is one.
        trust_remote_code: run code that comes with the model.
        skip_damaged: leave out damaged lines of the ledger.

    Returns:
        0: pushed. 1: it was not confirmed. 2: there is nobody to confirm it.

    Raises:
        KDPOError: as :func:`~.sources.read_edits`, :meth:`EditDelta.save_lora` and :meth:`EditDelta.push_to_hub` do.
    """
    from ..edits.hub import base_of, check_push, revision_in_cache
    from ..edits.storage import read_json

    edits = read_edits(source, edit=edit, skip_damaged=skip_damaged)
    measured = None if checked is None else read_json(Path(checked))
    check_push(repo_id, edits.delta.changes, measured)
    with ExitStack() as stack:
        folder = None
        if adapter:
            loaded, tok = unedited_model(edits, model, device=device, trust_remote_code=trust_remote_code)
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
