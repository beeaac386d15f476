"""Spare what a model usually does: steps preconditioned by the second moments of a matrix's inputs (``preserve``).

An update ``D`` of a matrix changes its output for an input ``k`` by ``D k``, for the edited fact and for every other
text alike. With ``C = E[k k^T]`` over text such as the model usually sees, steps are taken on ``D`` in

    W = W_0 + D P,    P = (I + preserve * C / mean eigenvalue of C)^(-1/2)

so that what an update does to common inputs is damped and what it does to rare ones, such as an edited subject's, is
not. ``D`` is trained in the matrix's place, with ``P k`` for input, and what ``W_0`` makes of ``k`` is added; for the
first edited matrix both are known before the first step, so steps cost what they cost without.

This is the input side of a Kronecker-factored natural gradient (Martens and Grosse 2015), for the purpose that MEMIT's
``C_0`` (Meng et al. 2023, eq. 14) and AlphaEdit's projection (Fang et al. 2025) serve in closed form.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .errors import HyperParamsError, ModelError
from .hparams import KDPOHyperParams
from .suffix import Captured, Suffix, forward_is
from .weights import as_found

# Lines of a text that are read, and tokens of each.
LINES = 4096
LONGEST = 256
# Texts that a model writes, their longest length and how many at a time.
TEXTS = 512
LENGTH = 32
ROWS = 64
# Directions that are told apart, those of the largest moments; the rest is damped alike.
RANK = 2048


@dataclass(frozen=True)
class Preconditioner:
    """``P``, as ``rest * I + left @ right``, with ``left`` ``[F, R]`` and ``right`` ``[R, F]``, or as ``left`` alone.

    ``transposed``: the matrix is stored as ``[F, D]``, as GPT-2's are, and not as ``[D, F]``.
    """

    left: Tensor
    right: Tensor | None
    rest: float
    transposed: bool

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows @ P``: ``[..., F]`` to ``[..., F]``."""
        return rows @ self.left if self.right is None else self.rest * rows + (rows @ self.left) @ self.right

    def change(self, update: Tensor) -> Tensor:
        """What ``D`` in the place of the matrix changes it by: ``D P``, or ``P D`` where ``transposed``."""
        return self(update.T).T if self.transposed else self(update)

    def product(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """What ``weight`` makes of ``inputs``, ``[..., F]`` to ``[..., D]``."""
        return inputs @ (weight if self.transposed else weight.T)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Of ``C``: its mean eigenvalue, the ``R`` largest and the next one ``[R + 1]``, and the directions of those R."""

    mean: Tensor
    values: Tensor
    directions: Tensor
    _made: dict[Any, Preconditioner] = field(default_factory=dict)

    def preconditioner(self, strength: float, weight: Tensor) -> Preconditioner:
        """For updates of ``weight``, in its dtype and place. ``strength``: ``preserve`` of the settings."""
        key = strength, weight.dtype, weight.device, weight.shape
        if key not in self._made:
            factors = (1 + strength * self.values / self.mean).rsqrt()
            rest = factors[-1].item()
            left, right = self.directions * (factors[:-1] - rest), self.directions.T
            transposed = weight.shape[0] == len(self.directions) != weight.shape[1]
            if 2 * len(factors) < len(self.directions):
                self._made[key] = Preconditioner(left.to(weight), right.to(weight), rest, transposed)
            else:
                whole = left @ right + rest * torch.eye(len(left), device=left.device)
                self._made[key] = Preconditioner(whole.to(weight), None, 0.0, transposed)
        return self._made[key]


@contextmanager
def sparing(
    suffix: Suffix, weights: dict[str, nn.Parameter], preconditioners: Sequence[Preconditioner], inside: bool
) -> Iterator[Callable[[Captured], Captured]]:
    """Inside, ``weights`` hold ``D``, zero at first; replaying what the function yielded makes of a capture gives what
    ``W_0 + D P`` would.

    Afterwards ``weights`` are ``W_0 + D P``, rounded to their dtype; on an exception they are left undefined. Without
    preconditioners they stay themselves. ``inside``: whether captures begin at a matrix, and not at its block.
    """
    if not preconditioners:
        yield lambda captured: captured
        return
    starts = {name: weight.detach().clone() for name, weight in weights.items()}
    shifts: list[tuple[Preconditioner, Tensor]] = []

    def adapted(captured: Captured) -> Captured:
        for spared, start in shifts:
            assert captured.inner is not None
            inner = captured.inner.to(start.device)
            base = spared.product(inner, start).view(captured.hidden.shape).to(captured.hidden.device)
            inner = spared(inner).to(captured.inner.device)
            captured = replace(captured, hidden=captured.hidden + base, inner=inner)
        return captured

    with ExitStack() as patches, torch.no_grad():
        for (name, weight), spared in zip(weights.items(), preconditioners, strict=True):
            module = suffix.model.get_submodule(name.rpartition(".")[0])
            if module is suffix.module and inside:
                shifts.append((spared, starts[name]))
            else:
                patches.enter_context(forward_is(module, _with_start(module.forward, spared, starts[name])))
            weight.zero_()
        with torch.enable_grad():
            yield adapted
        for (name, weight), spared in zip(weights.items(), preconditioners, strict=True):
            weight.copy_(starts[name] + spared.change(weight))


def _with_start(
    forward: Callable[[Tensor], Tensor], spared: Preconditioner, start: Tensor
) -> Callable[[Tensor], Tensor]:
    return lambda inputs: forward(spared(inputs)) + spared.product(inputs, start)


# By model and name of a matrix, with the text's name. They stay when the model is edited.
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[str, str | None], Spectrum]] = WeakKeyDictionary()


def known(model: nn.Module, names: Sequence[str], text: str | None) -> bool:
    """Whether the spectra of these matrices' inputs were computed before."""
    return {(name, text) for name in names} <= set(_KNOWN.get(model, {}))


def preconditioners(
    model: nn.Module, tok: Any, weights: Mapping[str, Tensor], hparams: KDPOHyperParams
) -> list[Preconditioner]:
    """One for each of ``weights``, none where ``preserve`` is 0; errors as those of :func:`spectra`."""
    if not hparams.preserve:
        return []
    found = spectra(model, tok, list(weights), hparams.preserve_text)
    return [one.preconditioner(hparams.preserve, weight) for one, weight in zip(found, weights.values(), strict=True)]


def spectra(model: nn.Module, tok: Any, names: Sequence[str], text: str | None) -> list[Spectrum]:
    """Of the inputs of the matrices ``names``; computed once for each model object.

    ``text``: a file of text in UTF-8, a paragraph or sentence a line; "shipped" or "kdpo-llama-pararel" for what the
    shipped or second model was taught; or ``None`` for what ``model`` writes by itself.

    Raises:
        HyperParamsError: the file cannot be read or is empty.
        ModelError: the model is to write text and its tokenizer has no token to begin with, or inputs are not finite.
    """
    if not known(model, names, text):
        # Of a text of its own the token that begins it is left out.
        windows, skip = (_own_texts(model, tok), 1) if text is None else (_windows(tok, text), 0)
        moments = second_moments(model, [n.rpartition(".")[0] for n in names], windows, skip)
        found = _KNOWN.setdefault(model, {})
        for name, (sums, _) in zip(names, moments.values(), strict=True):
            total = sums.float()
            if not torch.isfinite(total).all():
                raise ModelError(f"preserve: the inputs of {name} are NaN or infinite on ordinary text")
            values, directions = torch.linalg.eigh(total)
            top = min(RANK, len(values) - 1)
            values = values.clamp_min(0).flip(0)[: top + 1]
            found[name, text] = Spectrum(total.trace() / len(total), values, directions.flip(1)[:, :top].contiguous())
    return [_KNOWN[model][name, text] for name in names]


def _windows(tok: Any, text: str) -> list[Tensor]:
    from .testbed import SECOND_MODEL, second_folder, taught_texts

    if text == "shipped":
        lines = taught_texts()
    else:
        file = second_folder() / "taught.txt" if text == SECOND_MODEL else Path(text)
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise HyperParamsError(f"preserve_text: {file} cannot be read: {error}") from error
    # A fixed choice of so many that more would not change much.
    chosen = random.Random(0).sample(lines, min(LINES, len(lines)))
    encoded = [torch.tensor(tok(line)["input_ids"], dtype=torch.int64)[:LONGEST] for line in chosen]
    windows = [ids for ids in encoded if len(ids)]
    if not windows:
        raise HyperParamsError(f"preserve_text: {text} holds no text")
    return windows


@torch.no_grad()
def _own_texts(model: nn.Module, tok: Any) -> list[Tensor]:
    """``TEXTS`` samples of what ``model`` writes after its first token: token ids with it and without an end token.

    The same for the same weights; torch's random state and the model's mode are left as they were.
    """
    start = tok.eos_token_id if tok.bos_token_id is None else tok.bos_token_id
    if start is None:
        raise ModelError("preserve: the tokenizer has neither a begin nor an end token; name a preserve_text")
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    texts: list[Tensor] = []
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), as_found(model):
        torch.manual_seed(0)
        first = torch.full((ROWS, 1), start, device=device)
        for _ in range(TEXTS // ROWS):
            written = model.generate(  # type: ignore[operator]
                input_ids=first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=LENGTH,
                pad_token_id=start if tok.pad_token_id is None else tok.pad_token_id,
            ).cpu()
            for row in written:
                ended = (row[1:] == tok.eos_token_id).nonzero().flatten().tolist()
                texts.append(row[: ended[0] + 1 if ended else len(row)])
    return [text for text in texts if len(text) > 1]


@torch.no_grad()
def second_moments(
    model: nn.Module, names: Sequence[str], windows: Iterable[Tensor], skip: int = 0, batch: int = 16
) -> dict[str, tuple[Tensor, int]]:
    """For each module named, the sum of ``k k^T`` over its inputs (``[F, F]``, fp64, on its device) and their number.

    ``windows``: token ids, int64, of any lengths that the model takes; of each, the first ``skip`` do not count: many
    models answer to whatever comes first with inputs of another size altogether (Sun et al. 2024, "Massive
    Activations").
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    sums: dict[str, Tensor] = {}
    count = 0
    real = torch.empty(0)

    def hook(name: str) -> Any:
        def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            keys = arguments[0].reshape(real.numel(), -1)[real.flatten().to(arguments[0].device)].float()
            sums[name] = sums.get(name, 0) + (keys.T @ keys).double()

        return model.get_submodule(name).register_forward_pre_hook(add)

    handles = [hook(name) for name in names]
    try:
        with as_found(model):
            stream = iter(windows)
            while group := list(islice(stream, batch)):
                ids = nn.utils.rnn.pad_sequence(group, batch_first=True).to(device)
                real = nn.utils.rnn.pad_sequence([torch.ones_like(g) for g in group], batch_first=True).bool()
                mask = real.to(ids)
                real[:, :skip] = False
                model(input_ids=ids, attention_mask=mask, use_cache=False)
                count += int(real.sum())
    finally:
        for handle in handles:
            handle.remove()
    return {name: (sums[name], count) for name in names if count}
