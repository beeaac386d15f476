"""Second moments of what matrices are fed on ordinary text, computed once for each model and kept on disk.

The last tokens of the names in that text count as much as all its tokens together (:mod:`.names`), and so do the first
tokens of both. What the text's predictions depend on is found along with them (:mod:`.sensitivity`).

They are kept by the content of the model's weights, the matrix, the text and the number of tokens. An edited model has
those of the unedited one that it came from: :func:`remember` notes what a model is before something changes it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..cache import cache_folder
from ..engine.generation import batches
from ..engine.structure import room
from ..engine.weights import as_found
from ..errors import FingerprintError, HyperParamsError, ModelError
from . import kept_tensors
from .names import RULE, name_windows, names_in
from .sensitivity import sensitivities

LOG = logging.getLogger(__name__)
# Paragraphs of the Simple English Wikipedia, one a line; text/LICENSE says which.
GENERAL_TEXT = Path(__file__).parent / "text" / "simple_wikipedia.txt"
LONGEST = 256  # tokens that are read of a line
TOGETHER = 4096  # tokens that are read at a time, padding among them
SENSED = 2000  # tokens on which it is found what predictions depend on
ENOUGH = 5  # tokens for each input of a matrix; with fewer, many directions that the text lacks pass for rare
# The first token of a text counts by itself: many models answer to whatever comes first with inputs of another size
# altogether (Sun et al. 2024, "Massive Activations"), which would make all other inputs look rare.
FIRST = 1
# Directions that are told apart, those of the largest moments; the rest is damped alike.
RANK = 2048
# Parts of each parameter whose bits are added up for its fingerprint.
PARTS = 1024


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Of second moments ``[F, F]``: their mean eigenvalue, first tokens aside, the ``R`` largest and the next
    ``[R + 1]``, fp32, and the directions ``[F, R]`` of those ``R``. ``sensitivity``: of predictions to the matrix's
    outputs, see :mod:`.sensitivity`. ``made``: what was made of it, see :mod:`.preconditioning`. ``file``: where it is
    kept.
    """

    TENSORS: ClassVar = ("mean", "values", "directions", "sensitivity")

    mean: Tensor
    values: Tensor
    directions: Tensor
    sensitivity: Tensor
    made: dict[Any, Any] = field(default_factory=dict)
    file: Path | None = None

    @classmethod
    def kept(cls, file: Path) -> Spectrum | None:
        """The one in ``file``, if that is there and whole."""
        stored = kept_tensors.load(file, cls.TENSORS)
        if stored is None:
            return None
        return cls(stored["mean"], stored["values"], stored["directions"], stored["sensitivity"], file=file)

    @classmethod
    def of(cls, moments: Tensor, rank: int = RANK, first: Tensor | None = None, sensitivity: float = 1.0) -> Spectrum:
        """That of sums or means ``[F, F]``, fp32, with at most ``rank`` directions.

        ``first``: those of first tokens, which add to the moments, and not to their mean eigenvalue.
        """
        values, directions = torch.linalg.eigh(moments if first is None else moments + first)
        top = min(rank, len(values) - 1)
        values = values.clamp_min(0).flip(0)[: top + 1]
        mean = moments.trace() / len(moments)
        return cls(mean, values, directions.flip(1)[:, :top].contiguous(), torch.tensor(sensitivity))


Which = Literal["all", "all but first", "last", "first"]
Unedited = Callable[[nn.Module], AbstractContextManager[Any]]
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[str, tuple[Any, ...], int], Spectrum]] = WeakKeyDictionary()
_BASE: WeakKeyDictionary[nn.Module, tuple[str, Unedited]] = WeakKeyDictionary()


