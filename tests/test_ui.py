"""``kdpo ui``: what its buttons do, and the page in a browser, where gradio and a browser are installed."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_same, state

from kdpo_editor import SHIPPED_MODEL, EditLedger, KDPOHyperParams, LedgerError
from kdpo_editor.cli.main import main
from kdpo_editor.cli.trying import Trial, offer
from kdpo_editor.compare.run.datasets import load
from kdpo_editor.edits.lora import load_lora
from kdpo_editor.engine.generation import generate
from kdpo_editor.testbed import load_model

PROMPT, SUBJECT, NEW = "Which was the family of Stamnophora?", "Stamnophora", "Tortricidae"
REPHRASING, OTHER = "Which family are Stamnophora?", "Eupithecia miserulata"
FORM = (PROMPT, SUBJECT, NEW, REPHRASING, OTHER)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    model, tok = load_model()
    settings = KDPOHyperParams.from_hparams("hparams/KDPO/kdpo-llama-knowedit")
    with EditLedger(tmp_path / "edits", write=True) as ledger:
        yield Trial(model, tok, ledger, settings, longest=12, chat=False)


def rows(table: str | None) -> list[list[str]]:
    """The texts of a table's cells, without its head."""
    assert table is not None
    body = table.partition("<tbody>")[2]
    texts = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("</tr>") if row.startswith("<tr")]
    return [[re.sub(r"<[^>]+>", "", cell).strip() for cell in row] for row in texts]


def test_editing_changes_the_answer_and_undoing_brings_the_model_back_bit_for_bit(trial: Trial) -> None:
    before = state(trial.model)
    said, table = trial.press(trial.edit, *FORM)
    assert "Edit 1 reached its target" in said
    kinds = [(kind, prompt) for kind, prompt, _, _ in rows(table)]
    assert kinds == [("edit", PROMPT), ("rephrasing", REPHRASING), ("neighbour", PROMPT.replace(SUBJECT, OTHER))]
    _, _, old, new = rows(table)[0]
    assert old == generate(*load_model(), PROMPT)
    assert new == f"{NEW} new answer"
    said, table = trial.press(trial.undo, *FORM)
    assert said == "<p>Edit 1 is undone. No edit stands.</p>"
    assert all(old == new for _, _, old, new in rows(table))
    assert_same(trial.model, before)


def test_asking_changes_nothing_and_says_which_edits_stand(trial: Trial) -> None:
    before = state(trial.model)
    said, table = trial.press(trial.ask, PROMPT, "", "", "", "")
    assert said == "<p>No edit stands.</p>"
    assert [kind for kind, *_ in rows(table)] == ["edit"]
    assert_same(trial.model, before)
    trial.press(trial.edit, *FORM)
    assert trial.press(trial.ask, *FORM)[0] == f"<p>1 edit stands: {SUBJECT} → {NEW}.</p>"


def test_what_is_edited_is_kept_with_its_rephrasings_for_later_checks(trial: Trial) -> None:
    trial.press(trial.edit, *FORM)
    (request,) = trial.ledger.requests
    assert request == {"prompt": PROMPT, "target_new": NEW, "subject": SUBJECT, "rephrase_prompt": [REPHRASING]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((PROMPT, SUBJECT, "", "", ""), "target_new"),
        (("", SUBJECT, NEW, "", ""), "prompt"),
        ((PROMPT, "Nobody", NEW, "", OTHER), f"{PROMPT!r} has no 'Nobody'"),
        ((PROMPT, "", NEW, "", OTHER), "has no ''"),
        (("word " * 3000 + PROMPT, "", NEW, "", ""), "tokens with its target"),
    ],
)
def test_a_bad_request_shows_the_errors_text_and_changes_nothing(
    trial: Trial, fields: tuple[str, ...], message: str
) -> None:
    before = state(trial.model)
    said, table = trial.press(trial.edit, *fields)
    assert said.startswith('<p class="error">Nothing was changed: ')
    assert message in said.replace("&#x27;", "'")
    assert table is None
    assert trial.ledger.head == 0
    assert_same(trial.model, before)


def test_undo_without_an_edit_is_an_error_on_the_page(trial: Trial) -> None:
    said, table = trial.press(trial.undo, *FORM)
    assert "cannot undo 1 edits" in said
    assert table is None


def test_what_is_typed_is_shown_and_not_run(trial: Trial) -> None:
    _, table = trial.press(trial.ask, "<script>alert(1)</script>", "", "<b>", "", "")
    assert table is not None
    assert "<script" not in table
    assert "&lt;script&gt;alert(1)" in table


