"""Preconditioning: steps preconditioned on the inputs of a matrix, so that what a model usually does is spared.

An update ``D`` of a matrix changes its output for an input ``k`` by ``D k``, for the edited fact and for every other
text alike. With the second moments ``C = E[k k^T]`` of the inputs over ordinary text, steps are taken on ``D`` in

    W = W_0 + D P,    P = share * (I + mom2_weight * C / mean eigenvalue of C)^(-1/2)

so that what an update does to common inputs is damped and what it does to rare ones, such as an edited subject's, is
not. Of several matrices each has a share, so that a step goes where it harms least for what it gains. ``D`` is trained
in the matrix's place, with ``P k`` for input, and what ``W_0`` makes of ``k`` is added. For the first edited matrix
both are known before the first step, so steps cost what they cost without.

``P`` is the input side of a Kronecker-factored natural gradient (Martens and Grosse 2015), for the purpose that MEMIT's
``C_0`` (Meng et al. 2023, eq. 14) and AlphaEdit's projection (Fang et al. 2025) serve in closed form. The shares are
what of its output side differs most, see :mod:`.sensitivity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.pytorch_utils import Conv1D

from ..engine.patches import forward_is
from ..errors import ModelError
from ..hparams import KDPOHyperParams
from . import kept_tensors
from .second_moments import Spectrum, spectra

# No matrix counts as harming less than this share of the one that harms most.
LEAST = 1e-6


def preconditioners(
    model: nn.Module, tok: Any, weights: Mapping[str, Tensor], hparams: KDPOHyperParams
) -> list[Preconditioner]:
    """Make one for each of ``weights``, ``{name: [D, F] or [F, D]}``; none where ``mom2_weight`` is 0.

    Raises:
        ModelError: one of ``weights`` stacks the matrices of routed experts.

    Raises what :func:`~kdpo_editor.lifelong.second_moments.spectra` raises, too.
    """
    if not hparams.mom2_weight:
        return []
    for name, weight in weights.items():
        if weight.ndim != 2:
            raise ModelError(
                f"mom2_weight: {name} holds the matrices of {len(weight)} routed experts, each with inputs of its own, "
                "whose second moments are not computed; edit with mom2_weight: 0"
            )
    found = spectra(model, tok, list(weights), hparams.mom2_dataset, hparams.mom2_n_samples)
    made = []
    for (name, weight), share in zip(weights.items(), shares([found[name] for name in weights]), strict=True):
        transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
        made.append(Preconditioner(damping(found[name], hparams.mom2_weight, weight, share), transposed))
    return made


def shares(spectra: Sequence[Spectrum]) -> list[float]:
    """How far a step goes in each of several matrices, for the same gradient; their geometric mean is 1.

    What damping leaves of common inputs is alike in all directions and in proportion to their mean eigenvalue. So a
    step of length 1 harms by that times the sensitivity, and a step's share is the inverse of the harm's root: taken
    twice, by the gradient and by the update, it makes the steps' lengths inverse to the harm.
    """
    harms = torch.stack([(spectrum.mean * spectrum.sensitivity).double().cpu() for spectrum in spectra])
    logs = harms.clamp_min(max(LEAST * harms.max().item(), torch.finfo(harms.dtype).tiny)).log()
    return ((logs.mean() - logs) / 2).exp().tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Damping:
    """A symmetric matrix: ``rest * I + left @ right``, of ``[N, R]`` and ``[R, N]``, or ``left`` ``[N, N]`` alone."""

    left: Tensor
    right: Tensor | None
    rest: float

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows`` times it: ``[..., N]`` to ``[..., N]``."""
        return rows @ self.left if self.right is None else self.rest * rows + (rows @ self.left) @ self.right


def damping(spectrum: Spectrum, strength: float, weight: Tensor, share: float = 1.0) -> Damping:
    """``share * (I + strength * C / mean)^(-1/2)`` of ``spectrum``, in the dtype and place of ``weight``, of any shape.

    It is kept with the spectrum, since every edit of a model asks for the same, and a matrix also beside its file: to
    make it takes as long as an edit.
    """
    key = strength, share, weight.dtype, weight.device
    if key not in spectrum.made:
        factors = (1 + strength * spectrum.values / spectrum.mean).rsqrt()
        rest = factors[-1].item()
        if 2 * len(factors) < len(spectrum.directions):
            left = share * spectrum.directions * (factors[:-1] - rest)
            spectrum.made[key] = Damping(left.to(weight), spectrum.directions.T.to(weight), share * rest)
        else:
            spectrum.made[key] = Damping((share * _whole(spectrum, strength, factors)).to(weight), None, 0.0)
    made: Damping = spectrum.made[key]
    return made


