"""Preference objectives: pure functions of logits or log-probabilities.

Shapes: ``T`` answer positions, ``V`` vocabulary entries, ``...`` any leading batch dimensions. Logits and
log-probabilities are fp32 (nats); token ids are int64.
"""

from __future__ import annotations

from math import inf

import torch.nn.functional as F
from torch import Tensor


def standing(logits: Tensor, chosen: Tensor, margin: float = 0.0) -> tuple[Tensor, Tensor]:
    """How the new answer stands at each position: the token that keeps it from winning, and by how much it leads.

    The first is the negative answer ``y_l``: the argmax (paper, section 3.2), or, with ``margin`` m, the argmax after
    ``m`` is taken from the chosen token's logit. Where it equals ``chosen`` the position is won.

    Args:
        logits: ``[..., T, V]``, in no graph: entries are written to, and put back, so that no copy is needed.
        chosen: ``[..., T]``.
        margin: logits, 0 or more.

    Returns:
        Token ids ``[..., T]``, and logits ``[..., T]``, the chosen token's less the strongest other one's.
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


def competitors(logits: Tensor, chosen: Tensor, margin: float = 0.0) -> Tensor:
    """The negative answer alone, ``[..., T]``: what :func:`standing` gives first, of logits that are only read.

    Arguments as there: logits ``[..., T, V]``, ids ``[..., T]``.
    """
    return standing(logits.detach().clone(), chosen, margin)[0]


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
    return F.softplus(-beta * _masked(_gain(pairs, reference), mask).sum(-1))


def kdpo_token_loss(pairs: Tensor, reference: Tensor, beta: float, mask: Tensor | None = None) -> Tensor:
    """KDPO with one sigmoid per position, so that a position far ahead does not hide one that is behind.

    ``sum_t -log sigmoid(beta * [(z_w - z_l) - (z_ref_w - z_ref_l)])``

    Over positions where chosen and rejected token differ; ``mask`` is true there. Arguments and result as
    :func:`kdpo_loss`, ``[..., T, 2]`` to ``[...]``. This project's own; with one differing position it is the same.
    """
    return _masked(F.softplus(-beta * _gain(pairs, reference)), mask).sum(-1)


def margin_loss(pairs: Tensor, margin: float, mask: Tensor | None = None) -> Tensor:
    """A hinge on the lead of the new answer, without a reference: ``sum_t relu(margin - (z_w - z_l))``.

    The multi-class hinge of Crammer and Singer (2001) at each position: with ``z_l`` from :func:`competitors` at the
    same margin, nothing more is asked of a position once it is won by ``margin`` logits.

    Args:
        pairs: ``[..., T, 2]``, logits of the chosen and of the rejected token.
        margin: logits, more than 0.
        mask: ``[..., T]`` bool, true where chosen and rejected token differ.

    Returns:
        ``[...]``.
    """
    return _masked(F.relu(margin - (pairs[..., 0] - pairs[..., 1])), mask).sum(-1)


def ipo_loss(pairs: Tensor, reference: Tensor, beta: float, mask: Tensor | None = None) -> Tensor:
    """IPO's loss (Azar et al. 2024, eq. 17, whose tau is ``beta``) on a shared context.

    ``(h - 1 / (2 beta))^2`` with ``h = 1/T * sum_t [(z_w - z_l) - (z_ref_w - z_ref_l)]``

    It asks for a gain of ``1 / (2 beta)`` and no more: a new answer that starts further behind never gets ahead.
    The mean over the answer's ``T`` tokens stands where the paper writes the log-probability of the whole answer; its
    authors confirmed that their results were computed so, and TRL does the same. Arguments and result as
    :func:`kdpo_loss`, ``[..., T, 2]`` to ``[...]``; ``T`` counts every position that is not padded.
    """
    gain = _masked(_gain(pairs, reference), mask)
    length = gain.shape[-1] if mask is None else mask.sum(-1)
    return (gain.sum(-1) / length - 1 / (2 * beta)).square()


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


def _gain(pairs: Tensor, reference: Tensor) -> Tensor:
    """How much more the chosen token leads than it did in the reference: ``[..., T, 2]`` twice to ``[..., T]``."""
    chosen, rejected = pairs.unbind(-1)
    ref_chosen, ref_rejected = reference.unbind(-1)
    return (chosen - rejected) - (ref_chosen - ref_rejected)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values.masked_fill(~mask, 0.0)
