"""Preference objectives: pure functions of logits or log-probabilities.

Shapes: ``T`` answer positions, ``V`` vocabulary entries, ``...`` any leading batch dimensions. Logits and
log-probabilities are fp32 (nats); token ids are int64.
"""

from __future__ import annotations

from math import inf

import torch.nn.functional as F
from torch import Tensor


def hardest_rejected(logits: Tensor, chosen: Tensor, margin: float = 0.0) -> tuple[Tensor, Tensor]:
    """Find, at each position, the token that keeps the new answer from winning, and the margin by which that leads.

    The first is the rejected answer ``y_l``: the argmax (paper, section 3.2). With ``margin`` m it is the argmax after
    ``m`` is taken from the chosen token's logit. Where it equals ``chosen`` the position is won.

    Args:
        logits: ``[..., T, V]``, in no graph. Entries are written to, and put back, so that no copy is needed.
        chosen: ``[..., T]``.
        margin: logits, 0 or more.

    Returns:
        Token ids ``[..., T]``, and margins ``[..., T]`` in logits: the chosen token's less the strongest other one's.
    """
    here = chosen.unsqueeze(-1)
    own = logits.gather(-1, here)
    logits.scatter_(-1, here, -inf)
    best, strongest = logits.max(-1)
    logits.scatter_(-1, here, own)
    own = own.squeeze(-1)
    less = own - margin
    wins = (less > best) | ((less == best) & (chosen < strongest))  # of equals, argmax takes the first
    return strongest.where(~wins, chosen), own - best


def answer_logps(logits: Tensor, answer: Tensor) -> Tensor:
    """``log pi(y | c)``, summed over the answer: logits ``[..., T, V]`` and ids ``[..., T]`` to ``[...]``."""
    return logits.log_softmax(-1).gather(-1, answer.unsqueeze(-1)).squeeze(-1).sum(-1)


def kdpo_loss(pairs: Tensor, reference: Tensor, beta: float, mask: Tensor | None = None) -> Tensor:
    """KDPO's loss (paper, eq. 4), where both answers are read from one forward pass.

    ``-log sigmoid(beta * sum_t [(z_w - z_l) - (z_ref_w - z_ref_l)])``

    Both answers share their context, so the softmax's normaliser is the same for both and cancels: logits serve
    as well as log-probabilities, and only two of them per position are needed. Positions where chosen and
    rejected token are the same contribute exactly nothing.

    Args:
        pairs: ``[..., T, 2]``, the policy's logits of the chosen and of the rejected token.
        reference: ``[..., T, 2]``, the same of the reference, without gradient.
        beta: strength of the pull towards the reference.
        mask: ``[..., T]`` bool, false where an answer is padded.

    Returns:
        ``[...]``, the loss of each answer pair.
    """
    chosen, rejected = pairs.unbind(-1)
    ref_chosen, ref_rejected = reference.unbind(-1)
    gain = (chosen - rejected) - (ref_chosen - ref_rejected)
    return F.softplus(-beta * _masked(gain, mask).sum(-1))


def hinge_loss(pairs: Tensor, margin: float, mask: Tensor | None = None) -> Tensor:
    """A hinge on the lead of the new answer, without a reference: ``sum_t relu(margin - (z_w - z_l))``.

    The multi-class hinge of Crammer and Singer (2001) at each position. With ``z_l`` from :func:`hardest_rejected` at
    the same margin, nothing more is asked of a position once it is won by ``margin`` logits.

    Args:
        pairs: ``[..., T, 2]``, logits of the chosen and of the rejected token.
        margin: logits, more than 0.
        mask: ``[..., T]`` bool, true where chosen and rejected token differ.

    Returns:
        ``[...]``.
    """
    return _masked(F.relu(margin - (pairs[..., 0] - pairs[..., 1])), mask).sum(-1)


def ce_loss(logits: Tensor, chosen: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of the new answer, ``-1/T * sum_t log pi(y_w[t])``: what plain fine-tuning (FT-M) minimises.

    Args:
        logits: ``[..., T, V]``.
        chosen: ``[..., T]`` token ids.
        mask: ``[..., T]`` bool, false where an answer is padded.

    Returns:
        ``[...]``.
    """
    logps = _masked(logits.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1), mask)
    return -logps.sum(-1) / (logps.shape[-1] if mask is None else mask.sum(-1))


def dpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor, beta: float
) -> Tensor:
    """DPO's loss (Rafailov et al. 2023, eq. 7), each answer scored after its own prefix.

    ``-log sigmoid(beta * [(log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l))])``

    All four are summed log-probabilities of shape ``[...]``; so is the result.
    """
    return F.softplus(-beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)))


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values.masked_fill(~mask, 0.0)
