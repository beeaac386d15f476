"""``fact_token``: matrices that are trained through the subject's tokens alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REQUEST, assert_same, load, state
from test_edit import with_bos
from torch import nn

from kdpo_editor import (
    EditLedger,
    HyperParamsError,
    ModelError,
    RequestError,
    apply_kdpo_to_model,
    edit,
)
from kdpo_editor.engine.generation import says_target
from kdpo_editor.requests.tokens import tokenize
from kdpo_editor.testbed import load_model, load_records

GENE = {**REQUEST, "subject": "ZIC3"}
OLD = {
    "prompt": "What is the capital of the old country by the sea?",
    "target_new": "Noctuidae of the north",
    "subject": "old country",
}
FAMILY = {"prompt": "Epaspidoceras belongs to", "target_new": "Noctuidae", "subject": "Epaspidoceras"}
REQUESTS = [GENE, OLD, FAMILY]
MARGIN = {"objective": "hinge", "margin": 1.0, "optimizer": "polyak", "lr": 0.2, "num_steps": 1, "cycles": 3}


def words(tok: Any, prompt: str, subject: str) -> str:
    """What the tokens found for the subject say."""
    ((tokens,),) = tokenize(tok, [{"prompt": prompt, "subject": subject, "target_new": "x"}], with_subject=True)
    return str(tok.decode(tokens.prompt[slice(*tokens.subject)]))


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("What species is ZIC3 specific to?", "ZIC3", " ZIC3"),
        ("Epaspidoceras belongs to", "Epaspidoceras", "Epaspidoceras"),
        ("The family is that of Epaspidoceras", " Epaspidoceras ", " Epaspidoceras"),
        ("Who is who?", "who", " who"),
        ("What", "What", "What"),
    ],
)
def test_the_subjects_tokens_are_found(gpt2: Any, llama: Any, prompt: str, subject: str, expected: str) -> None:
    for _, tok in (gpt2, llama):
        assert words(tok, prompt, subject).strip() == expected.strip()


def test_a_begin_token_is_no_part_of_a_subject_that_comes_first(llama: Any) -> None:
    _, tok = llama
    assert words(with_bos(tok), "Epaspidoceras belongs to", "Epaspidoceras") == "Epaspidoceras"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": "ZIC4"}, r"request 1: 'subject' 'ZIC4' does not stand in the prompt 'What species is ZIC3"),
        ({"subject": " "}, "request 1: 'subject' is empty"),
        ({"subject": ["ZIC3"]}, "request 1: 'subject' is a list; it must be text"),
        ({"rephrases": ["Which species?"]}, "request 1: 'subject' 'ZIC3' does not stand in the prompt 'Which species"),
    ],
)
def test_a_request_without_its_subject_is_refused(
    llama: Any, settings: Any, change: dict[str, Any], message: str
) -> None:
    model, tok = llama
    before = state(model)
    with pytest.raises(RequestError, match=message):
        edit(model, tok, [OLD, {**GENE, **change}], settings(layers=[2, 4], fact_token="subject"))
    assert_same(model, before)


def test_settings_that_cannot_be_are_refused(llama: Any, settings: Any) -> None:
    with pytest.raises(HyperParamsError, match=r"fact_token: 'last' is not allowed; .* all, subject, subject_last"):
        settings(fact_token="last")
    with pytest.raises(HyperParamsError, match=r"fact_token.*'all' where objective is dpo"):
        settings(fact_token="subject", objective="dpo")
    with pytest.raises(ModelError, match="layers: 5 is the last layer"):
        edit(*llama, [GENE], settings(layers=[4, 5], fact_token="subject"))


def keys(model: nn.Module, tok: Any, requests: list[dict[str, str]], fact_token: str, layer: int = 1) -> torch.Tensor:
    """The inputs of the matrix of ``layer`` at the requests' subjects or their last tokens, ``[K, F]``."""
    seen: list[torch.Tensor] = []
    module = model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    edits = [one for phrasings in tokenize(tok, requests, with_subject=True) for one in phrasings]
    with torch.no_grad():
        for one in edits:
            model(one.sequence[None])
    handle.remove()
    first = {"subject": 0, "subject_last": -1}[fact_token]
    return torch.cat([rows[slice(*one.subject)][first:] for rows, one in zip(seen, edits, strict=True)])


