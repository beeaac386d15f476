"""KDPO: Knowledge Direct Preference Optimization (Rozner et al., Findings of EMNLP 2024), the algorithm.

One edit, as in the paper's section 3:

    tokens    x, y_w                      the prompt and the new answer
    reference the policy before the first step, kept as logits
    cycle     y_l = argmax of the policy at each answer position; done if y_l == y_w
      step    loss = -log sigmoid(beta * [(log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))])
              one Adam step on one matrix
"""

from __future__ import annotations

import copy as copying
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import EditDiverged, ModelError
from .hparams import KDPOHyperParams
from .objectives import answer_logps, competitors, dpo_loss, kdpo_loss
from .requests import EditTokens, tokenize
from .suffix import Suffix, greedy
from .weights import blocks_name, find_matrices, only_training, restore

LOG = logging.getLogger(__name__)


@dataclass
class Cycle:
    """One cycle of an edit: its negative answer (token ids, ``[T]``) and the loss of each step, in nats."""

    negative: list[int]
    losses: list[float] = field(default_factory=list)


@dataclass
class EditTrace:
    """What happened during one edit.

    ``cycles``: those that began with an unfinished edit. ``steps``: optimiser steps taken. ``converged``:
    whether every answer position ended up as the argmax (by ``margin``, if one is set).
    """

    cycles: list[Cycle] = field(default_factory=list)
    steps: int = 0
    converged: bool = False


