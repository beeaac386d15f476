"""KDPO: Knowledge Direct Preference Optimization (Rozner et al., Findings of EMNLP 2024), the algorithm.

One edit, as in the paper's section 3:

    tokens    x, y_w                      the prompt and the new answer
    reference the policy before the first step, kept as its final hidden states
    cycle     y_l = argmax of the policy at each answer position; done if y_l == y_w
      step    loss = -log sigmoid(beta * [(log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))])
              one Adam step on one matrix

Both answers are read from one forward pass over ``x, y_w``. What lies below the edited matrix never changes, so it is
run once and its result kept (:mod:`kdpo_editor.engine.cached_forward`). The reference needs no second model: it is what
that first pass gave.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .engine.batches import PreferenceBatch, make_batches
from .engine.cached_forward import CachedForward
from .engine.optimizers import Stepper
from .engine.steps import run_cycle
from .engine.traces import EditTrace
from .hparams import KDPOHyperParams
from .requests.tokens import EditTokens


def kdpo(
    forward: CachedForward, weights: Mapping[str, nn.Parameter], edit: EditTokens, hparams: KDPOHyperParams
) -> EditTrace:
    """Optimise ``weights`` in place until the model answers the prompt of ``edit`` with its target.

    Args:
        forward: the model, from the first of ``weights`` up.
        weights: ``{parameter name: matrix}``, the only parameters that require gradients. The paper edits one.
        edit: token ids of the prompt ``x`` and the new answer ``y_w``.
        hparams: ``num_steps``, ``cycles``, ``lr``, ``beta`` and ``stop_loss``, the paper's.

    Raises:
        EditDiverged: the loss became NaN or infinite.
    """
    # One pass over x, y_w. It gives the reference, the first rejected answer, and the forward pass of the first step.
    ((batch,),) = make_batches(forward, [edit], hparams)
    adam = Stepper(weights.values(), hparams)
    trace = EditTrace()
    for cycle in range(hparams.cycles):
        if cycle > 0:
            batch.refresh()  # y_l is generated anew
        if not batch.losing.any():  # y_l == y_w
            break
        pair = PreferenceBatch(batch)  # y_w and y_l at each answer position
        run_cycle([[pair]], adam, hparams)  # up to num_steps steps, fewer once the loss is below stop_loss
        trace.cycles += pair.finished(hparams.stop_loss)
    else:
        batch.refresh()
    trace.converged = not batch.losing.any()
    return trace
