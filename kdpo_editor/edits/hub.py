"""Saved deltas on the Hugging Face hub: what is uploaded and how, and where they are found again."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import DamagedFileError, HubError, ModelError
from ..models.packaged import FOLDERS, PACKAGED
from ..whole_files import storage_error
from .card import Base, card
from .delta_file import MANIFEST
from .manifest import Change, EditInfo, state_hash
from .storage import field, read_json

TENSORS = "change-*.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# What a repository has by itself.
ALWAYS = {".gitattributes", "README.md"}


def without_paths(info: EditInfo) -> EditInfo:
    """``info`` as it may leave this machine: of folders and files that its settings name, the last part alone."""
    if info.hparams is None:
        return info
    kept = {key: _without_path(value) for key, value in info.hparams.items()}
    return replace(info, hparams={**kept, **({"ledger": None} if "ledger" in kept else {})})


def _without_path(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_path(each) for each in value]
    if not isinstance(value, str):
        return value
    is_path = value.startswith(("/", "~", "./", "../")) or re.match(r"[A-Za-z]:\\", value)
    if is_path or ("/" in value and Path(value).exists()):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def base_of(
    info: EditInfo, name: str | None = None, *, revision: str | None = None, licence: str | None = None,
    token: str | None = None,
) -> Base:  # fmt: skip
    """The model that edits were made on: ``name``, or what their settings name; its licence too, where it is found.

    Raises :class:`~kdpo_editor.ModelError` where no model is named.
    """
    name = name or (info.hparams or {}).get("model_name")
    if not name:
        raise ModelError("the edits do not name the model that they were made on; give its name")
    return Base(_without_path(name), revision, licence or _licence_of(name, token))


def revision_in_cache(name: str) -> str | None:
    """The commit of the model ``name`` that was loaded last from the hub; ``None`` where there is none."""
    from huggingface_hub import try_to_load_from_cache

    if not Base(name).on_hub:
        return None
    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def _licence_of(name: str, token: str | None) -> str | None:
    """What is said of the licence by the package's list, by a model's own folder, or by the hub."""
    if name in PACKAGED:
        return PACKAGED[name].licence
    folder = FOLDERS.get(name, Path(name))
    if folder.is_dir():
        return _licence_in(folder / "README.md")
    from huggingface_hub import HfApi

    try:
        found = HfApi(token=token).model_info(name).card_data
    except Exception:  # a name that is no repository, no connection: then it is not known
        return None
    return _as_licence(found.get("license") if found else None)


def _licence_in(readme: Path) -> str | None:
    try:
        head = re.match(r"---\n(.*?)\n---", readme.read_text("utf-8"), re.DOTALL)
        found = yaml.safe_load(head[1]) if head else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return _as_licence(found.get("license") if isinstance(found, dict) else None)


def _as_licence(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def check_push(repo_id: str, changes: Mapping[str, Change], measured: Mapping[str, Any] | None) -> None:
    """Raise :class:`~kdpo_editor.HubError` where ``repo_id`` is no name, or ``measured`` is of other changes."""
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repo_id):
        raise HubError(f"{repo_id!r:.200} is not the name of a repository; it must be OWNER/NAME")
    if measured is None:
        return
    what = "what was measured"
    try:
        same = field(measured, "state_sha256", str, what) == state_hash(changes)
        for one in field(measured, "measures", list, what):
            field(one, "name", str, what), field(one, "count", int, what)
            field(one, "before", (float, int, type(None)), what), field(one, "after", (float, int, type(None)), what)
    except DamagedFileError as error:
        raise HubError(f"{error}; it must be what kdpo check --json says") from None
    if not same:
        raise HubError(f"{what} was measured of other edits; kdpo check --json measures these")


def complete(
    folder: Path,
    repo_id: str,
    base: Base,
    changes: Mapping[str, Change],
    info: EditInfo,
    adapter: str | Path | None,
    measured: Mapping[str, Any] | None,
) -> None:
    """Put the card and the adapter beside the saved delta in ``folder``.

    The adapter names ``base`` as its model, so that the hub, PEFT and transformers find it. Raises
    :class:`~kdpo_editor.StorageError` or :class:`~kdpo_editor.DamagedFileError` where the adapter cannot be read.
    """
    if adapter is not None:
        settings, tensors = (Path(adapter) / name for name in ADAPTER)
        found = read_json(settings)
        if not isinstance(found, dict):
            raise DamagedFileError(f"{settings} is not the settings of an adapter")
        found |= {"base_model_name_or_path": base.name, "revision": base.revision}
        (folder / settings.name).write_text(json.dumps(found, indent=2), "utf-8")
        try:
            shutil.copyfile(tensors, folder / tensors.name)
        except OSError as error:
            raise storage_error("read", tensors, error) from error
    measures = measured["measures"] if measured else ()
    text = card(repo_id, base, changes, info, adapter=adapter is not None, measured=measures)
    (folder / "README.md").write_text(text, "utf-8")


def push(
    folder: Path, repo_id: str, *, private: bool, revision: str | None, message: str | None, token: str | None
) -> str:
    """Upload what is in ``folder`` in one commit, in place of edits that were there; the address of the commit.

    Raises :class:`~kdpo_editor.HubError`; see :meth:`EditDelta.push_to_hub`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _asking(f"cannot push to {repo_id}"):
        api = HfApi(token=token)
        try:
            there = api.model_info(repo_id)
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private)
            there = api.model_info(repo_id)
        if private and not there.private:
            raise HubError(f"{repo_id} is public; the edits are pushed there only if that is said (--public)")
        names = {file.rfilename for file in there.siblings or ()}
        if names - ALWAYS and MANIFEST not in names:
            raise HubError(
                f"{repo_id} holds something else: {min(names - ALWAYS)}; edits need a repository of their own"
            )
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message or "Push edits",
            delete_patterns=[TENSORS, *ADAPTER],
        )
    return str(done.commit_url)


def pull(
    repo_id: str, *, revision: str | None, cache_dir: str | Path | None, local_files_only: bool, token: str | None
) -> Path:
    """Download a saved delta; the folder in the hub's cache that it is in.

    Raises :class:`~kdpo_editor.HubError`; see :meth:`EditDelta.from_pretrained`.
    """
    from huggingface_hub import snapshot_download

    with _asking(f"cannot read {repo_id}"):
        folder = snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=[MANIFEST, TENSORS],
        )
    if not (Path(folder) / MANIFEST).exists():
        raise HubError(f"{repo_id} holds no saved delta: it has no {MANIFEST}")
    return Path(folder)


@contextmanager
def _asking(failed: str) -> Iterator[None]:
    """Inside, the hub's client shows progress on a terminal alone; its errors are ours and begin with ``failed``."""
    from huggingface_hub import utils as theirs

    bars: Any = theirs  # whose names its stubs do not export
    shown = not bars.are_progress_bars_disabled() and not sys.stderr.isatty()
    if shown:
        bars.disable_progress_bars()
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # the client raises what its HTTP library does, which differs between its releases
        said = " ".join(str(error).split()) or type(error).__name__
        raise HubError(f"{failed}: {said:.500}") from error
    finally:
        if shown:
            bars.enable_progress_bars()
