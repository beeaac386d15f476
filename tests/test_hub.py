"""Edits on the hub: pushed to a stand-in for it, privately, and pulled elsewhere as they were."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from conftest import assert_same, state
from hub_stand_in import TOKEN, StandIn, running
from small import NAME, Small, change

from kdpo_editor import (
    SHIPPED_MODEL,
    DamagedFileError,
    EditDelta,
    EditLedger,
    HubError,
    KDPOHyperParams,
    ModelError,
)
from kdpo_editor.cli.push import push
from kdpo_editor.edits.card import Base
from kdpo_editor.edits.hub import base_of, without_paths
from kdpo_editor.edits.manifest import EditInfo, state_hash
from kdpo_editor.engine.generation import generate
from kdpo_editor.hparams import settings_folder
from kdpo_editor.models.packaged import FOLDERS
from kdpo_editor.testbed import load_model, load_records

REQUEST = {"prompt": "a", "target_new": "b", "rephrases": ["c", "d"]}
BASE = Base("them/base", "0123", "apache-2.0")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A hub of its own, that somebody is logged in to."""
    constants = huggingface_hub.constants
    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_a_folder_here_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert Base("them/llama").on_hub
    assert not Base("models/llama").on_hub
    info = without_paths(replace(EditInfo.now([]), hparams={"model_name": "models/llama", "objective": "kdpo"}))
    assert info.hparams == {"model_name": "llama", "objective": "kdpo"}
    assert base_of(info).name == "llama"


def small_delta(seed: int = 1) -> EditDelta:
    model = Small()
    return EditDelta.of(model, change(model, seed), [REQUEST])


# Pushed and pulled --------------------------------------------------------------------------------------------


def test_what_is_pushed_is_pulled_elsewhere_bit_for_bit(hub: StandIn, tmp_path: Path) -> None:
    delta = small_delta()
    delta.push_to_hub("me/edits", base=BASE)
    pulled = EditDelta.from_pretrained("me/edits", cache_dir=tmp_path / "cache")
    assert pulled.info == delta.info
    model, wanted = Small(), Small()
    pulled.apply(model)
    delta.apply(wanted)
    assert_same(model, state(wanted))


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_is_private_unless_told_otherwise(hub: StandIn, private: bool) -> None:
    small_delta().push_to_hub("me/edits", base=BASE, **({} if private else {"private": False}))
    assert hub.repositories["me/edits"].private is private


def test_a_public_repository_gets_nothing_unless_that_is_said(hub: StandIn) -> None:
    repository = hub.put("me/edits", {})
    with pytest.raises(HubError, match="me/edits is public"):
        small_delta().push_to_hub("me/edits", base=BASE)
    assert len(repository.commits) == 1
    small_delta().push_to_hub("me/edits", base=BASE, private=False)
    assert "manifest.json" in repository.files


def test_a_repository_of_something_else_is_left_alone(hub: StandIn) -> None:
    repository = hub.put("me/model", {"model.safetensors": b"weights"}, private=True)
    with pytest.raises(HubError, match=r"me/model holds something else: model\.safetensors"):
        small_delta().push_to_hub("me/model", base=BASE)
    assert len(repository.commits) == 1


