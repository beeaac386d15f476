"""Rivals of EasyEdit's upstream form that need more than their settings: what they are told, keep and give back."""

from __future__ import annotations

import importlib.util
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import assert_same, load, state
from test_derived_settings import RECORD, build

from kdpo_editor import easyedit
from kdpo_editor.compare.run.cell_locks import one_at_a_time
from kdpo_editor.compare.run.derived_settings import derive
from kdpo_editor.compare.run.editing import Editing
from kdpo_editor.easyedit.import_hook import VARIABLE
from kdpo_editor.errors import HyperParamsError

if importlib.util.find_spec("easyeditor") is None and not os.environ.get(VARIABLE):
    pytest.skip("no form of EasyEdit is installed", allow_module_level=True)

upstream = pytest.mark.skipif(not easyedit.is_upstream(), reason="the PyPI form lacks the method")


def editing(method: str, folder: Path, **changed: Any) -> Editing:
    model, (_, tok) = build("llama").requires_grad_(False), load("llama")
    model.config._name_or_path = "any"
    settings = {**derive(method, model, "any"), **changed}
    return Editing(model, tok, settings, seed=0, folder=folder)


@upstream
def test_ultraedits_statistics_go_on_until_the_edits_are_undone(tmp_path: Path) -> None:
    made = editing("UltraEdit", tmp_path)
    before = state(made.base)
    counted = []
    for _ in range(2):
        made.edit([RECORD])
        (normalizer,) = easyedit.ultraedit._executor().alg.lifelong_normalizer.values()
        counted.append(int(normalizer.n))
    assert counted[1] == 2 * counted[0] > 0
    made.undo()
    assert_same(made.base, before)
    made.edit([RECORD])
    (normalizer,) = easyedit.ultraedit._executor().alg.lifelong_normalizer.values()
    assert int(normalizer.n) == counted[0]
    made.undo()


@upstream
def test_ultraedit_changes_the_same_whatever_the_models_name(tmp_path: Path) -> None:
    edited = []
    for name in ("any", "llama"):
        made = editing("UltraEdit", tmp_path, model_name=name)
        made.edit([RECORD])
        edited.append(state(made.base))
        made.undo()
    for key, value in edited[0].items():
        assert torch.equal(value, edited[1][key])


@upstream
def test_simie_takes_its_own_settings_and_those_of_the_method_it_works_on() -> None:
    settings = derive("SimIE", build("llama"), "any")
    hparams, ignored = easyedit.settings({**settings, "device": "cpu", "v_lr": 0.25})
    assert (hparams.lamHyper, hparams.base_hparams.v_lr) == (settings["lamHyper"], 0.25)
    assert hparams.device == hparams.base_hparams.device == "cpu"
    assert "v_lr" not in ignored
    with pytest.raises(HyperParamsError, match=r"unknown key 'v_lrr'"):
        easyedit.settings({**settings, "v_lrr": 1})


@pytest.mark.parametrize(("kind", "wanted"), [("space", " new"), ("word", "new")])
def test_pmet_is_told_the_space_where_tokens_tell_it(kind: str, wanted: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"?": 0, "a": 1, "\u0120a": 2}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    splits: Any = {"space": pre_tokenizers.ByteLevel(add_prefix_space=False), "word": pre_tokenizers.Whitespace()}
    made.pre_tokenizer = splits[kind]
    tok = PreTrainedTokenizerFast(tokenizer_object=made)
    assert easyedit.target_as_told("PMET", tok, "new") == wanted
    assert easyedit.target_as_told("MEMIT", tok, "new") == "new"


def test_a_lock_of_the_cache_is_waited_for(tmp_path: Path) -> None:
    events: list[str] = []

    def second() -> None:
        with one_at_a_time(tmp_path, "moments"):
            events.append("second")

    with one_at_a_time(tmp_path, "moments"):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(timeout=0.3)
        events.append("first")
    waiting.join(timeout=30)
    assert events == ["first", "second"]


class HalfWritten:
    """What is killed while it is saved."""

    def __reduce__(self) -> Any:
        raise KeyboardInterrupt


def test_a_null_space_that_was_not_saved_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next cell takes a file that is there for one that is whole."""
    from kdpo_editor.easyedit import comparing

    module = SimpleNamespace(get_project=lambda model, tok, layer, hparams: torch.eye(4))
    hparams = SimpleNamespace(layers=[1, 2], P_loc=str(tmp_path / "projections.pt"))
    monkeypatch.setattr(comparing, "_module", lambda method: module)
    with monkeypatch.context() as killed:
        killed.setattr(torch, "stack", lambda tensors: [*tensors, HalfWritten()])
        with pytest.raises(KeyboardInterrupt):
            comparing.save_null_space(torch.nn.Linear(4, 4), None, hparams)
    assert list(tmp_path.iterdir()) == []
    comparing.save_null_space(torch.nn.Linear(4, 4), None, hparams)
    assert torch.load(hparams.P_loc).shape == (2, 4, 4)
