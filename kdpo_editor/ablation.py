"""The paper's DPO ablation: the rejected answer is what the model says by itself, scored after its own prefix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .engine.activation_cache import ActivationCache
from .engine.batches import Batch, make_batches
from .engine.cached_forward import CachedForward
from .engine.generation import greedy
from .engine.optimizers import Stepper
from .engine.steps import run_cycle
from .engine.traces import EditTrace, cycles_of
from .engine.weights import restore
from .hparams import KDPOHyperParams
from .objectives import answer_logps, dpo_loss
from .requests.tokens import EditTokens


def dpo(
    forward: CachedForward, weights: Mapping[str, nn.Parameter], edit: EditTokens, hparams: KDPOHyperParams
) -> EditTrace:
    """Optimise ``weights`` as :func:`kdpo_editor.kdpo.kdpo` does, but against a free answer, generated every cycle.

    The edit is over as soon as the new answer wins under teacher forcing, there too. Arguments and errors are the same.
    """
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    ((batch,),) = make_batches(forward, [edit], hparams)
    adam = Stepper(weights.values(), hparams)
    trace = EditTrace()
    for cycle in range(hparams.cycles):
        if cycle > 0:
            batch.refresh()
        if not batch.losing.any():
            break
        pair = FreeAnswerPair(forward, batch, edit.prompt, weights, start)
        run_cycle([[pair]], adam, hparams)
        trace.cycles += cycles_of(pair.rejected.tolist(), pair.history, hparams.stop_loss)
    else:
        batch.refresh()
    trace.converged = not batch.losing.any()
    return trace


class FreeAnswerPair:
    """One cycle's work on one edit: its new answer, and what the model says by itself.

    Args:
        forward: of the model.
        batch: the edit, alone.
        prompt: ``[P]`` int64.
        weights: the edited matrices. ``start``: their values before the first step, which make the reference.
    """

    def __init__(
        self,
        forward: CachedForward,
        batch: Batch,
        prompt: Tensor,
        weights: Mapping[str, nn.Parameter],
        start: Mapping[str, Tensor],
    ) -> None:
        self.forward, self.batch, self.members = forward, batch, batch.members
        self.history: list[Tensor] = []
        (said,) = greedy(forward.model, None, [prompt.tolist()], batch.chosen.shape[1], ignore_end=True)
        self.rejected = torch.tensor([said.ids], device=forward.device)
        prompt = prompt.to(forward.device)
        sequence = torch.cat([prompt, self.rejected[0, :-1]])
        positions = torch.arange(len(prompt) - 1, len(sequence))
        with torch.no_grad():
            self.context, _ = forward.capture(sequence.unsqueeze(0), positions.unsqueeze(0))
            now = {name: w.detach().clone() for name, w in weights.items()}
            restore(weights, start)
            self.reference_rejected = self._logps(self.context, self.rejected)
            restore(weights, now)
        self.reference_chosen = answer_logps(forward.logits(batch.reference).to(forward.device), batch.chosen)

    def losses(self, hparams: KDPOHyperParams) -> Tensor:
        """The loss, ``[1]``. Both forward passes are always made."""
        chosen = self._logps(self.batch.cache, self.batch.chosen)
        rejected = self._logps(self.context, self.rejected)
        return dpo_loss(chosen, rejected, self.reference_chosen, self.reference_rejected, hparams.beta)

    def _logps(self, context: ActivationCache, answer: Tensor) -> Tensor:
        return answer_logps(self.forward.logits(self.forward.from_cache(context)).to(answer.device), answer)
