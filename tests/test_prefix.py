"""Steps from the first trained token on, with keys and values for what is before, give what the whole row gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import plain_kdpo_l
from test_cached_forward import ARCHITECTURES, IDS, POSITIONS, change, forward_of, full, padded, parameter_at, tiny
from torch import nn

from kdpo_editor import edit
from kdpo_editor.engine.batches import Batch, footprint
from kdpo_editor.engine.cached_forward import CachedForward
from kdpo_editor.engine.prefix import prefix_bytes
from kdpo_editor.requests.tokens import EditTokens
from kdpo_editor.testbed import load_model, load_records

# Convolutions and states have more of a token than keys and values; GPT-Neo takes its queries for a row's last tokens.
WHOLE = {"gpt_neo", "lfm2", "falcon_h1", "granite_hybrid", "mamba", "mamba2"}
BEGIN = torch.tensor([3, 1, 4])
# A stack of experts' matrices is no module whose output could be put in place by hand.
STACKED = {name for name, (_, _, matrix, _, _) in ARCHITECTURES.items() if ".experts." in matrix}
TRAINED = (torch.arange(12) >= BEGIN[:, None]) & (torch.arange(12) < BEGIN[:, None] + 2)


def trained_forward(name: str, layers: tuple[int, ...] = (1, 2)) -> tuple[Any, CachedForward, list[nn.Parameter]]:
    model, blocks, matrix = tiny(name)
    found = [parameter_at(model, f"{blocks}.{layer}.{matrix}") for layer in layers]
    modules, weights = [module for module, _, _ in found], [weight for _, _, weight in found]
    for p in model.parameters():
        p.requires_grad_(any(p is weight for weight in weights))
    return model, CachedForward(model, blocks, layers[0], modules[0], modules, "subject"), weights


def kept_before(model: Any, forward: CachedForward, starts: list[torch.Tensor]) -> list[Any]:
    """Hooks by which the full model does with its matrices what they did at first, before each row's trained tokens,
    and passes no gradient but through the trained ones."""
    before = torch.arange(12) < BEGIN[:, None]

    def hook(start: torch.Tensor) -> Any:
        def kept(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                weight, bias = start, getattr(module, "bias", None)
                old = args[0] @ (weight.T if isinstance(module, nn.Linear) else weight)
                old = old if bias is None else old + bias
            shape = (*output.shape[:-1], 1)
            output = torch.where(TRAINED.view(shape), output, output.detach())
            return torch.where(before.view(shape), old, output)

        return kept

    return [m.register_forward_hook(hook(s)) for m, s in zip(forward.edited, starts, strict=True)]


@pytest.mark.parametrize("narrow", [0, 10**9], ids=["narrow", "whole"])
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - WHOLE - STACKED))
def test_what_is_before_the_trained_tokens_stays(name: str, narrow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients are those of the full model in which the matrices do there what they did before."""
    monkeypatch.setattr("kdpo_editor.engine.upper_part.WORTH", narrow)
    model, forward, weights = trained_forward(name)
    starts = [w.detach().clone() for w in weights]
    ids, mask = padded()
    _, frozen, first = forward.capture_frozen(ids, POSITIONS.maximum(BEGIN[:, None]), TRAINED)
    assert frozen is not None
    assert frozen.hidden.shape[1] < ids.shape[1]
    positions = POSITIONS.maximum(BEGIN[:, None])

    def wanted() -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        return logits.gather(1, positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))

    torch.testing.assert_close(forward.logits(first), wanted(), atol=1e-5, rtol=0)
    for weight in weights:
        change(weight)
    handles = kept_before(model, forward, starts)
    expected = wanted()
    gradients = torch.autograd.grad(expected.square().mean(), weights)
    for handle in handles:
        handle.remove()
    assert (wanted() - expected).norm() > 1e-3 * expected.norm()  # otherwise it would be the same anyway
    for cache, rows in ((frozen, [0, 1, 2]), (frozen.rows(torch.tensor([2, 0])), [2, 0])):
        found = forward.logits(forward.from_cache(cache))
        torch.testing.assert_close(found, expected[rows], atol=1e-5, rtol=0)
    whole = forward.logits(forward.from_cache(frozen)).square().mean()
    for gradient, exact in zip(torch.autograd.grad(whole, weights), gradients, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - WHOLE))
@torch.no_grad()
def test_frozen_anew_it_is_exact_again(name: str) -> None:
    model, forward, weights = trained_forward(name)
    ids, mask = padded()
    cache, _, _ = forward.capture_frozen(ids, POSITIONS, TRAINED)
    for weight in weights:
        change(weight)
    again = forward.freeze(cache)
    assert again is not None
    expected = full(model, ids, mask)
    read = BEGIN[:, None] <= POSITIONS
    for hidden in (again[1], forward.from_cache(again[0])):
        torch.testing.assert_close(forward.logits(hidden)[read], expected[read], atol=1e-5, rtol=0)


