"""Preference objectives: pure functions of logits or log-probabilities.

Shapes: ``T`` answer positions, ``V`` vocabulary entries, ``...`` any leading batch dimensions. Logits and
log-probabilities are fp32 (nats); token ids are int64.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def competitors(logits: Tensor, chosen: Tensor, margin: float = 0.0) -> Tensor:
    """The negative answer ``y_l``: at each position the token that keeps the new answer from winning.

    That is the argmax (paper, section 3.2), or, with ``margin`` m, the argmax after ``m`` is taken from the
    chosen token's logit. Where it equals ``chosen`` the position is won.

    Args:
        logits: ``[..., T, V]``; read, not written.
        chosen: ``[..., T]``.
        margin: logits, 0 or more.

    Returns:
        ``[..., T]`` token ids.
    """
    if margin:
        chosen_logits = logits.gather(-1, chosen.unsqueeze(-1))
        logits = logits.scatter(-1, chosen.unsqueeze(-1), chosen_logits - margin)
    return logits.argmax(-1)


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
    gain = (pairs[..., 0] - pairs[..., 1]) - (reference[..., 0] - reference[..., 1])
    if mask is not None:
        gain = gain.masked_fill(~mask, 0.0)
    return F.softplus(-beta * gain.sum(-1))


def dpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor, beta: float
) -> Tensor:
    """DPO's loss (Rafailov et al. 2023, eq. 7), each answer scored after its own prefix.

    ``-log sigmoid(beta * [(log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l))])``

    All four are summed log-probabilities of shape ``[...]``; so is the result.
    """
    return F.softplus(-beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)))