def test_neighbours_are_judged_by_whether_they_stayed(trial: Trial) -> None:
    _, table = trial.press(trial.edit, PROMPT, SUBJECT, NEW, "", f"{OTHER}\n{SUBJECT}")
    (_, _, old, new), (_, _, same_old, same_new) = rows(table)[1:]
    assert new == f"{old} kept"
    assert same_new == f"{NEW} changed" != same_old


def test_the_adapter_is_the_edit_and_leaves_the_model_to_be_undone(trial: Trial, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    trial.press(trial.edit, *FORM)
    with zipfile.ZipFile(trial.adapter(tmp_path)) as file:
        file.extractall(tmp_path / "unpacked")
    model, tok = load_model()
    assert generate(load_lora(model, tmp_path / "unpacked" / "adapter"), tok, PROMPT) == NEW
    assert "Edit 1 is undone" in trial.press(trial.undo, *FORM)[0]


def test_an_adapter_of_no_edit_is_an_error(trial: Trial, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no edit stands"):
        trial.adapter(tmp_path)


def test_others_are_offered_from_the_facts_most_like_the_prompt() -> None:
    rephrasings, subjects = offer("The mother tongue of Ada Lovelace is", "Ada Lovelace", load("counterfact"))
    assert rephrasings
    assert all("Ada Lovelace" in line for line in rephrasings.splitlines())
    same = {r.subject for r in load("counterfact") if r.prompt == f"The mother tongue of {r.subject} is"}
    assert len(subjects.splitlines()) == 3
    assert set(subjects.splitlines()) <= same


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Twas brillig, and the slithy toves did gyre", "toves"),
        ("The Eiffel Tower is in the city of", "Eiffel Tower"),  # there are facts that ask in which city somebody died
        ("The president of France is", "France"),  # and others that ask for a profession
        ("Ada Lovelace is", "Ada Lovelace"),
    ],
)
def test_nothing_is_offered_for_a_prompt_like_no_fact(prompt: str, subject: str) -> None:
    assert offer(prompt, subject, load("counterfact")) == ("", "")


def test_others_are_offered_for_a_prompt_with_another_little_word() -> None:
    rephrasings, subjects = offer("Mother tongue of Ada Lovelace is", "Ada Lovelace", load("counterfact"))
    assert (rephrasings, subjects) == offer("The mother tongue of Ada Lovelace is", "Ada Lovelace", load("counterfact"))


def test_a_missing_gradio_is_an_error_that_names_the_extra(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui", "--model", SHIPPED_MODEL]) == 1
    assert "pip install 'kdpo-editor[ui]'" in capsys.readouterr().err


def test_a_port_that_is_taken_is_an_error_that_names_it(capsys: Any) -> None:
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["ui", "--model", SHIPPED_MODEL, "--port", port]) == 1
    assert f"port {port}; try another --port" in capsys.readouterr().err


# In a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where ``kdpo ui`` serves its page."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kdpo_editor.cli.main", "ui", "--model", SHIPPED_MODEL, "--port", str(port)]
    log = tmp_path / "log"
    with log.open("w") as output, subprocess.Popen([*command, "--out", tmp_path / "edits"], stdout=output) as server:
        try:
            until(lambda: "The page is at" in log.read_text() or server.poll() is not None, seconds=120)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()


def until(done: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_in_a_browser_an_edit_changes_the_answer_and_undo_brings_it_back(address: str, tmp_path: Path) -> None:
    browsers = pytest.importorskip("playwright.sync_api")
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 400, "height": 900})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)

        def press(button: str, said: str) -> str:
            """The answer to the edit's prompt once the page says what it should."""
            page.click(f"#{button}")
            browsers.expect(page.locator("#said")).to_contain_text(said, timeout=120_000)
            return str(
                page.locator("#answers tr", has=page.get_by_text("edit", exact=True)).locator("td").nth(2).inner_text()
            )

        for name, text in zip(("prompt", "subject", "target", "rephrasings", "subjects"), FORM, strict=True):
            page.fill(f"#{name} :is(input, textarea)", text)
        old = press("ask", "No edit stands")
        assert press("edit", "reached its target").startswith(NEW)
        page.click("#adapter")
        with page.expect_download() as download:
            page.click("#file a", timeout=120_000)
        assert zipfile.is_zipfile(download.value.path())
        assert press("undo", "Edit 1 is undone") == old
        page.fill("#target :is(input, textarea)", "")
        assert press("edit", "Nothing was changed") == old
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        browser.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
    moves = [json.loads(line) for line in (tmp_path / "edits" / "journal.jsonl").read_text("utf-8").splitlines()]
    assert len(moves) == 3  # the header, the edit, and that it was undone
