"""One edit as the editor makes it, watched: what chosen and rejected answer are worth before every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...derived import complete
from ...editing import edit
from ...engine.weights import find_matrices, restore
from ...errors import HyperParamsError, RequestError
from ...hparams import KDPOHyperParams
from ...objectives import answer_logps
from ...requests import EditTokens, tokenize


@dataclass(frozen=True)
class WatchedCycle:
    """One cycle: its rejected answer ``y_l``, ``T`` tokens as text. Before each of its steps and after the last, the
    summed log-probabilities of ``y_w`` and of ``y_l``, in nats, both after the new answer's own prefix."""

    rejected: list[str]
    chosen_logps: list[float]
    rejected_logps: list[float]

    @property
    def steps(self) -> int:
        """Optimiser steps taken; 0 where the loss was below ``stop_loss`` at once."""
        return len(self.chosen_logps) - 1


@dataclass(frozen=True)
class WatchedEdit:
    """An edit from its first cycle to its end. ``chosen``: ``y_w``, ``T`` tokens as text; ``final``: what the model
    then has at their positions; ``converged``: as in :class:`~kdpo_editor.EditTrace`."""

    prompt: str
    chosen: list[str]
    cycles: list[WatchedCycle]
    final: list[str]
    converged: bool


def watch(model: nn.Module, tok: Any, request: Mapping[str, Any], hparams: KDPOHyperParams) -> WatchedEdit:
    """Make the edit with :func:`kdpo_editor.edit`, look at the model before each step, and undo it.

    Keeps the logits of the answer's positions in main memory until the end, ``T x V`` fp32 numbers a step.

    Raises what :func:`kdpo_editor.edit` raises; :class:`~kdpo_editor.errors.HyperParamsError` where ``objective`` is
    "dpo", whose rejected answers have a context of their own, and where ``mom2_weight`` is above 0, during which the
    matrix holds something else;
    :class:`~kdpo_editor.errors.RequestError` where the request has ``rephrases``, and where the model gives its target
    already.
    """
    if hparams.objective == "dpo":
        raise HyperParamsError("objective: 'dpo' cannot be watched; its negatives are not read from the answer's pass")
    if hparams.mom2_weight:
        raise HyperParamsError(f"mom2_weight: {hparams.mom2_weight} cannot be watched; it must be 0")
    if request.get("rephrases"):
        raise RequestError("'rephrases' cannot be watched; leave them out")
    ((tokens, *_),) = tokenize(tok, [request], append_eos=hparams.append_eos)
    hparams = complete(hparams, model)
    matrices = find_matrices(model, hparams)
    matrix = next(iter(matrices.values()))
    seen: list[Tensor] = []
    required = matrix.requires_grad
    matrix.requires_grad_(True)
    # Its gradient is computed once for each step, while the weights are still those before it.
    handle = matrix.register_hook(lambda gradient: seen.append(_logits(model, tokens)))
    try:
        _, originals, (trace,) = edit(model, tok, [request], hparams)
    finally:
        handle.remove()
        matrix.requires_grad_(required)
    final = _logits(model, tokens)
    restore(matrices, originals)
    if not trace.cycles:
        raise RequestError(
            f"{request['prompt']!r} is answered with {request['target_new']!r} already: no cycle to show"
        )
    # On a GPU the steps that are not to be taken are masked, so every cycle computes all its gradients.
    counts = [sum(loss >= hparams.stop_loss for loss in cycle.losses) for cycle in trace.cycles]
    computed = counts if len(seen) == sum(counts) else [hparams.num_steps] * len(counts)
    seen.append(final)
    cycles, first = [], 0
    for cycle, taken, gradients in zip(trace.cycles, counts, computed, strict=True):
        after = first + gradients
        moments = [*seen[first : first + taken], seen[after]]
        rejected = torch.tensor(cycle.rejected)
        cycles.append(
            WatchedCycle(
                _texts(tok, rejected),
                [float(answer_logps(logits, tokens.chosen)) for logits in moments],
                [float(answer_logps(logits, rejected)) for logits in moments],
            )
        )
        first = after
    chosen, said = _texts(tok, tokens.chosen), _texts(tok, final.argmax(-1))
    return WatchedEdit(str(request["prompt"]), chosen, cycles, said, trace.converged)


@torch.no_grad()
def _logits(model: nn.Module, tokens: EditTokens) -> Tensor:
    """``[T, V]``, fp32, on the CPU: the model's, at the answer's positions."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    output = model(input_ids=tokens.sequence[None].to(device), use_cache=False)
    logits: Tensor = output.logits[0, len(tokens.prompt) - 1 :].float().cpu()
    return logits


def _texts(tok: Any, ids: Tensor) -> list[str]:
    """Each token as text, a space at its beginning shown as ``␣``."""
    shown = []
    for identity, token in zip(ids.tolist(), tok.convert_ids_to_tokens(ids.tolist()), strict=True):
        text = tok.decode([identity])
        if "\N{REPLACEMENT CHARACTER}" in text or not text:
            text = str(token)  # a part of a character, or nothing to see
        space = text.startswith(" ") or str(token).startswith("▁")  # which some tokenizers do not decode alone
        shown.append(("␣" if space else "") + text.replace("\n", "⏎").strip())
    return shown
