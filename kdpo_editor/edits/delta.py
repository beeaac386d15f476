"""The change that an edit made, as a thing: to keep, apply elsewhere, take back, merge, make small."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..derived import complete
from ..editing import edit
from ..engine.generation import answers, generate, says_target
from ..engine.traces import EditTrace
from ..engine.weights import restore, uncompiled
from ..errors import CompressionError, DamagedFileError, EditDiverged, FingerprintError
from ..hparams import KDPOHyperParams
from ..lifelong.second_moments import remember
from ..requests.forms import right_answers
from . import hub
from .card import Base
from .delta_file import load_delta, save_delta
from .lora import asked_prompts, check_place, save_lora
from .low_rank import decompose, pair_of, rank_within
from .manifest import Change, EditInfo, Value, check_config, config_hash, config_of, full_form, matrices_of, value_of
from .merging import added, merge_full, merge_low_rank, wide
from .switching import edited, note, passing, unedited


class EditDelta:
    """The change of some matrices, exact, with a manifest of what it is and which model it was made on.

    Made by :meth:`make`, :meth:`of`, :meth:`load`, :meth:`merge` or :meth:`EditLedger.delta`. In full form it holds
    each matrix before and after, in the model's dtype, so that applying and reverting are bit-exact; :meth:`compress`
    gives a low-rank form.

    Attributes:
        config: of the model it was made on, without what does not tell models apart.
        changes: ``{parameter name: Change}``.
        info: requests, settings, outcomes, date and versions.
        stored: the tensors held, by key: ``before:NAME`` and ``after:NAME``, or ``up:NAME`` ``[rows, rank]`` and
            ``down:NAME`` ``[rank, columns]``, whose product is the change; of experts a stack of such.
    """

    def __init__(
        self,
        config: dict[str, Any],
        changes: dict[str, Change],
        info: EditInfo,
        stored: dict[str, Value],
        read: Callable[[], dict[str, Tensor]],
    ) -> None:
        self.config, self.changes, self.info, self.stored, self._read = config, changes, info, stored, read
        # By model, what a low-rank form was added to and what that made: subtracting would not be exact.
        self._replaced: WeakKeyDictionary[nn.Module, tuple[dict[str, Tensor], dict[str, Value]]] = WeakKeyDictionary()

    # Making ---------------------------------------------------------------------------------------------------

    @classmethod
    def make(
        cls, model: nn.Module, tok: Any, requests: Sequence[Mapping[str, Any]], hparams: KDPOHyperParams
    ) -> EditDelta:
        """Edit ``model`` in place, as :func:`kdpo_editor.edit` does, and return the change."""
        model = uncompiled(model)
        hparams = complete(hparams, model)
        remember(model, unedited)
        _, originals, traces = edit(model, tok, requests, hparams)
        return cls.of(model, originals, requests, hparams, traces)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        originals: Mapping[str, Tensor],
        requests: Sequence[Mapping[str, Any]] = (),
        hparams: KDPOHyperParams | None = None,
        traces: Sequence[EditTrace] = (),
    ) -> EditDelta:
        """The change of an edited model from ``originals`` (``weights_copy``, of any of EasyEdit's methods).

        Raises:
            FingerprintError: a name or shape of ``originals`` is not the model's.
            EditDiverged: the model's matrices hold NaN or infinite numbers.
        """
        model = uncompiled(model)
        before = {name: w.detach().cpu().clone() for name, w in originals.items()}
        specs = {name: value_of(w).spec for name, w in before.items()}
        after = {n: w.detach().cpu().clone() for n, w in matrices_of(model, specs, "originals").items()}
        delta = cls._full(config_of(model), before, after, EditInfo.now(requests, hparams, traces))
        for name, change in delta.changes.items():
            note(model, name, change.before, change.after, lambda w=before[name]: w)  # type: ignore[misc]
        return delta

    @classmethod
    def _full(
        cls, config: dict[str, Any], before: dict[str, Tensor], after: dict[str, Tensor], info: EditInfo
    ) -> EditDelta:
        _check_finite(after)
        changes = {name: Change(value_of(before[name]), value_of(after[name])) for name in before}
        tensors = {f"before:{n}": w for n, w in before.items()} | {f"after:{n}": w for n, w in after.items()}
        return cls(config, changes, info, full_form(changes), lambda: tensors)

    @classmethod
    def merge(cls, deltas: Sequence[EditDelta], *, force: bool = False) -> EditDelta:
        """One delta that does what ``deltas`` do in this order.

        Where one begins at what the one before it left, the result is exact; where several begin at the same
        weights, their differences are added. Low-rank forms add up to a low-rank form.

        Raises:
            FingerprintError: they were made on different models or fit neither way (``force`` adds the differences).
            ValueError: there is none, or full and low-rank forms are mixed.
        """
        if not deltas:
            raise ValueError("there must be at least one delta to merge")
        first = deltas[0]
        if len({delta.is_low_rank for delta in deltas}) > 1:
            raise ValueError("full and low-rank deltas cannot be merged with each other")
        if not force and any(config_hash(delta.config) != config_hash(first.config) for delta in deltas):
            raise FingerprintError("the deltas were made on models of different configs")
        info = replace(EditInfo.now([]), hparams=first.info.hparams).with_edits_of(delta.info for delta in deltas)
        parts = ((delta.changes, delta.tensors()) for delta in deltas)
        if first.is_low_rank:
            changes, pairs = merge_low_rank(parts, force)
            return cls._low_rank(first.config, changes, info, pairs)
        return cls._full(first.config, *merge_full(parts, force), info)

    @classmethod
    def _low_rank(
        cls,
        config: dict[str, Any],
        changes: dict[str, Change],
        info: EditInfo,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
    ) -> EditDelta:
        tensors = {f"up:{name}": up for name, (up, _) in pairs.items()}
        tensors |= {f"down:{name}": down for name, (_, down) in pairs.items()}
        return cls(config, changes, info, {key: value_of(w) for key, w in tensors.items()}, lambda: tensors)

    # Looking at -----------------------------------------------------------------------------------------------

    @property
    def is_low_rank(self) -> bool:
        """Whether this is the form that :meth:`compress` gives."""
        return any(key.startswith("up:") for key in self.stored)

    @property
    def rank(self) -> int | None:
        """The largest rank of a low-rank form; ``None`` for the full form."""
        return max((v.spec.shape[-1] for k, v in self.stored.items() if k.startswith("up:")), default=None)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are held, here or in a file."""
        return sum(value.spec.nbytes for value in self.stored.values())

    def __repr__(self) -> str:
        form = f"rank {self.rank}" if self.is_low_rank else "full"
        return f"EditDelta({len(self.info.requests)} requests, {', '.join(self.changes)}, {form}, {self.nbytes} bytes)"

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of :attr:`stored`, on the CPU, checked against their hashes; read now if they are in a file."""
        tensors = self._read()
        for key, value in self.stored.items():
            if value_of(tensors[key]) != value:
                raise DamagedFileError(f"{key} is damaged: its bytes do not match its hash")
        return tensors

    def change(self) -> dict[str, Tensor]:
        """What is added to each matrix, by name: fp32 (fp64 for fp64 models), on the CPU."""
        tensors = self.tensors()
        if self.is_low_rank:
            return {name: tensors[f"up:{name}"] @ tensors[f"down:{name}"] for name in self.changes}
        return {name: wide(tensors[f"after:{name}"]) - wide(tensors[f"before:{name}"]) for name in self.changes}

    # Applying -------------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module, *, force: bool = False) -> dict[str, Tensor]:
        """Put the change on ``model``, in place.

        Args:
            model: the model it was made on, in the state it was made in.
            force: do it on another model, whose matrices have the same names and shapes: there the difference is added,
                and rounded to the model's dtype.

        Returns:
            The matrices as they were, by name.

        Raises:
            FingerprintError: the model's config or matrices are others; says which. Nothing was changed.
            DamagedFileError: the tensors in the file are damaged. Nothing was changed.
            EditDiverged: the change would put NaN or infinite numbers into the model. Nothing was changed.
        """
        model = uncompiled(model)
        weights = self._matrices(model, force)
        now = {name: value_of(w) for name, w in weights.items()}
        if not force:
            self._check_state(now, "before", "after", "is applied to this model already")
        exact = not self.is_low_rank and all(now[name] == change.before for name, change in self.changes.items())
        if exact:
            tensors = self.tensors()
            new = {name: tensors[f"after:{name}"] for name in self.changes}
        else:
            change = self.change()
            new = {name: added(w.detach(), change[name]) for name, w in weights.items()}
        return self._write(model, weights, now, new)

    def revert(self, model: nn.Module, *, force: bool = False) -> dict[str, Tensor]:
        """Take the change back from ``model``, in place; the inverse of :meth:`apply`, with the same errors.

        The full form is always exact. The low-rank form is where this object was applied to this model; elsewhere the
        difference is subtracted, and that is refused, unless forced, if rounding does not give the matrix before.
        """
        model = uncompiled(model)
        weights = self._matrices(model, force)
        now = {name: value_of(w) for name, w in weights.items()}
        kept, made = self._replaced.get(model, ({}, {}))
        here = bool(kept) and now == made
        if not here and not force:
            self._check_state(now, "after", "before", "is not applied to this model")
        if here:
            new = kept
        elif not self.is_low_rank and all(now[name] == change.after for name, change in self.changes.items()):
            tensors = self.tensors()
            new = {name: tensors[f"before:{name}"] for name in self.changes}
        else:
            change = self.change()
            new = {name: added(w.detach(), -change[name]) for name, w in weights.items()}
            inexact = [name for name, w in new.items() if value_of(w) != self.changes[name].before]
            if inexact and not force:
                raise FingerprintError(
                    f"subtracting this low-rank delta does not give {inexact[0]} as it was, bit for bit; load the "
                    "model again, or use force to come close"
                )
        replaced = self._write(model, weights, now, new)
        self._replaced.pop(model, None)
        return replaced

    def _matrices(self, model: nn.Module, force: bool) -> dict[str, nn.Parameter]:
        if not force:
            check_config(self.config, model, "this delta")
        specs = {name: change.before.spec for name, change in self.changes.items()}
        return matrices_of(model, specs, "this delta", any_dtype=force)

    def _check_state(self, now: dict[str, Value], wanted: str, other: str, already: str) -> None:
        if all(now[name] == getattr(change, wanted) for name, change in self.changes.items()):
            return
        if all(now[name] == getattr(change, other) for name, change in self.changes.items()):
            raise FingerprintError(f"this delta {already}")
        wrong = next(name for name, change in self.changes.items() if now[name] != getattr(change, wanted))
        raise FingerprintError(
            f"{wrong} is not as it was {wanted} this edit: it hashes to {now[wrong].sha256[:12]}, not to "
            f"{getattr(self.changes[wrong], wanted).sha256[:12]}; use force to add the difference all the same"
        )

    def _write(
        self, model: nn.Module, weights: dict[str, nn.Parameter], now: dict[str, Value], new: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        _check_finite(new)
        originals = {name: w.detach().clone() for name, w in weights.items()}
        remember(model, unedited)
        restore(weights, new)
        made = {name: value_of(w) for name, w in weights.items()}
        if self.is_low_rank:
            self._replaced[model] = (originals, made)
        for name in weights:
            note(model, name, now[name], made[name], lambda old=originals[name]: old)  # type: ignore[misc]
        return originals

    # Making small ---------------------------------------------------------------------------------------------

    def compress(
        self, model: nn.Module, tok: Any, *, rank: int | None = None, tolerance: float | None = None
    ) -> EditDelta:
        """The change as a pair of thin matrices, if that holds the edit.

        It holds if every request that the full change wins under teacher forcing is won, and the model's free answer to
        every request's prompt is the same as with the full change, or the target.

        Args:
            model: the model that the delta fits, before or after it; it is left as found.
            tok: its tokenizer.
            rank: of the pair.
            tolerance: instead of ``rank``, the largest error of the change in the Frobenius norm, as a share of
                the change; the smallest rank that keeps to it is taken.

        Raises:
            CompressionError: the low-rank change loses a request, or says something else; names it.
            FingerprintError: the model is neither as before the edit nor as after it.
            ValueError: neither rank nor tolerance is given, or both, or one that makes no sense.
        """
        if (rank is None) == (tolerance is None):
            raise ValueError("give either a rank or a tolerance")
        if (rank is not None and rank < 1) or (tolerance is not None and not 0 <= tolerance < 1):
            raise ValueError("rank must be at least 1, tolerance at least 0 and below 1")
        weights = self._matrices(model, force=False)
        pairs = {}
        for name, change in self.change().items():
            parts = decompose(change, weights[name])
            pairs[name] = pair_of(parts, rank if rank is not None else rank_within(parts[1], tolerance or 0.0))
        with self.before(model):
            after = {name: value_of(added(weights[name].detach(), u @ d)) for name, (u, d) in pairs.items()}
            changes = {name: Change(change.before, after[name]) for name, change in self.changes.items()}
            small = self._low_rank(self.config, changes, self.info, pairs)
            wanted, found = self.behaviour(model, tok), small.behaviour(model, tok)
        for request, (won, said), (still, says) in zip(self.info.requests, wanted, found, strict=True):
            if (won and not still) or says not in (said, *(a.strip() for a in right_answers(request))):
                raise CompressionError(
                    f"rank {small.rank} does not hold the edit: after {request['prompt']!r} the model says {says!r}, "
                    f"not {said!r}" + (" and loses its target" if won and not still else "")
                )
        return small

    @contextmanager
    def before(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside, ``model`` is as it was before this edit; afterwards as it was found, before the edit or after it."""
        weights = self._matrices(model, force=False)
        found = {name: w.detach().clone() for name, w in weights.items()}
        applied = any(value_of(w) != self.changes[name].before for name, w in weights.items())
        inner = uncompiled(model)
        replaced = self._replaced.get(inner)
        with passing(model):
            try:
                if applied:
                    self.revert(model)
                yield model
            finally:
                if applied:
                    restore(weights, found)
                    if replaced is not None:
                        self._replaced[inner] = replaced

    def behaviour(self, model: nn.Module, tok: Any) -> list[tuple[bool, str]]:
        """For each request, whether the model with this change wins it under teacher forcing, and its free answer.

        ``model`` is as before the edit, and left so.
        """
        if not self.info.requests:
            return []
        append_eos = bool((self.info.hparams or {}).get("append_eos"))
        with edited(model, self):
            won = says_target(model, tok, self.info.requests, append_eos)
            return [(w, generate(model, tok, r["prompt"])) for w, r in zip(won, self.info.requests, strict=True)]

    def save_lora(self, path: str | Path, model: nn.Module, tok: Any, *, rank: int | None = None) -> int:
        """Write the change as a PEFT LoRA adapter for the unedited model.

        It is loaded with PEFT before it is kept. After the prompt of each edit the model must give a right answer, or
        say what the edited one says; after a rephrase it must give one where the edited model does.

        Args:
            path: a folder, which must not exist, or be empty.
            model: the model that the delta fits, before or after it; it is left as found.
            tok: its tokenizer.
            rank: of the adapter; by default the smallest that servers take (8, 16, ..., 512) and that keeps the
                answers. Where the change has a smaller one, the rest is zeros.

        Returns:
            The adapter's rank. A server must allow it: vLLM by ``--max-lora-rank``.

        Raises:
            CompressionError: an answer differs, and its prompt is named; the edits changed nothing; or a rank above 512
                would be needed, or was asked for.
            ModuleNotFoundError: PEFT is not installed.
            StorageError: the folder is not empty, or cannot be written.
            FingerprintError: the model is neither as before the edit nor as after it.
        """
        check_place(Path(path))
        if not self.changes:
            raise CompressionError("the edits changed no weight; there is nothing for an adapter to hold")
        with self.before(model):
            with edited(model, self):
                wanted = answers(model, tok, asked_prompts(self.info.requests))
            return save_lora(Path(path), model, tok, self.change(), self.info.requests, wanted, rank)

    # On disk --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> int:
        """Write the delta to the folder ``path``, whole or not at all, in place of one that is there.

        Returns:
            Bytes on disk.

        Raises:
            StorageError: it cannot be written, or the folder holds something else.
        """
        return save_delta((self.config, self.changes, self.info, self.stored, self.tensors), Path(path))

    @classmethod
    def load(cls, path: str | Path) -> EditDelta:
        """Read a saved delta's manifest. Its tensors are read when needed, after the model's shapes were compared.

        Raises:
            DamagedFileError: not a saved delta, damaged, or pointing outside its folder.
            StorageError: it cannot be read.
        """
        return cls(*load_delta(Path(path)))

    # On the hub -----------------------------------------------------------------------------------------------

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        base: Base | None = None,
        adapter: str | Path | None = None,
        measured: Mapping[str, Any] | None = None,
        revision: str | None = None,
        message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the delta and a model card to a repository of the Hugging Face hub, which is made if it is not there.

        Prompts, targets and every other text of the requests go along. What the settings say of this machine's
        folders does not.

        Args:
            repo_id: ``OWNER/NAME``.
            private: of a new repository. One that is there and public is refused unless this is ``False``.
            base: the model that the edits were made on; by default what the settings name, and its licence if found.
            adapter: a folder that :meth:`save_lora` wrote, to lie beside the delta for PEFT and transformers.
            measured: a report of ``kdpo check --json`` on these edits, for the card.
            revision: the branch; by default the main one.
            message: of the commit.
            token: of the hub; by default the one that is logged in.

        Returns:
            The address of the commit.

        Raises:
            HubError: the repository is public, holds something else, or cannot be written to; the report is of other
                edits.
            ModelError: no model is named.
            StorageError: the adapter cannot be read.
        """
        hub.check_push(repo_id, self.changes, measured)
        base = base or hub.base_of(self.info, token=token)
        info = hub.without_paths(self.info)
        with TemporaryDirectory(prefix="kdpo-") as place:
            folder = Path(place)
            EditDelta(self.config, self.changes, info, self.stored, self._read).save(folder)
            hub.complete(folder, repo_id, base, self.changes, info, adapter, measured)
            return hub.push(folder, repo_id, private=private, revision=revision, message=message, token=token)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | None = None,
    ) -> EditDelta:
        """Read the delta in a repository of the Hugging Face hub, or in a folder, as :meth:`load` does.

        Args:
            repo_id: ``OWNER/NAME``, or a folder.
            revision: a branch, a tag or a commit.
            cache_dir: where the hub's files are kept; by default where they always are.
            local_files_only: ask the hub nothing.
            token: of the hub; by default the one that is logged in.

        Raises:
            HubError: the repository is not there or holds no delta.
            DamagedFileError: the delta is damaged.
            StorageError: it cannot be read.
        """
        if Path(repo_id).is_dir():
            return cls.load(repo_id)
        folder = hub.pull(
            str(repo_id), revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        return cls(*load_delta(folder, follow_links=True))


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, w in tensors.items():
        if not torch.isfinite(w).all():
            raise EditDiverged(f"the edit would put NaN or infinite numbers into {name}")
