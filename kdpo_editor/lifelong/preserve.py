"""Spare what a model usually does: steps preconditioned on both sides of a matrix (``preserve``, ``preserve_outputs``).

An update ``D`` of a matrix changes its output for an input ``k`` by ``D k``, for the edited fact and for every other
text alike. With second moments over text such as the model usually sees, ``C = E[k k^T]`` of the inputs and
``G = E[g g^T]`` of the gradients of its own predictions' leads with respect to the outputs, steps are taken on ``D`` in

    W = W_0 + Q D P,    P = (I + preserve * C / mean eigenvalue of C)^(-1/2)
                        Q = (I + preserve_outputs * G / mean eigenvalue of G)^(-1/2)

so that what an update does to common inputs is damped and what it does to rare ones, such as an edited subject's, is
not; and that outputs move rather in directions which few predictions hang on. ``D`` is trained in the matrix's place,
with ``P k`` for input and ``Q`` on its output, and what ``W_0`` makes of ``k`` is added; for the first edited matrix
``P k`` and ``W_0 k`` are known before the first step, so steps cost what they cost without, but for ``Q``. For others
``W`` itself is made where there are many tokens.

This is a Kronecker-factored natural gradient (Martens and Grosse 2015), its input side for the purpose that MEMIT's
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
from transformers.pytorch_utils import Conv1D

from ..engine.cached_forward import Captured, Suffix
from ..engine.patches import forward_is
from ..engine.weights import as_found, only_training
from ..engine.writing import write
from ..errors import HyperParamsError, ModelError
from ..hparams import KDPOHyperParams

# Lines of a text that are read, and tokens of each.
LINES = 4096
LONGEST = 256
# Texts whose predictions' gradients are looked at, at most.
GRADIENTS = 1024
# Texts that a model writes, their longest length and how many at a time.
TEXTS = 512
LENGTH = 32
ROWS = 64
# Directions that are told apart, those of the largest moments; the rest is damped alike.
RANK = 2048


@dataclass(frozen=True)
class Damping:
    """A symmetric matrix: ``rest * I + left @ right``, of ``[N, R]`` and ``[R, N]``, or ``left`` ``[N, N]`` alone."""

    left: Tensor
    right: Tensor | None
    rest: float

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows`` times it: ``[..., N]`` to ``[..., N]``."""
        return rows @ self.left if self.right is None else self.rest * rows + (rows @ self.left) @ self.right


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Of ``C`` or ``G``: its mean eigenvalue, the ``R`` largest and the next ``[R + 1]``, and those R's directions."""

    mean: Tensor
    values: Tensor
    directions: Tensor
    _made: dict[Any, Damping] = field(default_factory=dict)

    @classmethod
    def of(cls, moments: Tensor) -> Spectrum:
        """That of sums or means ``[N, N]``, fp32."""
        values, directions = torch.linalg.eigh(moments)
        top = min(RANK, len(values) - 1)
        values = values.clamp_min(0).flip(0)[: top + 1]
        return cls(moments.trace() / len(moments), values, directions.flip(1)[:, :top].contiguous())

    def damping(self, strength: float, weight: Tensor) -> Damping:
        """``(I + strength * moments / mean)^(-1/2)`` in the dtype and place of ``weight``, of any shape."""
        key = strength, weight.dtype, weight.device
        if key not in self._made:
            factors = (1 + strength * self.values / self.mean).rsqrt()
            rest = factors[-1].item()
            left, right = self.directions * (factors[:-1] - rest), self.directions.T
            if 2 * len(factors) < len(self.directions):
                self._made[key] = Damping(left.to(weight), right.to(weight), rest)
            else:
                whole = left @ right + rest * torch.eye(len(left), device=left.device)
                self._made[key] = Damping(whole.to(weight), None, 0.0)
        return self._made[key]