def spectra(model: nn.Module, tok: Any, names: Sequence[str], text: str | None, tokens: int) -> dict[str, Spectrum]:
    """Find the spectra of the inputs of the matrices ``names``: known, kept on disk, or computed now.

    Args:
        model: a model. If it was edited, and :func:`remember` was told before, they are the unedited one's.
        tok: its tokenizer.
        names: parameter names.
        text: a file in UTF-8, a paragraph or sentence a line; ``None`` is :data:`GENERAL_TEXT`.
        tokens: of that text, from its beginning, at most.

    Raises:
        HyperParamsError: the file cannot be read or is empty.
        ModelError: inputs are not finite.
    """
    file = GENERAL_TEXT if text is None else Path(text)
    found = _KNOWN.setdefault(model, {})
    read = str(file), *_version(file)
    missing = [name for name in names if (name, read, tokens) not in found]
    if missing:
        lines = _lines(file)
        base, unedited = remember(model)
        places = {name: _place(base, name, lines, tokens) for name in missing}
        loaded = {name: spectrum for name, place in places.items() if (spectrum := Spectrum.kept(place)) is not None}
        computed = [name for name in missing if name not in loaded]
        if computed:
            start = time.perf_counter()
            with _as_it_was(model, unedited):
                edited = fingerprint(model) != base
                if edited:
                    LOG.warning("second moments are those of an edited model: what it was before is not known")
                longest = int(min(LONGEST, room(model)))
                texts = _windows(tok, lines, tokens, longest), name_windows(tok, names_in(lines), longest)
                found_now = _compute(model, computed, *texts, _windows(tok, lines, min(tokens, SENSED), longest))
            seconds = time.perf_counter() - start
            LOG.info("second moments of %d matrices were computed in %.1f s", len(computed), seconds)
            loaded |= found_now
            if not edited:
                for name, spectrum in found_now.items():
                    kept_tensors.save(places[name], {key: getattr(spectrum, key) for key in Spectrum.TENSORS})
                    loaded[name] = replace(spectrum, file=places[name])
        found.update({(name, read, tokens): spectrum for name, spectrum in loaded.items()})
    return {name: found[name, read, tokens] for name in names}


def _version(file: Path) -> tuple[int, ...]:
    """What tells a file from what was written in its place."""
    with suppress(OSError):  # said when it is read
        stat = file.stat()
        return stat.st_mtime_ns, stat.st_size
    return ()


def remember(model: nn.Module, unedited: Unedited | None = None) -> tuple[str, Unedited]:
    """Note what ``model`` is now, before something changes its weights, unless that was noted already.

    ``unedited``: inside the context that it makes of the model, the model is as it is now. Where none was noted before,
    and the model is still what it was then, this one is. Returns what was noted: a fingerprint, and such a function.
    """
    if model not in _BASE:
        _BASE[model] = fingerprint(model), unedited or _as_it_is
    elif unedited is not None and not remembered(model) and fingerprint(model) == _BASE[model][0]:
        _BASE[model] = _BASE[model][0], unedited
    return _BASE[model]


def remembered(model: nn.Module) -> bool:
    """Say whether it was noted what ``model`` was, and how it becomes that again."""
    return model in _BASE and _BASE[model][1] is not _as_it_is


def _as_it_is(model: nn.Module) -> AbstractContextManager[Any]:
    return nullcontext()


def remember_copy(copied: nn.Module, model: nn.Module) -> None:
    """Note that ``copied`` came from what ``model`` came from."""
    if model in _BASE:
        _BASE[copied] = _BASE[model]
        _KNOWN[copied] = dict(_KNOWN.get(model, {}))