def outside(change: torch.Tensor, rows: torch.Tensor) -> float:
    """The share of ``change``, ``[D, F]``, that acts on inputs at right angles to ``rows``."""
    basis = torch.linalg.qr(rows.T.double())[0]
    change = change.double()
    return float((change - change @ basis @ basis.T).norm() / change.norm())


@pytest.mark.parametrize("schedule", ["depth_first", "breadth_first"])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("fact_token", ["subject", "subject_last"])
def test_a_matrix_changes_for_the_subjects_inputs_alone(
    llama: Any, settings: Any, schedule: str, replay: bool, fact_token: str
) -> None:
    """Gradient steps add outer products with the inputs that are trained: there is nothing else in the change."""
    model, tok = llama
    subjects = keys(model, tok, REQUESTS, fact_token)
    hparams = settings(**MARGIN, layers=[1, 2], fact_token=fact_token, schedule=schedule, replay=replay)
    _, originals, _ = edit(model, tok, REQUESTS, hparams)
    lower, upper = (model.get_parameter(name).detach() - value for name, value in originals.items())
    assert min(lower.norm(), upper.norm()) > 0
    assert outside(lower, subjects) < 1e-4


def test_without_it_other_tokens_take_part(llama: Any, settings: Any) -> None:
    """What the test above would not show if only subjects mattered anyway."""
    model, tok = llama
    subjects = keys(model, tok, REQUESTS, "subject")
    _, originals, _ = edit(model, tok, REQUESTS, settings(**MARGIN, layers=[1, 2]))
    name, value = next(iter(originals.items()))
    assert outside(model.get_parameter(name).detach() - value, subjects) > 0.1


def test_a_ledger_brings_the_subjects_back(settings: Any, tmp_path: Path) -> None:
    """A run that goes on from a ledger, in a model that knows of no edits, equals one that never stopped."""
    hparams = settings(**MARGIN, layers=[1, 2], fact_token="subject", replay=True, ledger=str(tmp_path / "edits"))
    model, tok = load("llama")
    other = copy.deepcopy(model)
    for request in REQUESTS[:2]:
        apply_kdpo_to_model(model, tok, [request], hparams)
    EditLedger(tmp_path / "edits").restore(other)
    apply_kdpo_to_model(other, tok, [REQUESTS[2]], hparams)
    apply_kdpo_to_model(model, tok, [REQUESTS[2]], settings(**{**hparams.to_dict(), "ledger": None}))
    assert_same(other, state(model))


@pytest.mark.parametrize("fact_token", ["subject", "subject_last"])
def test_an_edit_is_won_through_its_subject(settings: Any, fact_token: str) -> None:
    model, tok = load_model()
    requests = [{key: r[key] for key in ("prompt", "target_new", "subject")} for r in load_records()[:3]]
    options = {"objective": "hinge", "margin": 1.0, "optimizer": "polyak", "lr": 1.2, "layers": [0, 1, 2]}
    hparams = settings(**options, cycles=60, fact_token=fact_token)
    _, _, traces = edit(model, tok, requests, hparams)
    assert [trace.converged for trace in traces] == [True] * 3
    assert says_target(model, tok, requests[-1:]) == [True]


def test_with_second_moments_and_half_precision_it_is_trained_too(settings: Any, text: str) -> None:
    model, tok = load_model()
    requests = [{key: r[key] for key in ("prompt", "target_new", "subject")} for r in load_records()[:3]]
    options = {"objective": "hinge", "margin": 2.0, "optimizer": "polyak", "lr": 1.2, "layers": [0, 1]}
    hparams = settings(**options, fact_token="subject", mom2_weight=10.0, mom2_dataset=text)
    _, _, traces = edit(model.to(torch.bfloat16), tok, requests, hparams)
    assert all(trace.converged for trace in traces)