@pytest.mark.parametrize("begin", [2, 6])
def test_keys_and_values_are_kept_of_no_more_than_what_is_before(begin: int) -> None:
    model, forward, _ = trained_forward("llama")
    trained = torch.arange(12)[None] == begin
    _, frozen, _ = forward.capture_frozen(IDS[:1], POSITIONS[:1], trained)
    assert frozen is not None
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    a_token = 2 * len(frozen.arguments) * config.num_key_value_heads * head * 4  # bytes, of keys and of values
    assert prefix_bytes(frozen) == begin * a_token


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_where_keys_and_values_are_not_all_whole_rows_are_run(name: str) -> None:
    _, forward, _ = trained_forward(name, (1,))
    cache, frozen, _ = forward.capture_frozen(IDS, POSITIONS, TRAINED)
    assert frozen is None
    assert cache.hidden.shape[:2] == IDS.shape
    assert footprint(forward, [EditTokens(IDS[0, :10], IDS[0, 10:], (3, 5))]).frozen is False


def test_what_was_measured_of_an_edit_with_nothing_before_it_is_not_taken_for_others() -> None:
    _, forward, _ = trained_forward("llama")
    assert not footprint(forward, [EditTokens(IDS[0, :2], IDS[0, 2:4], (0, 1))]).frozen
    assert footprint(forward, [EditTokens(IDS[0, :10], IDS[0, 10:], (3, 5))]).frozen


def test_all_tokens_trained_are_all_run() -> None:
    _, forward, _ = forward_of("llama", 1)
    assert forward.capture_frozen(IDS, POSITIONS, None)[1] is None


LIFELONG = {"objective": "hinge", "margin": 2.0, "optimizer": "polyak", "lr": 1.2, "cycles": 60, "layers": [0, 1]}


def test_an_edit_counts_as_won_by_the_whole_rows(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values from before the edit are renewed until it holds by the margin without them."""
    model, tok = load_model()
    renewed: list[float] = []
    renew = Batch.renew

    def noted(batch: Batch) -> None:
        batch.refresh()
        stale = batch.margins.min().item()
        renew(batch)
        renewed.append(abs(stale - batch.margins.min().item()))

    monkeypatch.setattr(Batch, "renew", noted)
    requests = [{key: r[key] for key in ("prompt", "target_new", "subject")} for r in load_records()[:3]]
    _, _, traces = edit(model, tok, requests, settings(**LIFELONG, fact_token="subject_last", schedule="breadth_first"))
    assert all(trace.converged for trace in traces)
    assert max(renewed) > 1e-3, "what is before the subject never changed"
    for request in requests:
        prompt = tok(request["prompt"], return_tensors="pt").input_ids
        answer = tok(f"{request['prompt']} {request['target_new']}", return_tensors="pt").input_ids[
            0, prompt.shape[1] :
        ]
        with torch.no_grad():
            logits = model(torch.cat([prompt, answer[None, :-1]], 1)).logits[0, prompt.shape[1] - 1 :]
        won = logits.gather(-1, answer[:, None])[:, 0]
        best = logits.scatter(-1, answer[:, None], -torch.inf).amax(-1)
        assert (won - best).min() > 2.0 - 1e-4


def test_an_edit_that_wins_by_less_than_the_loss_that_ends_a_cycle_is_trained_on(settings: Any) -> None:
    """What is short of the margin by a hair would be looked at in every cycle and trained in none."""
    model, tok = load_model()
    requests = [{key: r[key] for key in ("prompt", "target_new", "subject")} for r in load_records()[:1]]
    hparams = settings(**{**LIFELONG, "lr": 1.0}, stop_loss=1e-2, fact_token="subject_last", schedule="breadth_first")
    _, _, (trace,) = edit(model, tok, requests, hparams)
    assert trace.converged
    assert all(cycle.steps for cycle in trace.cycles)


@pytest.mark.parametrize("fact_token", ["all", "subject_last"])
def test_kdpo_l_does_what_it_does_with_full_passes(fact_token: str, settings: Any) -> None:
    """The same weights where all tokens are trained; where keys and values stay for a while, others."""
    requests = [{key: r[key] for key in ("prompt", "target_new", "subject")} for r in load_records()[:3]]
    hparams = settings(**LIFELONG, fact_token=fact_token, schedule="breadth_first")
    changes = []
    for how in (edit, plain_kdpo_l):
        model, tok = load_model()
        before = [model.model.layers[layer].mlp.down_proj.weight.detach().clone() for layer in (0, 1)]
        traces = how(model, tok, requests, hparams)
        assert all(trace.converged for trace in (traces[2] if how is edit else traces))
        changes.append([model.model.layers[i].mlp.down_proj.weight.detach() - w for i, w in enumerate(before)])
    for mine, plain in zip(*changes, strict=True):
        apart = (mine - plain).norm() / plain.norm()
        assert apart < (1e-4 if fact_token == "all" else 0.5)