@contextmanager
def _as_it_was(model: nn.Module, unedited: Unedited) -> Iterator[None]:
    """Inside, ``model`` is as it was before it was edited, or as it is where that is no longer known."""
    with ExitStack() as stack:
        with suppress(FingerprintError):
            stack.enter_context(unedited(model))
        yield


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Hash every parameter's name, dtype, shape and bits (blake2b, hex).

    Of a parameter's bits the sums of a thousand parts are hashed, which takes one pass over the weights at the memory's
    speed: tenths of a second for 500 MB on a CPU. A single entry that changes is seen; two that change places within a
    part are not. A model of which some weights are offloaded is like no other.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        if parameter.device.type == "meta":
            digest.update(f"{os.getpid()} {id(model)}".encode())
            continue
        bits = parameter.detach().contiguous().view(-1).view(torch.uint8)
        if bits.storage_offset() % 8:
            bits = bits.clone()  # integers of eight bytes must begin at a multiple of eight
        summed = bits.numel() // (8 * PARTS) * 8 * PARTS
        if summed:
            digest.update(bits[:summed].view(torch.int64).view(PARTS, -1).sum(1).cpu().numpy().data)
        digest.update(bits[summed:].cpu().numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def second_moments(
    model: nn.Module, names: Sequence[str], windows: Sequence[Tensor], which: Which = "all but first"
) -> dict[str, tuple[Tensor, int]]:
    """Sum ``k k^T`` over the inputs of each module named, in one pass that ends with the last of them.

    A bar shows the progress of what takes more than a second.

    Args:
        model: a language model. It is left as found.
        names: modules that a pass calls once each.
        windows: token ids, int64, of any lengths that the model takes.
        which: tokens of each that count.

    Returns:
        For each name the sum, ``[F, F]``, fp64, on the module's device, and the number of inputs.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    counted = torch.empty(0)
    waiting: set[str] = set()

    def hook(name: str) -> Any:
        def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + _squares(arguments[0], counted)
            waiting.discard(name)
            if not waiting:
                raise _AllSeen

        return model.get_submodule(name).register_forward_pre_hook(add)

    handles = [hook(name) for name in names]
    bar = tqdm(total=len(windows), desc="second moments", unit="text", delay=1, disable=None, leave=False)
    try:
        with as_found(model), bar:
            for ids, mask, counted in _padded(model, windows, which):
                waiting.update(names)
                with suppress(_AllSeen):
                    model(input_ids=ids, attention_mask=mask, use_cache=False)
                count += int(counted.sum())
                bar.update(len(ids))
    finally:
        for handle in handles:
            handle.remove()
    return {name: (sums[name], count) for name in names if count}


class _AllSeen(Exception):
    """Every module's input was seen."""


def _lines(file: Path) -> list[str]:
    try:
        lines = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise HyperParamsError(f"mom2_dataset: {file} cannot be read: {error}") from error
    if not lines:
        raise HyperParamsError(f"mom2_dataset: {file} holds no text")
    return lines


def _windows(tok: Any, lines: Sequence[str], tokens: int, longest: int = LONGEST) -> list[Tensor]:
    """The first lines that together have ``tokens`` tokens, as token ids, ``longest`` of each line at most."""
    windows, read = [], 0
    for line in lines:
        if read >= tokens:
            break
        ids = torch.tensor(tok(line)["input_ids"], dtype=torch.int64)[: min(longest, tokens - read)]
        if len(ids) > FIRST:
            windows.append(ids)
            read += len(ids)
    if not windows:
        raise HyperParamsError("mom2_dataset: the text's lines have one token at most")
    return sorted(windows, key=len)


def _compute(
    model: nn.Module,
    names: Sequence[str],
    windows: Sequence[Tensor],
    mentioned: Sequence[Tensor],
    sensed: Sequence[Tensor],
) -> dict[str, Spectrum]:
    """Of the matrices ``names``: on all tokens of ``windows`` but the first, as much again on the last of each
    ``mentioned``, and as much on the first of both; their sensitivities on ``sensed``.
    """
    modules = {name: name.rpartition(".")[0] for name in names}
    matrices = list(modules.values())
    moments = second_moments(model, matrices, windows)
    inputs, read = max((len(sums), count) for sums, count in moments.values())
    if read < ENOUGH * inputs:
        LOG.warning(
            "second moments are of %d tokens for a matrix of %d inputs, so edits spare too little: raise "
            "mom2_n_samples, or name a longer text in mom2_dataset",
            read,
            inputs,
        )
    of_names = second_moments(model, matrices, mentioned, "last")
    of_first = second_moments(model, matrices, [ids[:1] for ids in (*windows, *mentioned)], "first")
    sensitive = sensitivities(model, matrices, sensed)
    found = {}
    for name, module in tqdm(modules.items(), desc="their eigenvalues", delay=1, disable=None, leave=False):
        means = [sums / count for sums, count in (of[module] for of in (moments, of_names) if of)]
        total = torch.stack(means).sum(0).float()
        first = (of_first[module][0] / of_first[module][1]).float()
        if not torch.isfinite(total + first).all() or not total.trace() > 0:
            raise ModelError(f"mom2_weight: the inputs of {name} are zero or not finite on the text")
        found[name] = Spectrum.of(total, first=first, sensitivity=sensitive[module])
    return found


def _squares(values: Tensor, counted: Tensor) -> Tensor:
    """The sum of ``v v^T``, ``[F, F]`` fp64, over the tokens of ``values``, ``[B, L, F]`` or flattened, that count."""
    rows = values.reshape(counted.numel(), -1)[counted.flatten().to(values.device)].float()
    return (rows.T @ rows).double()


def _padded(
    model: nn.Module, windows: Sequence[Tensor], which: Which = "all but first"
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids and attention mask ``[B, L]`` on the model's device, and which tokens count, ``[B, L]`` bool."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    for members in batches([len(window) for window in windows], len(windows), TOGETHER):
        group = [windows[i] for i in members]
        ids = nn.utils.rnn.pad_sequence(group, batch_first=True).to(device)
        real = nn.utils.rnn.pad_sequence([torch.ones_like(g) for g in group], batch_first=True).bool()
        mask = real.to(ids)
        if which == "first":
            real[:, FIRST:] = False
        elif which != "all":
            real[:, :FIRST] = False
        if which == "last":
            real[:, :-1] &= ~real[:, 1:]
        yield ids, mask, real


def _place(base: str, name: str, lines: Sequence[str], tokens: int) -> Path:
    told = f"{base} {name} {tokens} {LONGEST} {FIRST} apart {RANK} {SENSED} {RULE} "
    key = hashlib.blake2b((told + "\n".join(lines)).encode(), digest_size=16)
    return cache_folder() / "second_moments" / f"{key.hexdigest()}.safetensors"