def test_edits_pushed_again_replace_those_before(hub: StandIn, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/base"}', "utf-8")
    (adapter / "adapter_model.safetensors").write_bytes(b"tensors")
    small_delta(1).push_to_hub("me/edits", base=BASE, adapter=adapter)
    repository = hub.repositories["me/edits"]
    first = dict(repository.files)
    assert json.loads(first["adapter_config.json"]) == {"base_model_name_or_path": "them/base", "revision": "0123"}
    small_delta(2).push_to_hub("me/edits", base=BASE)
    kinds = sorted(Path(name).suffix for name in repository.files)
    assert kinds == ["", ".json", ".md", ".safetensors"]
    assert first.keys() & repository.files.keys() == {".gitattributes", "README.md", "manifest.json"}


def test_a_commit_is_pulled_by_its_name(hub: StandIn, tmp_path: Path) -> None:
    small_delta(1).push_to_hub("me/edits", base=BASE, message="the first")
    repository = hub.repositories["me/edits"]
    first, message = repository.head, repository.message
    small_delta(2).push_to_hub("me/edits", base=BASE)
    pulled = EditDelta.from_pretrained("me/edits", revision=first, cache_dir=tmp_path)
    assert message == "the first"
    assert pulled.changes == small_delta(1).changes


def test_what_was_pulled_is_found_again_without_the_hub(hub: StandIn, tmp_path: Path) -> None:
    small_delta().push_to_hub("me/edits", base=BASE)
    EditDelta.from_pretrained("me/edits", cache_dir=tmp_path)
    hub.requests.clear()
    again = EditDelta.from_pretrained("me/edits", cache_dir=tmp_path, local_files_only=True)
    assert again.tensors().keys() == small_delta().stored.keys()
    assert hub.requests == []


def test_a_folder_is_read_without_the_hub(tmp_path: Path) -> None:
    small_delta().save(tmp_path / "delta")
    assert EditDelta.from_pretrained(tmp_path / "delta").info.requests == [REQUEST]


# What goes wrong ----------------------------------------------------------------------------------------------


def test_who_is_not_logged_in_neither_pushes_nor_pulls(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_delta().push_to_hub("me/edits", base=BASE)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(HubError, match="cannot push to me/other"):
        small_delta().push_to_hub("me/other", base=BASE)
    with pytest.raises(HubError, match="cannot read me/edits"):
        EditDelta.from_pretrained("me/edits", cache_dir=tmp_path)
    assert list(hub.repositories) == ["me/edits"]


def test_a_repository_without_edits_is_named(hub: StandIn, tmp_path: Path) -> None:
    hub.put("me/model", {"config.json": b"{}"})
    with pytest.raises(HubError, match="me/model holds no saved delta"):
        EditDelta.from_pretrained("me/model", cache_dir=tmp_path)


def test_edits_that_were_tampered_with_are_refused(hub: StandIn, tmp_path: Path) -> None:
    small_delta().push_to_hub("me/edits", base=BASE)
    repository = hub.repositories["me/edits"]
    name = next(name for name in repository.files if name.endswith(".safetensors"))
    data = repository.files[name]
    repository.commit({**repository.files, name: data[:-1] + bytes([data[-1] ^ 1])})
    with pytest.raises(DamagedFileError, match="do not match"):
        EditDelta.from_pretrained("me/edits", cache_dir=tmp_path).apply(Small())


@pytest.mark.parametrize("name", ["edits", "me/edits/more", "../edits/x", "me/", "me/a b", ""])
def test_what_is_no_name_is_refused_before_anything_is_asked(hub: StandIn, name: str) -> None:
    with pytest.raises(HubError, match="must be OWNER/NAME"):
        small_delta().push_to_hub(name, base=BASE)
    assert hub.requests == []


def test_edits_that_do_not_name_their_model_need_a_base(hub: StandIn) -> None:
    with pytest.raises(ModelError, match="do not name the model"):
        small_delta().push_to_hub("me/edits")
    assert not hub.repositories


# What is said -------------------------------------------------------------------------------------------------


def test_no_folder_of_this_machine_leaves_it(hub: StandIn, tmp_path: Path) -> None:
    delta = small_delta()
    own = {"model_name": str(tmp_path / "base"), "ledger": str(tmp_path / "edits"), "mom2_dataset": "~/secret/t.txt"}
    delta.info = replace(delta.info, hparams={**KDPOHyperParams(model_name="x").to_dict(), **own})
    delta.push_to_hub("me/edits")
    files = hub.repositories["me/edits"].files
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data or b"secret" in data]
    said = json.loads(files["manifest.json"])["info"]["hparams"]
    assert (said["model_name"], said["ledger"], said["mom2_dataset"]) == ("base", None, "t.txt")
    assert delta.info.hparams is not None
    assert delta.info.hparams["ledger"] == own["ledger"]


def card_of(hub: StandIn, name: str = "me/edits") -> str:
    return hub.repositories[name].files["README.md"].decode()


def test_the_card_names_base_licence_and_edits(hub: StandIn) -> None:
    delta = small_delta()
    delta.info.outcomes = [{"converged": True, "steps": 3}]
    delta.push_to_hub("me/edits", base=BASE)
    card = card_of(hub)
    metadata = yaml.safe_load(card.split("---")[1])
    assert (metadata["base_model"], metadata["license"]) == ("them/base", "apache-2.0")
    assert "| a | b | yes |" in card
    assert "`0123`" in card
    assert f"`{NAME}`" in card
    assert "1 of 1 were reached" in card


def test_texts_with_markdown_in_them_stay_in_their_cell(hub: StandIn) -> None:
    delta = small_delta()
    delta.info.requests = [{"prompt": "a | b\n# c", "target_new": "<script>x</script> [y](z)"}]
    delta.push_to_hub("me/edits", base=BASE)
    (row,) = [line for line in card_of(hub).splitlines() if line.startswith("| a")]
    assert row == r"| a \| b<br>\# c | &lt;script&gt;x&lt;/script&gt; \[y\](z) | not recorded |"


def report(delta: EditDelta) -> dict[str, Any]:
    measures = [{"name": "known", "before": 1.0, "after": 0.945, "count": 50},
                {"name": "perplexity", "before": 16.04, "after": 16.2, "count": 9000},
                {"name": "agreement", "before": 1.0, "after": None, "count": 0}]  # fmt: skip
    return {"state_sha256": state_hash(delta.changes), "measures": measures}


def test_the_card_says_what_was_measured_before_and_after(hub: StandIn) -> None:
    delta = small_delta()
    delta.push_to_hub("me/edits", base=BASE, measured=report(delta))
    card = card_of(hub)
    assert "| known facts kept | 50 | 100.0% | 94.5% |" in card
    assert "| perplexity | 9000 | 16.04 | 16.20 |" in card
    assert "| next tokens alike | 0 | 100.0% | not measured |" in card


@pytest.mark.parametrize("broken", [{}, {"measures": [{"name": "known"}]}, {"state_sha256": "0" * 64}])
def test_a_report_that_is_none_or_of_other_edits_is_refused(hub: StandIn, broken: dict[str, Any]) -> None:
    delta = small_delta()
    measured = {**report(delta), **broken} if broken else {}
    with pytest.raises(HubError, match="kdpo check --json"):
        delta.push_to_hub("me/edits", base=BASE, measured=measured)
    assert not hub.repositories


def test_the_licence_is_found_where_it_is_said(hub: StandIn, tmp_path: Path) -> None:
    hub.put("them/base", {"README.md": b"---\nlicense: mit\n---\n"})
    (tmp_path / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Base\n", "utf-8")
    info = small_delta().info
    assert base_of(info, "them/base").licence == "mit"
    assert base_of(info, "them/other").licence is None
    assert base_of(info, str(tmp_path)) == Base(tmp_path.name, None, "cc0-1.0")
    assert base_of(info, "smollm2-135m").licence == "Apache-2.0"
    assert base_of(info, "them/base", licence="other").licence == "other"


# The command --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_delta().save(tmp_path / "delta")
    return tmp_path / "delta"


def command(source: Path, **options: Any) -> int:
    return push(source, "me/edits", **{"adapter": False, "base": "them/base", "licence": "mit", **options})


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1), ("\n", 1), ("", 1)])
def test_nothing_leaves_before_it_was_shown_and_confirmed(
    hub: StandIn, saved: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert command(saved) == code
    out, err = capsys.readouterr()
    assert "a -> b" in err
    assert "rephrases: c; d" in err
    assert "them/base under mit" in err
    assert ("me/edits" in hub.repositories) is (code == 0)
    assert ("nothing was pushed" in err) is (code == 1)
    assert (json.loads(out)["private"] if out else None) is (True if code == 0 else None)


def test_where_nobody_can_confirm_it_nothing_leaves(
    hub: StandIn, saved: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert command(saved) == 2
    assert "--yes" in capsys.readouterr().err
    assert hub.requests == []
    assert command(saved, yes=True) == 0


def test_undone_edits_do_not_leave(hub: StandIn, tmp_path: Path, capsys: Any) -> None:
    model = Small()
    with EditLedger(tmp_path / "edits", write=True) as ledger:
        for number, text in ((1, "kept"), (2, "undone")):
            originals = change(model, number)
            ledger.record(model, originals, replace(small_delta().info, requests=[{**REQUEST, "prompt": text}]))
        ledger.undo(1, model)
    assert command(tmp_path / "edits", yes=True) == 0
    assert "undone" not in capsys.readouterr().err
    assert not [name for name, data in hub.repositories["me/edits"].files.items() if b"undone" in data]


ELSEWHERE = """
import json, sys
from transformers import AutoTokenizer
import torch

prompt, base, blocks = json.loads(sys.argv[1])
tok = AutoTokenizer.from_pretrained(base)
said = {}
for name, code in blocks.items():
    found = {}
    exec(code, found)
    model = found["model"].eval()
    ids = tok(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tok.eos_token_id)
    said[name] = tok.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True).strip()
    if name != "package":
        assert not [name for name in sys.modules if name.startswith("kdpo_editor")]
from kdpo_editor.edits.hub import revision_in_cache
print(json.dumps([said, [revision_in_cache(name) for name in (base, "them/none", "/a/folder")]]))
"""


@pytest.mark.slow
def test_each_way_of_loading_on_the_card_gives_the_edited_answer_elsewhere(
    hub: StandIn, tmp_path: Path, capsys: Any
) -> None:
    """PEFT and transformers do without this package; the base model is on the hub, and the cache is another."""
    record = load_records()[1]
    request = {key: record[key] for key in ("prompt", "target_new")}
    model, tok = load_model()
    before = generate(model, tok, request["prompt"])
    hparams = KDPOHyperParams.from_hparams(settings_folder() / "KDPO" / SHIPPED_MODEL)
    EditDelta.make(model, tok, [request], hparams).save(tmp_path / "delta")
    after = generate(model, tok, request["prompt"])
    assert before != after
    weights = {f.name: f.read_bytes() for f in FOLDERS[SHIPPED_MODEL].iterdir()}
    base = hub.put("them/base", {**weights, "README.md": b"---\nlicense: mit\n---\n"})
    options: dict[str, Any] = {"adapter": True, "licence": None, "base_revision": base.head}
    assert command(tmp_path / "delta", yes=True, device="cpu", **options) == 0
    blocks = re.findall(r"```python\n(.*?)```", card_of(hub), re.DOTALL)
    package, peft, transformers = blocks
    named = {"peft": peft, "transformers": transformers, "package": package}
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    given = json.dumps([request["prompt"], "them/base", named])
    ran = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, given],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    said, commits = json.loads(ran.stdout.splitlines()[-1])
    assert said == dict.fromkeys(named, after)
    assert commits == [base.head, None, None]
    assert yaml.safe_load(card_of(hub).split("---")[1])["license"] == "mit"


def test_low_rank_edits_are_pushed_too(hub: StandIn, tmp_path: Path) -> None:
    model = Small()
    delta = EditDelta.of(model, change(model, 1))
    small = delta.compress(model, None, rank=1)
    small.push_to_hub("me/edits", base=BASE)
    pulled = EditDelta.from_pretrained("me/edits", cache_dir=tmp_path)
    assert pulled.rank == 1
    assert torch.equal(pulled.change()[NAME], small.change()[NAME])
