"""Answers as a user meets them: asked in three forms, ended naturally, compared and judged."""

from __future__ import annotations

import copy
import json
import lzma
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from kdpo_editor import SHIPPED_MODEL
from kdpo_editor.compare.run import judge as judging
from kdpo_editor.compare.run import wild
from kdpo_editor.compare.run.datasets import Record, load
from kdpo_editor.compare.run.evaluate import Evaluator
from kdpo_editor.compare.run.judge import Judge
from kdpo_editor.errors import KDPOError
from kdpo_editor.models.loading import load as load_model

DATA = Path(__file__).parent / "data"
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load_model(SHIPPED_MODEL, device="cpu")


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return load("shipped", shuffle=False, n_edits=6)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SmolLM2's tokenizer, which has a chat template."""
    folder = tmp_path_factory.mktemp("smollm2")
    shutil.copytree(DATA / "smollm2-tokenizer", folder, dirs_exist_ok=True)
    (folder / "tokenizer.json").write_bytes(lzma.decompress((folder / "tokenizer.json.xz").read_bytes()))
    return AutoTokenizer.from_pretrained(folder)


def test_a_question_is_asked_alone_in_an_instruction_and_as_a_chat(chatting: Any) -> None:
    asked = {form: chatting.decode(ids) for form, ids in wild.forms(chatting, "Who wrote Emma?").items()}
    assert asked["question"] == "Who wrote Emma?"
    assert asked["instruction"] == "Please answer the question:\n\nQ: Who wrote Emma?\nA:"
    assert asked["chat"].endswith("<|im_start|>user\nWho wrote Emma?<|im_end|>\n<|im_start|>assistant\n")
    assert asked["chat"].count("<|im_start|>system") == 1  # the template's own


def test_a_model_without_a_template_is_not_asked_as_a_chat(shipped: tuple[Any, Any]) -> None:
    tok = copy.deepcopy(shipped[1])
    tok.chat_template = None
    assert set(wild.forms(tok, "Who wrote Emma?")) == {"question", "instruction"}


def test_answers_are_those_of_transformers_with_stop_strings(shipped: tuple[Any, Any], records: list[Record]) -> None:
    model, tok = shipped
    found = wild.observe(Evaluator(model, tok), records, None)
    for record, answers in zip(records, found, strict=True):
        for form, ids in wild.forms(tok, record.prompt).items():
            out = model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=50,
                stop_strings=[".", "\n", tok.eos_token],
                tokenizer=tok,
                do_sample=False,
                pad_token_id=tok.eos_token_id,
            )
            said = tok.decode(out[0][len(ids) :], skip_special_tokens=True)
            assert answers[f"rewrite.{form}"][0]["text"] == said.strip().rstrip(".\n")


def test_a_taught_fact_is_an_exact_match_and_the_new_answer_is_not(
    shipped: tuple[Any, Any], records: list[Record]
) -> None:
    from dataclasses import replace

    taught = [replace(record, target_new=record.ground_truth) for record in records]
    for asked, right in ((taught, 1.0), (records, 0.0)):
        for answers in wild.observe(Evaluator(*shipped), asked, None):
            figures = dict(wild.rows(answers))
            assert figures["wild.rewrite.question_em"] == right
            assert "wild.rewrite.question_judge" not in figures


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Paris. It lies", "Paris"), (" Paris\nQ: Who", "Paris"), ("\nParis", ""), ("U.S. Army", "U"), ("Paris", "Paris")],
)
def test_an_answer_ends_at_the_first_full_stop_or_line_break(text: str, answer: str) -> None:
    assert wild.first_sentence(text) == answer


# The judge ------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A server of chat completions that says ``reply`` to everything and keeps what it was asked."""

    address: str
    reply: str = "CORRECT"
    asked: list[Any] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.asked.append((self.path, self.headers["Authorization"], body))
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": told.reply}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    told = Server(f"http://127.0.0.1:{listening.server_port}/v1")
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield told
    listening.shutdown()
    listening.server_close()


def test_a_judge_is_asked_once_for_each_answer(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for _ in range(2):
        assert Judge(server.address, "m", tmp_path)("Where is Rome?", "Italy", "In Italy")
    ((path, key, body),) = server.asked
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["temperature"]) == ("m", 0)
    for said in ("Where is Rome?", "Expected answer: Italy", "Given answer: In Italy"):
        assert said in body["messages"][0]["content"]
    assert "secret" not in "".join(file.read_text() for file in tmp_path.iterdir())
    assert not Judge(server.address, "m", tmp_path)("Where is Rome?", "Italy", " ")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("reply", "right"),
    [("CORRECT", True), ("**Incorrect**.", False), ("It is not what was CORRECT before, so INCORRECT", False)],
)
def test_the_last_word_of_a_verdict_counts(server: Server, tmp_path: Path, reply: str, right: bool) -> None:
    server.reply = reply
    assert Judge(server.address, "m", tmp_path)("a", "b", "c") is right


def test_a_judge_without_a_verdict_or_an_answer_is_named(server: Server, tmp_path: Path) -> None:
    server.reply = "Perhaps"
    with pytest.raises(KDPOError, match=r"judge_model: 'm' said 'Perhaps'"):
        Judge(server.address, "m", tmp_path)("a", "b", "c")
    with pytest.raises(KDPOError, match=r"protocol\.judge: http://127\.0\.0\.1:1/v1 gave no answer"):
        Judge("http://127.0.0.1:1/v1", "m", tmp_path)("a", "b", "c")
    assert not list(tmp_path.iterdir())


def test_verdicts_are_figures(shipped: tuple[Any, Any], records: list[Record], server: Server, tmp_path: Path) -> None:
    (answers,) = wild.observe(Evaluator(*shipped), records[:1], Judge(server.address, "m", tmp_path))
    figures = dict(wild.rows(answers))
    assert figures["wild.rewrite.question_judge"] == 1.0
    assert figures["wild.rewrite.question_em"] == 0.0


def test_the_docs_show_the_judges_prompt() -> None:
    assert judging.PROMPT in (DOCS / "reference/protocol.md").read_text("utf-8")