@dataclass(frozen=True)
class Preconditioner:
    """Of one matrix: ``P`` and ``Q``, ``None`` where they are the identity.

    ``transposed``: the matrix is stored as ``[F, D]``, as GPT-2's are, and not as ``[D, F]``.
    """

    inputs: Damping | None
    outputs: Damping | None
    transposed: bool

    def change(self, update: Tensor) -> Tensor:
        """What ``D`` in the place of the matrix changes it by: ``Q D P``, or ``P D Q`` where ``transposed``. ``[D, F]``
        or ``[F, D]``, as the matrix."""
        rows = update.T if self.transposed else update
        if self.inputs is not None:
            rows = self.inputs(rows)
        if self.outputs is not None:
            rows = self.outputs(rows.T).T
        return rows.T if self.transposed else rows

    def before(self, inputs: Tensor) -> Tensor:
        """``P k`` of inputs ``[..., F]``."""
        return inputs if self.inputs is None else self.inputs(inputs)

    def product(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """What ``weight`` makes of ``inputs``, ``[..., F]`` to ``[..., D]``."""
        return inputs @ (weight if self.transposed else weight.T)


@contextmanager
def sparing(
    suffix: Suffix, weights: dict[str, nn.Parameter], preconditioners: Sequence[Preconditioner], inside: bool
) -> Iterator[Callable[[Captured], Captured]]:
    """Inside, ``weights`` hold ``D``, zero at first; replaying what the function yielded makes of a capture gives what
    ``W_0 + Q D P`` would.

    Afterwards ``weights`` are ``W_0 + Q D P``, rounded to their dtype; on an exception they are left undefined. Without
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
            inner = spared.before(inner).to(captured.inner.device)
            captured = replace(captured, hidden=captured.hidden + base, inner=inner)
        return captured

    with ExitStack() as patches, torch.no_grad():
        for (name, weight), spared in zip(weights.items(), preconditioners, strict=True):
            module = suffix.model.get_submodule(name.rpartition(".")[0])
            if module is suffix.module and inside:
                shifts.append((spared, starts[name]))
                patches.enter_context(forward_is(module, _after(module, spared)))
            else:
                patches.enter_context(forward_is(module, _with_start(module, spared, starts[name])))
            weight.zero_()
        with torch.enable_grad():
            yield adapted
        for (name, weight), spared in zip(weights.items(), preconditioners, strict=True):
            weight.copy_(starts[name] + spared.change(weight))


def _after(module: nn.Module, spared: Preconditioner) -> Callable[[Tensor], Tensor]:
    """``module``'s forward with ``Q`` on the matrix's output, but not on the bias that it adds."""
    forward: Callable[[Tensor], Tensor] = module.forward
    outputs, bias = spared.outputs, getattr(module, "bias", None)
    if outputs is None:
        return forward
    if bias is None:
        return lambda inputs: outputs(forward(inputs))
    return lambda inputs: outputs(forward(inputs) - bias) + bias


def _with_start(module: nn.Module, spared: Preconditioner, start: Tensor) -> Callable[[Tensor], Tensor]:
    """What ``W_0 + Q D P`` makes of an input, where ``module`` holds ``D``.

    For more tokens than it has outputs that matrix itself is made, once for each step, which takes less than ``P k`` of
    each; not in half precision, in which it would lose small changes.
    """
    forward = _after(module, spared)
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    whole = start.dtype in (torch.float32, torch.float64)
    made: dict[tuple[int, bool], Tensor] = {}

    def matrix() -> Tensor:
        key = weight._version, torch.is_grad_enabled()
        if key not in made:
            made.clear()
            made[key] = start + spared.change(weight)
        return made[key]

    def with_start(inputs: Tensor) -> Tensor:
        if not whole or inputs.numel() <= start.numel():
            return forward(spared.before(inputs)) + spared.product(inputs, start)
        output = spared.product(inputs, matrix())
        return output if bias is None else output + bias

    return with_start


# By model, with a matrix's name, its side and the text's name. They stay when the model is edited.
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[str, str, str | None], Spectrum]] = WeakKeyDictionary()


def known(model: nn.Module, names: Sequence[str], hparams: KDPOHyperParams) -> bool:
    """Whether what :func:`preconditioners` needs for the matrices ``names`` was computed before."""
    return not _missing(model, names, hparams.preserve_text, _strengths(hparams))


def preconditioners(
    model: nn.Module, tok: Any, weights: Mapping[str, Tensor], hparams: KDPOHyperParams
) -> list[Preconditioner]:
    """One for each of ``weights``, ``{name: [D, F] or [F, D]}``; none where both strengths are 0.

    Raises what :func:`spectra` raises.
    """
    strengths = _strengths(hparams)
    if not strengths:
        return []
    found = spectra(model, tok, list(weights), hparams.preserve_text, list(strengths))
    made = []
    for name, weight in weights.items():
        dampings = {side: found[name, side].damping(strength, weight) for side, strength in strengths.items()}
        transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
        made.append(Preconditioner(dampings.get("inputs"), dampings.get("outputs"), transposed))
    return made


def spectra(
    model: nn.Module, tok: Any, names: Sequence[str], text: str | None, sides: Sequence[str] = ("inputs",)
) -> dict[tuple[str, str], Spectrum]:
    """Of the "inputs" of the matrices ``names``, of the gradients of their "outputs", or both, by name and side.

    They are computed once for each model object. ``text``: a file of text in UTF-8, a paragraph or sentence a line;
    "shipped" or "kdpo-llama-pararel" for what the shipped or second model was taught; or ``None`` for what ``model``
    writes by itself.

    Raises:
        HyperParamsError: the file cannot be read or is empty.
        ModelError: the model is to write text and its tokenizer has no token to begin with, inputs or gradients are
            not finite, or no prediction depends on a matrix's outputs.
    """
    found = _KNOWN.setdefault(model, {})
    if missing := _missing(model, names, text, sides):
        # Of a text of its own the token that begins it is left out.
        windows, skip = (_own_texts(model, tok), 1) if text is None else (_windows(tok, text), 0)
        modules = [name.rpartition(".")[0] for name in names]
        for side in missing:
            if side == "inputs":
                moments = {module: sums for module, (sums, _) in second_moments(model, modules, windows, skip).items()}
            else:
                moments = lead_moments(model, modules, windows[:GRADIENTS], skip)
            for name, module in zip(names, modules, strict=True):
                total = moments[module].float()
                if not torch.isfinite(total).all():
                    raise ModelError(f"preserve: the {side} of {name}, or their gradients, are not finite on its text")
                if not total.trace() > 0:
                    raise ModelError(f"preserve: nothing depends on the {side} of {name} on its text")
                found[name, side, text] = Spectrum.of(total)
    return {(name, side): found[name, side, text] for name in names for side in sides}


def _strengths(hparams: KDPOHyperParams) -> dict[str, float]:
    both = {"inputs": hparams.preserve, "outputs": hparams.preserve_outputs}
    return {side: strength for side, strength in both.items() if strength}


def _missing(model: nn.Module, names: Sequence[str], text: str | None, sides: Iterable[str]) -> list[str]:
    there = _KNOWN.get(model, {})
    return [side for side in sides if not all((name, side, text) in there for name in names)]


def _windows(tok: Any, text: str) -> list[Tensor]:
    from ..testbed import SECOND_MODEL, second_folder, taught_texts

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
    """``TEXTS`` samples of what ``model`` writes after its first token: token ids with it and without an end token."""
    start = tok.eos_token_id if tok.bos_token_id is None else tok.bos_token_id
    if start is None:
        raise ModelError("preserve: the tokenizer has neither a begin nor an end token; name a preserve_text")
    first = torch.tensor([[start]])
    texts = [text for seed in range(TEXTS // ROWS) for text in write(model, tok, first, LENGTH, draws=ROWS, seed=seed)]
    return [torch.tensor(text.ids) for text in texts if text.new]


@torch.no_grad()
def second_moments(
    model: nn.Module, names: Sequence[str], windows: Iterable[Tensor], skip: int = 0, batch: int = 16
) -> dict[str, tuple[Tensor, int]]:
    """For each module named, the sum of ``k k^T`` over its inputs (``[F, F]``, fp64, on its device) and their number.

    ``windows``: token ids, int64, of any lengths that the model takes; of each, the first ``skip`` do not count: many
    models answer to whatever comes first with inputs of another size altogether (Sun et al. 2024, "Massive
    Activations").
    """
    sums: dict[str, Tensor] = {}
    count = 0
    counted = torch.empty(0)

    def hook(name: str) -> Any:
        def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + _squares(arguments[0], counted)

        return model.get_submodule(name).register_forward_pre_hook(add)

    handles = [hook(name) for name in names]
    try:
        with as_found(model):
            for ids, mask, counted in _padded(model, windows, skip, batch):
                model(input_ids=ids, attention_mask=mask, use_cache=False)
                count += int(counted.sum())
    finally:
        for handle in handles:
            handle.remove()
    return {name: (sums[name], count) for name in names if count}


def lead_moments(
    model: nn.Module, names: Sequence[str], windows: Iterable[Tensor], skip: int = 0, batch: int = 16
) -> dict[str, Tensor]:
    """For each module named, the sum of ``g g^T`` over the tokens of ``windows`` (``[D, D]``, fp64, on its device).

    ``g`` is the gradient, with respect to the module's output for a token, of the sum over the text's positions of
    ``s p (z_1 - z_2)``: by how much the model's first choice leads the second there, times its probability, so that
    what the model is not sure of hardly counts, and times a random sign, so that positions do not add up. Arguments as
    :func:`second_moments`; the signs are the same every time.
    """
    sums: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    signs = torch.Generator().manual_seed(0)

    def hook(name: str) -> Any:
        def keep(_: nn.Module, arguments: Any, output: Tensor) -> Tensor:
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name]

        return model.get_submodule(name).register_forward_hook(keep)

    handles = [hook(name) for name in names]
    try:
        with only_training(model, {}, {}), torch.enable_grad():
            for ids, mask, counted in _padded(model, windows, skip, batch):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
                first, second = logits.topk(2, -1).values.unbind(-1)
                sign = 2.0 * torch.randint(0, 2, first.shape, generator=signs) - 1
                sure = logits.detach().softmax(-1).amax(-1)
                total = ((sign * counted).to(first.device) * sure * (first - second)).sum()
                for name, g in zip(names, torch.autograd.grad(total, [outputs[name] for name in names]), strict=True):
                    sums[name] = sums.get(name, 0) + _squares(g, counted)
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[name] for name in names if sums}


def _squares(values: Tensor, counted: Tensor) -> Tensor:
    """The sum of ``v v^T``, ``[N, N]`` fp64, over the tokens of ``values``, ``[B, L, N]`` or flattened, that count."""
    rows = values.reshape(counted.numel(), -1)[counted.flatten().to(values.device)].float()
    return (rows.T @ rows).double()


def _padded(
    model: nn.Module, windows: Iterable[Tensor], skip: int, batch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids and attention mask ``[B, L]`` on the model's device, and which tokens count, ``[B, L]`` bool."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    stream = iter(windows)
    while group := list(islice(stream, batch)):
        ids = nn.utils.rnn.pad_sequence(group, batch_first=True).to(device)
        real = nn.utils.rnn.pad_sequence([torch.ones_like(g) for g in group], batch_first=True).bool()
        mask = real.to(ids)
        real[:, :skip] = False
        yield ids, mask, real
