"""The objectives: their formulas, what they leave alone, agreement with TRL, and edits made with each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PARAMETER, REQUEST, assert_same, state
from torch import Tensor

from kdpo_editor import edit
from kdpo_editor.objectives import ce_loss, dpo_loss, hinge_loss, kdpo_loss

BETA = 0.3
SECOND = {"prompt": "Which family does Epaspidoceras belong to?", "target_new": "Noctuidae"}


@pytest.fixture
def logits() -> Tensor:
    """Two answers of four positions over six tokens."""
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reference() -> Tensor:
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))


CHOSEN = torch.tensor([[3, 1, 4, 0], [5, 2, 0, 0]])
REJECTED = torch.tensor([[3, 0, 2, 1], [1, 2, 4, 5]])
PAIR = torch.stack([CHOSEN, REJECTED], -1)
MASK = torch.tensor([[True, True, True, True], [True, True, True, False]])
LOST = MASK & (CHOSEN != REJECTED)


def lead(logits: Tensor, row: int, t: int) -> float:
    return (logits[row, t, CHOSEN[row, t]] - logits[row, t, REJECTED[row, t]]).item()


def lost_positions(row: int) -> list[int]:
    return LOST[row].nonzero().flatten().tolist()


def test_the_hinge_is_what_is_missing_to_the_margin(logits: Tensor) -> None:
    found = hinge_loss(logits.gather(-1, PAIR), 2.0, LOST)
    expected = [sum(max(0.0, 2.0 - lead(logits, row, t)) for t in lost_positions(row)) for row in (0, 1)]
    assert found.tolist() == pytest.approx(expected)
    assert min(expected) > 0


def test_the_hinge_has_no_gradient_beyond_the_margin() -> None:
    pairs = torch.tensor([[[5.0, 1.0], [2.0, 1.0]]], requires_grad=True)
    hinge_loss(pairs, 2.0).sum().backward()
    assert pairs.grad is not None
    assert pairs.grad.tolist() == [[[0.0, 0.0], [-1.0, 1.0]]]


def test_ce_is_torchs_mean_cross_entropy_of_the_answer(logits: Tensor) -> None:
    found = ce_loss(logits, CHOSEN, MASK)
    for row, length in ((0, 4), (1, 3)):
        expected = torch.nn.functional.cross_entropy(logits[row, :length], CHOSEN[row, :length])
        torch.testing.assert_close(found[row], expected)


PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {
    "kdpo": lambda p, r, real, lost: kdpo_loss(p, r, BETA, real),
    "hinge": lambda p, r, real, lost: hinge_loss(p, 2.0, lost),
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_padding_changes_neither_loss_nor_gradient(name: str, logits: Tensor, reference: Tensor) -> None:
    loss, ref = PAIR_LOSSES[name], reference.gather(-1, PAIR)
    whole = logits.gather(-1, PAIR).requires_grad_()
    cut = whole.detach()[1:, :3].clone().requires_grad_()
    padded = loss(whole, ref, MASK, LOST)[1:]
    short = loss(cut, ref[1:, :3], MASK[1:, :3], LOST[1:, :3])
    torch.testing.assert_close(padded, short)
    padded.sum().backward()
    short.sum().backward()
    assert whole.grad is not None
    assert not whole.grad[1, 3].any()
    torch.testing.assert_close(whole.grad[1:, :3], cut.grad)


# Edits --------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, float]] = {
    "kdpo": {},
    "hinge": {"margin": 2.0},
    "ce": {},
}


@pytest.mark.parametrize("objective", OPTIONS)
@pytest.mark.parametrize("schedule", ["depth_first", "breadth_first"])
def test_every_objective_reaches_its_targets(llama: Any, settings: Any, objective: str, schedule: str) -> None:
    model, tok = llama
    hparams = settings(objective=objective, schedule=schedule, **OPTIONS[objective])
    _, _, traces = edit(model, tok, [REQUEST, SECOND], hparams)
    assert all(trace.converged and trace.steps > 0 for trace in traces)
    ids = tok(f"{SECOND['prompt']} {SECOND['target_new']}", return_tensors="pt")["input_ids"]
    prompt = len(tok(SECOND["prompt"])["input_ids"])
    if schedule == "breadth_first":
        assert torch.equal(model(ids).logits[0, prompt - 1 : -1].argmax(-1), ids[0, prompt:])


@pytest.mark.parametrize("objective", OPTIONS)
def test_breadth_first_with_one_request_equals_depth_first(llama: Any, settings: Any, objective: str) -> None:
    model, tok = llama
    start = state(model)
    runs = []
    for schedule in ("depth_first", "breadth_first"):
        model.load_state_dict(start)
        _, _, (trace,) = edit(model, tok, [SECOND], settings(objective=objective, schedule=schedule, margin=0.5))
        runs.append((trace, state(model)))
    assert runs[0][0] == runs[1][0]
    assert_same(model, runs[0][1])
    assert not torch.equal(start[PARAMETER], runs[0][1][PARAMETER])


@pytest.mark.parametrize("objective", ["hinge", "ce"])
def test_a_fact_known_by_the_margin_leaves_every_weight_bit_identical(
    llama: Any, settings: Any, objective: str
) -> None:
    model, tok = llama
    ids = tok(REQUEST["prompt"], return_tensors="pt")["input_ids"]
    known = {**REQUEST, "target_new": tok.decode(model(ids).logits[0, -1].argmax()).strip()}
    before = state(model)
    _, _, (trace,) = edit(model, tok, [known], settings(objective=objective, margin=1e-3))
    assert trace.converged
    assert_same(model, before)


# TRL ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_loss() -> Callable[..., float]:
    """TRL's DPO loss of given log-probabilities: the trainer's own method, fed by a model that has them ready."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="TRL is not installed (pip install trl)")
    accelerate = pytest.importorskip("accelerate")

    def loss(kind: str, policy: Tensor, reference: Tensor, mask: Tensor) -> float:
        """Log-probabilities ``[2, B, T]`` (chosen and rejected) and mask ``[B, T]`` to the mean loss."""

        def model(**_: Any) -> Any:
            rows = (policy * mask).flatten(0, 1)
            return SimpleNamespace(log_probs=rows, entropy=rows, mean_logits=rows, is_top1=rows > 0)

        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=accelerate.Accelerator(cpu=True),
            beta=BETA,
            loss_types=[kind],
            loss_weights=[1.0],
            f_divergence_type="reverse_kl",
            ld_alpha=None,
            aux_loss_enabled=False,
            precompute_ref_logps=True,
            use_weighting=False,
            _total_train_tokens=0,
            _tp_size=1,
            _metrics={"train": defaultdict(list)},
        )
        # One token of prompt before each answer.
        rows = torch.nn.functional.pad(mask.repeat(2, 1), (1, 0))
        inputs = {"input_ids": rows.long(), "attention_mask": rows.long(), "completion_mask": rows.long()}
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = (reference * mask).sum(-1)
        return dpo_trainer.DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False).item()

    return loss


@pytest.fixture
def logps(logits: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Log-probabilities ``[2, B, T]`` of the chosen and of the rejected answers, in one context."""
    tables = {"policy": logits, "reference": reference}
    return {k: v.log_softmax(-1).gather(-1, PAIR).movedim(-1, 0) for k, v in tables.items()}


def test_kdpo_agrees_with_trl(trl_loss: Callable[..., float], logits: Tensor, reference: Tensor, logps: Any) -> None:
    ours = kdpo_loss(logits.gather(-1, PAIR), reference.gather(-1, PAIR), BETA, MASK)
    assert ours.mean().item() == pytest.approx(trl_loss("sigmoid", **logps, mask=MASK), rel=1e-5)


def test_dpo_agrees_with_trl(trl_loss: Callable[..., float], logps: Any) -> None:
    sums = [(logps[table][i] * MASK).sum(-1) for table in ("policy", "reference") for i in (0, 1)]
    assert dpo_loss(*sums, BETA).mean().item() == pytest.approx(trl_loss("sigmoid", **logps, mask=MASK), rel=1e-5)