def _whole(spectrum: Spectrum, strength: float, factors: Tensor) -> Tensor:
    """The matrix ``[F, F]``, fp32, with ``factors`` ``[R + 1]`` for eigenvalues, kept on disk if ``spectrum`` is."""
    file = spectrum.file and spectrum.file.parent.with_name("damping") / f"{spectrum.file.stem}-{strength}.safetensors"
    if file and (kept := kept_tensors.load(file, ["whole"])) is not None:
        return kept["whole"]
    left = spectrum.directions * (factors[:-1] - factors[-1])
    whole = left @ spectrum.directions.T + factors[-1] * torch.eye(len(left), device=left.device)
    if file:
        kept_tensors.save(file, {"whole": whole})
    return whole


@dataclass(frozen=True)
class Preconditioner:
    """``P`` of one matrix. ``transposed``: it is stored as ``[F, D]``, as GPT-2's are, and not as ``[D, F]``."""

    inputs: Damping
    transposed: bool

    def change(self, update: Tensor) -> Tensor:
        """What ``D`` in the place of the matrix changes it by: ``D P``, or ``P D`` where ``transposed``. ``[D, F]`` or
        ``[F, D]``, as the matrix."""
        return self.inputs(update.T).T if self.transposed else self.inputs(update)

    def before(self, inputs: Tensor) -> Tensor:
        """``P k`` of inputs ``[..., F]``."""
        return self.inputs(inputs)

    def product(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """What ``weight`` makes of ``inputs``, ``[..., F]`` to ``[..., D]``."""
        return inputs @ (weight if self.transposed else weight.T)


@contextmanager
def preconditioned(
    model: nn.Module, weights: Mapping[str, nn.Parameter], preconditioners: Sequence[Preconditioner]
) -> Iterator[None]:
    """Inside, ``weights`` hold ``D``, zero at first, and their modules do what ``W_0 + D P`` would.

    Afterwards ``weights`` are ``W_0 + D P``, rounded to their dtype; on an exception they are left undefined. Without
    preconditioners they stay themselves.
    """
    if not preconditioners:
        yield
        return
    starts = {name: weight.detach().clone() for name, weight in weights.items()}
    with ExitStack() as patches, torch.no_grad():
        for (name, weight), preconditioner in zip(weights.items(), preconditioners, strict=True):
            module = model.get_submodule(name.rpartition(".")[0])
            patches.enter_context(forward_is(module, _with_start(module, preconditioner, starts[name])))
            weight.zero_()
        with torch.enable_grad():
            yield
        for (name, weight), preconditioner in zip(weights.items(), preconditioners, strict=True):
            weight.copy_(starts[name] + preconditioner.change(weight))


def _with_start(module: nn.Module, preconditioner: Preconditioner, start: Tensor) -> Callable[[Tensor], Tensor]:
    """What ``W_0 + D P`` makes of an input, where ``module`` holds ``D``.

    Of an input without gradient, such as one that was captured, ``P k`` and ``W_0 k`` are computed once. For more
    tokens than the matrix has outputs ``W_0 + D P`` itself is made, once for each step, which takes less than ``P k``
    of each; not in half precision, in which it would lose small changes.
    """
    forward: Callable[[Tensor], Tensor] = module.forward
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    exact = start.dtype in (torch.float32, torch.float64)
    made: dict[int, Tensor] = {}
    products: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def matrix() -> Tensor:
        if torch.is_grad_enabled():  # its graph is gone once a batch was gone back through
            return start + preconditioner.change(weight)
        if weight._version not in made:
            made.clear()
            made[weight._version] = start + preconditioner.change(weight)
        return made[weight._version]

    def both(inputs: Tensor) -> tuple[Tensor, Tensor]:
        return preconditioner.before(inputs), preconditioner.product(inputs, start)

    def with_start(inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not inputs.requires_grad and inputs not in products:
            products[inputs] = both(inputs)
        if inputs in products:
            known: tuple[Tensor, Tensor] = products[inputs]
            return forward(known[0]) + known[1]
        if not exact or inputs.numel() <= start.numel():
            shaped, base = both(inputs)
            return forward(shaped) + base
        output = preconditioner.product(inputs, matrix())
        return output if bias is None else output + bias

    return with_start
