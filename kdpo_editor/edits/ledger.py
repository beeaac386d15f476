"""A sequence of edits on disk: to resume, undo, redo and inspect; nothing is lost when something breaks.

A ledger is a folder. ``journal.jsonl`` has one line per event, each with its own checksum, forced to the disk before
the call that wrote it returns: the header, edits, and moves between them. ``<sha256>.safetensors`` holds one value of
one matrix, named by its hash; a line is written only after the values that it names. So a crash leaves at
worst a last line that is cut short, which is dropped, and values that no line names, which :meth:`EditLedger.compact`
removes. Every value is kept whole: an edit costs the edited matrices' size on the disk.

Every edit's line has the hashes of all matrices after it, and of those before any edit. A model's place in the ledger
is therefore found by hashing its matrices, and going from one place to another is writing other values, bit for bit.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from ..derived import complete
from ..editing import edit
from ..engine.traces import EditTrace
from ..engine.weights import find_matrices, restore, uncompiled
from ..errors import DamagedFileError, EditDiverged, FingerprintError, LedgerError, StorageError
from ..hparams import KDPOHyperParams
from ..lifelong.replay import ReplayBuffer
from ..lifelong.second_moments import remember, remembered
from ..whole_files import make_folder, storage_error
from .delta import EditDelta
from .history import History, LedgerEdit
from .journal import OWNER, Journal, lock
from .manifest import Change, EditInfo, Value, check_config, config_of, full_form, matrices_of, value_of
from .storage import read_tensors, write_tensors
from .switching import note, original

JOURNAL = "journal.jsonl"
LOCK = "lock"


class EditLedger(History):
    """An append-only journal of edits.

    Any number of readers may have it open, and one writer. A writer on a folder that is missing or empty makes a ledger
    of it. Use it in a ``with`` statement, or call :meth:`close`.

    Args:
        folder: where it is.
        write: open it for writing.
        wait: seconds to wait for another writer to finish.
        skip_damaged: leave out damaged lines, which :attr:`damaged` then names, rather than raise.

    Attributes:
        edits: every :class:`LedgerEdit`, by number, whether on the current branch or undone.
        head: the number of the edit that stands, 0 for none.
        damaged: what was wrong with the lines left out.
        model_name: what the model was called when the first edit was made, or ``None``.

    Raises:
        LedgerLocked: another process writes to it; names its process id.
        DamagedFileError: a line is damaged, or the folder holds something else; names the line.
        StorageError: the folder cannot be read, made or written to.
    """

    def __init__(
        self, folder: str | Path, *, write: bool = False, wait: float = 0.0, skip_damaged: bool = False
    ) -> None:
        super().__init__(Path(folder), skip_damaged)
        self._lock: FileLock | None = None
        self._journal = Journal(self.folder / JOURNAL)
        self._open(write, wait)

    def _open(self, write: bool, wait: float) -> None:
        try:
            if not self._journal.path.exists():
                self._check_fresh(write)
            if write:
                make_folder(self.folder)
                self._lock = lock(self.folder / LOCK, wait)
            self._read()
            if write:
                for unfinished in self.folder.glob("*.part"):
                    with suppress(OSError):
                        unfinished.unlink()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise storage_error("open", self.folder, error) from error
            raise

    def __enter__(self) -> EditLedger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another writer in. Reading goes on working."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # Looking at -----------------------------------------------------------------------------------------------

    def delta(self, number: int, since: int | None = None) -> EditDelta:
        """The change from edit ``since`` (by default the one before it; 0: the unedited model) to edit ``number``."""
        one = self._edit(number)
        path = self._path(number)
        since = self._parent(one) if since is None else since
        if since not in path:
            raise LedgerError(f"edit {number} was not made after edit {since}; it was after {path[:-1]}")
        before, after = self.state(since), self.state(number)
        changes = {n: Change(before[n], after[n]) for n in after if before[n] != after[n]}
        info = one.info.with_edits_of(self.edits[k].info for k in path[path.index(since) + 1 :])
        stored = full_form(changes)
        return EditDelta(
            self._config or {}, changes, info, stored, lambda: {key: self._load(v) for key, v in stored.items()}
        )

    def place(self, model: nn.Module) -> int:
        """The number of the edit after which ``model``'s matrices are as they are now; 0: as before any.

        The head comes first, then later edits before earlier ones.

        Raises :class:`~kdpo_editor.FingerprintError`, naming the matrix, where the ledger does not know this state.
        """
        head = self.state(self.head)
        weights = self._matrices(model)
        now = {name: value_of(weights[name]) for name in head}
        for number in [self.head, *sorted(self.edits, reverse=True), 0]:
            if self.state(number) == now:
                return number
        wrong = next(name for name in head if now[name] != head[name])
        raise FingerprintError(
            f"{self.folder}: {wrong} is in a state that this ledger does not know: it hashes to "
            f"{now[wrong].sha256[:12]}, after edit {self.head} it did to {head[wrong].sha256[:12]}; it was changed by "
            "something else, or this is another model"
        )

    # Editing --------------------------------------------------------------------------------------------------

    def edit(
        self,
        model: nn.Module,
        tok: Any,
        requests: Sequence[Mapping[str, Any]],
        hparams: KDPOHyperParams,
        copy: bool = False,
    ) -> tuple[nn.Module, dict[str, Tensor], list[EditTrace]]:
        """As :func:`kdpo_editor.edit`, and journaled as one edit once it succeeded.

        If the model is not at the head but where another edit left it, because its weights were put back, the
        journal is first told so, and the edit goes on from there. With ``replay``, the earlier edits of a model that
        was taken to the head just now are those of the current branch.

        Raises:
            FingerprintError: the model is in a state that the ledger does not know. Nothing was changed.
            StorageError: the edit could not be written down. The model is as before the call.
        """
        self._check_writable()
        given, model = model, uncompiled(model)
        hparams = complete(hparams, model)  # what is written down is what the edit is made with
        matrices = find_matrices(model, hparams)
        self.follow(model)
        self._remember(model)
        if hparams.replay:
            ReplayBuffer.rebuild(model, tok, self.requests, hparams)
        edited, originals, traces = edit(model, tok, requests, hparams, copy=copy)
        try:
            self.record(edited, originals, EditInfo.now(requests, hparams, traces), hparams.model_name)
        except BaseException:
            if not copy:
                restore(matrices, originals)
            raise
        return edited if copy else given, originals, traces

    def apply(self, model: nn.Module, delta: EditDelta, *, force: bool = False, model_name: str | None = None) -> None:
        """Apply a delta to ``model``, which must be at the head, and journal it as one edit.

        ``model_name``: of the model, where the ledger is new; by default the one in the delta's settings. Errors as
        those of :meth:`EditDelta.apply`; the model is as before the call then.
        """
        self._check_writable()
        model = uncompiled(model)
        self.follow(model)
        originals = delta.apply(model, force=force)
        try:
            self.record(model, originals, delta.info, model_name or (delta.info.hparams or {}).get("model_name"))
        except BaseException:
            restore(dict(model.named_parameters()), originals)
            raise

    def record(
        self, model: nn.Module, originals: Mapping[str, Tensor], info: EditInfo, model_name: str | None = None
    ) -> LedgerEdit:
        """Journal an edit of ``model`` that was made otherwise.

        Args:
            model: after the edit.
            originals: the matrices that may have changed, as they were before; that must be the head's state.
            info: what to write down of it.
            model_name: of the model, where the ledger is new.
        """
        self._check_writable()
        model = uncompiled(model)
        weights = dict(model.named_parameters())
        for name in originals:
            if not torch.isfinite(weights[name]).all():
                raise EditDiverged(f"{name} holds NaN or infinite numbers; the edit is not journaled")
        known = self.state(self.head)
        before = {name: value_of(w) for name, w in originals.items()}
        after = {name: value_of(weights[name]) for name in originals}
        for name, value in before.items():
            if known.setdefault(name, value) != value:
                raise FingerprintError(f"{self.folder}: before this edit {name} was not as after edit {self.head}")
        base = self.state(0)
        for name, tensor in originals.items():
            if name not in base:
                self._store(before[name], tensor)
        for name, value in after.items():
            if value != before[name]:
                self._store(value, weights[name])
        if self._config is None:
            config = config_of(model)
            self._journal.append({"kind": "ledger", "version": 1, "model_name": model_name, "config": config})
            self._config, self.model_name = config, model_name
        number = max(self.edits, default=0) + 1
        done = LedgerEdit(number, self.head, known | after, before | base, info)
        self._journal.append(done.to_json())
        self._take(done)
        self._note(model, before, after)
        return done

    def follow(self, model: nn.Module) -> int:
        """Where ``model`` is not at the head but where another edit left it, make that the head; return its number.

        This is what happened when the framework put weights back. Errors as those of :meth:`place`.
        """
        number = self.place(model)
        if number != self.head:
            self._move(number, "the model's weights were put back")
        return number

    # Going back and forth -------------------------------------------------------------------------------------

    def restore(self, model: nn.Module) -> int:
        """Bring ``model``, in whichever state of this ledger, to the head, bit for bit; return the head's number.

        A model as it was before the first edit is the usual case: this is how a run is resumed.

        Raises:
            FingerprintError: it is another model, or in a state that the ledger does not know. Nothing was changed.
            DamagedFileError: a value's file is damaged or missing. Nothing was changed.
        """
        self._write(model, self.head)
        return self.head

    def undo(self, n: int = 1, model: nn.Module | None = None) -> int:
        """Take the last ``n`` edits back; return the number of the edit that stands then.

        Args:
            n: how many.
            model: is taken along, if given. It may be in any state of the ledger.

        Raises:
            LedgerError: there are fewer.
            FingerprintError, DamagedFileError, StorageError: as :meth:`restore`; neither journal nor model changed.
        """
        path = self._path(self.head)
        if not 0 < n < len(path):
            raise LedgerError(f"cannot undo {n} edits: {len(path) - 1} stand in {self.folder}")
        return self._go(path[-1 - n], "undo", model)

    def redo(self, n: int = 1, model: nn.Module | None = None) -> int:
        """Put back the last ``n`` edits that were undone; the inverse of :meth:`undo`, with the same errors."""
        path = self._path(self._tip)
        undone = path[path.index(self.head) + 1 :]
        if not 0 < n <= len(undone):
            raise LedgerError(f"cannot redo {n} edits: {len(undone)} are undone in {self.folder}")
        return self._go(undone[n - 1], "redo", model)

    def checkout(self, number: int, model: nn.Module | None = None) -> int:
        """Go to the state after edit ``number``, on whichever branch it is (0: before any); errors as :meth:`undo`."""
        if number:
            self._edit(number)
        return self._go(number, "checkout", model)

    def compact(self, keep: int = 0) -> int:
        """Merge the edits that stand, but for the last ``keep``, into one, and drop those that were undone.

        Values that are no longer named are removed; what was merged cannot be undone one by one any more.

        Returns:
            Bytes that were freed.
        """
        self._check_writable()
        if keep < 0:
            raise LedgerError(f"cannot keep {keep} edits")
        branch = self.branch
        cut = max(len(branch) - keep, 0)
        merged, kept = branch[:cut], branch[cut:]
        if merged:
            info = merged[-1].info.with_edits_of(one.info for one in merged)
            count = sum(one.merged for one in merged)
            kept = [replace(merged[-1], info=info, merged=count), *kept]
        parents = [0, *(one.number for one in kept)]
        kept = [replace(one, parent=parent) for one, parent in zip(kept, parents, strict=False)]
        lines = [{"kind": "ledger", "version": 1, "model_name": self.model_name, "config": self._config or {}}]
        lines += [one.to_json() for one in kept]
        named = {value.sha256 for one in kept for values in (one.state, one.base) for value in values.values()}
        freed = self._journal.replace(lines if self._config is not None or kept else [])
        self._read()  # at once: whatever happens below, the journal is this one
        for file in self.folder.iterdir():
            if (file.suffix == ".safetensors" and file.stem not in named) or file.suffix == ".part":
                try:
                    freed += file.lstat().st_size
                    file.unlink()
                except OSError as error:
                    raise storage_error("remove", file, error) from error
        return freed

    # The journal ----------------------------------------------------------------------------------------------

    def _check_fresh(self, write: bool) -> None:
        """Raise unless a folder without a journal is one where a ledger may begin, or began but had no edit yet."""
        names = {f.name for f in self.folder.iterdir()} if self.folder.is_dir() else set()
        strangers = [n for n in sorted(names - {LOCK}) if not n.endswith((".safetensors", ".part", OWNER))]
        if strangers or (names and LOCK not in names):
            raise DamagedFileError(f"{self.folder} is not a ledger; it holds {(strangers or sorted(names))[0]}")
        if not write and LOCK not in names:
            raise StorageError(errno.ENOENT, f"there is no ledger in {self.folder}")

    def _read(self) -> None:
        self._journal.read(self._take_record, self._forget, self.damaged if self._skip else None)

    # States ---------------------------------------------------------------------------------------------------

    def _go(self, number: int, why: str, model: nn.Module | None) -> int:
        self._check_writable()
        if model is None:
            self._move(number, why)
        else:
            self._write(model, number, why)
        return number

    def _move(self, number: int, why: str) -> None:
        self._journal.append({"kind": "move", "to": number, "why": why})
        self._take_move(number)

    def _write(self, model: nn.Module, number: int, why: str | None = None) -> None:
        """Put the values after edit ``number`` on ``model``; journal a move there in between if there is a reason."""
        model = uncompiled(model)
        wanted, now = self.state(number), self.state(self.place(model))
        weights = self._matrices(model)
        new = {name: self._load(value) for name, value in wanted.items() if value != now[name]}
        if why is not None:
            self._move(number, why)
        self._remember(model)
        restore(weights, new)
        self._note(model, now, wanted)

    def _remember(self, model: nn.Module) -> None:
        """Note what ``model`` was before any edit of this ledger, for what is computed of unedited models."""

        def unedited(model: nn.Module) -> AbstractContextManager[nn.Module]:
            return original(model, {name: self._load(value) for name, value in self.state(0).items()})

        if not remembered(model):
            with unedited(model):
                remember(model, unedited)

    def _note(self, model: nn.Module, before: dict[str, Value], after: dict[str, Value]) -> None:
        base = self.state(0)
        for name, value in after.items():
            note(model, name, before[name], value, lambda v=base[name]: self._load(v), base[name])  # type: ignore[misc]

    def _matrices(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The matrices that the ledger knows, once config, shapes and dtypes were compared."""
        what = f"the ledger {self.folder}"
        if self._config is not None:
            check_config(self._config, model, what)
        return matrices_of(model, {name: value.spec for name, value in self.state(0).items()}, what)

    def _file(self, value: Value) -> Path:
        return self.folder / f"{value.sha256}.safetensors"

    def _store(self, value: Value, tensor: Tensor) -> None:
        write_tensors(self._file(value), {"value": tensor})

    def _load(self, value: Value) -> Tensor:
        tensor = read_tensors(self._file(value), {"value": value.spec})["value"]
        if value_of(tensor) != value:
            raise DamagedFileError(f"{self._file(value)} is damaged: its bytes do not match its name")
        return tensor

    def _check_writable(self) -> None:
        if self._lock is None:
            raise LedgerError(f"{self.folder} is open for reading only; open it with write=True")


# Those that calls of this process wrote to, so that a long run reads its journal once.
_WRITTEN: dict[Path, EditLedger] = {}


@contextmanager
def writing(folder: str | Path) -> Iterator[EditLedger]:
    """Inside, the ledger in ``folder`` is open for writing, as by ``EditLedger(folder, write=True)``."""
    path = Path(folder).absolute()
    ledger = _WRITTEN.get(path)
    if ledger is None:
        ledger = _WRITTEN[path] = EditLedger(path, write=True)
    else:
        if ledger._lock is not None:
            raise LedgerError(f"{folder} is being written to by another thread of this process")
        ledger._open(True, 0.0)
    with ledger:
        yield ledger