def apply_kdpo_to_model(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: KDPOHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Edit ``model`` so that it answers each request's prompt with its target; EasyEdit's method interface.

    Args:
        model: a decoder-only ``transformers`` model, edited in place unless ``copy``.
        tok: its tokenizer; neither its padding side nor anything else of it is changed.
        requests: ``[{"prompt": str, "target_new": str}, ...]``, edited in this order; other keys are ignored.
        hparams: settings.
        copy: edit and return a deep copy instead.
        return_orig_weights: also return the edited matrices as they were.
        keep_original_weight, kwargs: accepted for EasyEdit's sake, without effect.

    Returns:
        The edited model, and ``{parameter name: original tensor}``, empty unless ``return_orig_weights``.

    Raises:
        RequestError, ModelError: something cannot be edited; found before anything is changed.
        EditDiverged: a loss or weight became NaN or infinite. Whatever is raised during an edit, the model
            is left as it was before the call.
    """
    model, originals, _ = edit(model, tok, requests, hparams, copy=copy)
    return model, originals if return_orig_weights else {}


def edit(
    model: nn.Module, tok: Any, requests: Sequence[Mapping[str, Any]], hparams: KDPOHyperParams, copy: bool = False
) -> tuple[nn.Module, dict[str, Tensor], list[EditTrace]]:
    """As :func:`apply_kdpo_to_model`, but always with the original weights, and with a trace of each edit."""
    edits = tokenize(tok, requests, append_eos=hparams.append_eos)
    weights = find_matrices(model, hparams)
    _check_lengths(model, edits)
    if copy:
        model = copying.deepcopy(model)
        weights = find_matrices(model, hparams)
    originals = {name: w.detach().clone() for name, w in weights.items()}
    suffix = Suffix(model, blocks_name(hparams), min(hparams.layers))
    with only_training(model, weights, originals):
        traces = [edit_fact(suffix, weights, tokens, hparams) for tokens in edits]
    missed = sum(not trace.converged for trace in traces)
    if missed:
        LOG.info("%d of %d edits did not reach their target within %d cycles", missed, len(traces), hparams.cycles)
    return model, originals, traces


def edit_fact(
    suffix: Suffix, weights: dict[str, nn.Parameter], tokens: EditTokens, hparams: KDPOHyperParams
) -> EditTrace:
    """Optimise ``weights`` in place until the model answers ``tokens.prompt`` with ``tokens.chosen``."""
    start = {name: w.detach().clone() for name, w in weights.items()}
    adam = Adam(list(weights.values()), hparams)
    chosen = tokens.chosen.to(suffix.device)
    positions = torch.arange(len(tokens.prompt) - 1, len(tokens.sequence))
    context, logits = suffix.capture(tokens.sequence.unsqueeze(0), positions)
    logits = logits[0].to(suffix.device)
    reference = logits.detach()
    trace = EditTrace()

    for number in range(hparams.cycles):
        if number > 0:
            logits = suffix.replay(context)[0].to(suffix.device)
        negative = competitors(logits.detach(), chosen, hparams.margin)
        if torch.equal(negative, chosen):
            break
        if hparams.objective == "dpo":
            rejected = OwnAnswer(suffix, weights, start, tokens.prompt.to(suffix.device), len(chosen))
            negative = rejected.ids
        cycle = Cycle(negative.tolist())
        trace.cycles.append(cycle)
        for step in range(hparams.num_steps):
            if step > 0:
                logits = suffix.replay(context)[0].to(suffix.device)
            if hparams.objective == "dpo":
                loss = dpo_loss(
                    answer_logps(logits, chosen),
                    rejected.logps(),
                    answer_logps(reference, chosen),
                    rejected.reference_logps,
                    hparams.beta,
                )
            else:
                loss = kdpo_loss(logits, reference, chosen, negative, hparams.beta)
            cycle.losses.append(loss.item())
            if not cycle.losses[-1] < float("inf"):
                raise EditDiverged(f"the loss became {cycle.losses[-1]} in cycle {number}, step {step}")
            if cycle.losses[-1] < hparams.stop_loss:
                break
            adam.step(loss)
            if hparams.norm_constraint is not None:
                _stay_near(weights, start, hparams.norm_constraint)
            trace.steps += 1

    with torch.no_grad():
        if hparams.update_scale != 1.0:
            for name, w in weights.items():
                w.copy_(start[name] + hparams.update_scale * (w - start[name]))
        if not all(torch.isfinite(w).all() for w in weights.values()):
            raise EditDiverged("the edited weights became NaN or infinite")
        final = suffix.replay(context)[0].to(suffix.device)
        trace.converged = torch.equal(competitors(final, chosen, hparams.margin), chosen)
    return trace


class Adam:
    """Adam on matrices of any floating dtype; half-precision ones are stepped through fp32 copies."""

    def __init__(self, weights: list[nn.Parameter], hparams: KDPOHyperParams) -> None:
        self.weights = weights
        half = [w.dtype in (torch.float16, torch.bfloat16) for w in weights]
        self.masters = [w.detach().float() if h else w for w, h in zip(weights, half, strict=True)]
        self.optimizer = torch.optim.Adam(self.masters, lr=hparams.lr, weight_decay=hparams.weight_decay, fused=True)

    def step(self, loss: Tensor) -> None:
        """Backpropagate ``loss`` and take one step; gradients are gone afterwards."""
        gradients = torch.autograd.grad(loss, self.weights)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.to(master.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                if weight is not master:
                    weight.copy_(master)


class OwnAnswer:
    """The ablation's negative (``objective: dpo``): what the model answers by itself, scored after its own prefix."""

    def __init__(
        self,
        suffix: Suffix,
        weights: dict[str, nn.Parameter],
        start: dict[str, Tensor],
        prompt: Tensor,
        length: int,
    ) -> None:
        self.suffix = suffix
        self.ids = greedy(suffix.model, prompt, length)
        sequence = torch.cat([prompt, self.ids[:-1]])
        positions = torch.arange(len(prompt) - 1, len(sequence))
        with torch.no_grad():
            self.context, _ = suffix.capture(sequence.unsqueeze(0), positions)
            now = {name: w.detach().clone() for name, w in weights.items()}
            restore(weights, start)
            self.reference_logps = self.logps()
            restore(weights, now)

    def logps(self) -> Tensor:
        """``log pi(y_l | x)`` under the weights as they are now, summed; a scalar, fp32."""
        return answer_logps(self.suffix.replay(self.context)[0].to(self.ids.device), self.ids)


@torch.no_grad()
def _stay_near(weights: dict[str, nn.Parameter], start: dict[str, Tensor], most: float) -> None:
    for name, w in weights.items():
        w.clamp_(start[name] - most, start[name] + most)


def _check_lengths(model: nn.Module, edits: list[EditTokens]) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    for i, tokens in enumerate(edits):
        if most is not None and len(tokens.sequence) > most:
            raise ModelError(
                f"request {i} has {len(tokens.sequence)} tokens with its target; the model takes {most} at most"
            )
