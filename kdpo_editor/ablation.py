"""The paper's DPO ablation: the negative is what the model answers by itself, scored after its own prefix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .engine.batches import Batch
from .engine.cached_forward import Captured, Suffix
from .engine.weights import restore
from .hparams import KDPOHyperParams
from .models import cache_name
from .objectives import answer_logps, dpo_loss


class OwnAnswerRound:
    """One cycle's work on one edit under ``objective: dpo``; stands where
    :class:`~kdpo_editor.engine.batches.Round` does.

    Args:
        suffix: of the model.
        batch: the edit, alone.
        prompt: ``[P]`` int64.
        weights: the edited matrices; ``start``: their values before the first step.
    """

    def __init__(
        self, suffix: Suffix, batch: Batch, prompt: Tensor, weights: dict[str, nn.Parameter], start: dict[str, Tensor]
    ) -> None:
        self.suffix, self.batch, self.members = suffix, batch, batch.members
        self.history: list[Tensor] = []
        prompt = prompt.to(suffix.device)
        self.rejected = greedy(suffix.model, prompt, batch.chosen.shape[1]).unsqueeze(0)
        sequence = torch.cat([prompt, self.rejected[0, :-1]])
        positions = torch.arange(len(prompt) - 1, len(sequence))
        with torch.no_grad():
            self.context, _ = suffix.capture(sequence.unsqueeze(0), positions.unsqueeze(0))
            now = {name: w.detach().clone() for name, w in weights.items()}
            restore(weights, start)
            self.reference_rejected = self._logps(self.context, self.rejected)
            restore(weights, now)
        self.reference_chosen = answer_logps(suffix.logits(batch.reference).to(suffix.device), batch.chosen)

    @property
    def negatives(self) -> list[list[int]]:
        """The rejected answer."""
        return [self.rejected[0].tolist()]

    def losses(self, hparams: KDPOHyperParams, use_first: bool) -> Tensor:
        """The loss, ``[1]``; both forward passes are always made."""
        chosen = self._logps(self.batch.captured, self.batch.chosen)
        rejected = self._logps(self.context, self.rejected)
        return dpo_loss(chosen, rejected, self.reference_chosen, self.reference_rejected, hparams.beta)

    def _logps(self, context: Captured, answer: Tensor) -> Tensor:
        return answer_logps(self.suffix.logits(self.suffix.replay(context)).to(answer.device), answer)


@torch.no_grad()
def greedy(model: nn.Module, prompt: Tensor, length: int) -> Tensor:
    """The ``length`` most likely next tokens, one after another, without sampling or stopping.

    Args:
        prompt: ``[P]`` int64, on the model's device.

    Returns:
        ``[length]`` int64, on the same device.
    """
    name = cache_name(model)
    step, cache, answer = prompt.unsqueeze(0), None, []
    for _ in range(length):
        output = model(input_ids=step, use_cache=True, return_dict=True, **{name: cache})
        step, cache = output.logits[:, -1:].argmax(-1), getattr(output, name)
        answer.append(step[0])
    return torch.cat(answer)
