"""A language model that judges answers, behind any address that speaks OpenAI's chat completions."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import KDPOError
from ...whole_files import make_folder, write_file

PROMPT = """You grade answers to questions of fact.

Question: {question}
Expected answer: {wanted}
Given answer: {said}

The given answer is CORRECT if it says all of the expected answer, in whatever words, and nothing that contradicts it.
It is INCORRECT if any of that is missing, if it offers other answers beside it, or if it repeats itself.
Reply with one word: CORRECT or INCORRECT."""
KEY = "OPENAI_API_KEY"  # the environment variable that may hold the server's key
PATIENCE = 120.0  # seconds for one verdict


@dataclass(frozen=True)
class Judge:
    """Asks ``model`` at ``address``, such as ``http://localhost:8000/v1``; what it said is kept in ``folder``."""

    address: str
    model: str
    folder: Path

    def __call__(self, question: str, wanted: str, said: str) -> bool:
        """Whether ``said`` answers ``question`` with ``wanted``; an empty answer is wrong without being asked about.

        Raises :class:`~kdpo_editor.errors.KDPOError` where the server gives no verdict.
        """
        if not said.strip():
            return False
        content = PROMPT.format(question=question, wanted=wanted, said=said)
        asked = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        body = json.dumps(asked, sort_keys=True).encode()
        file = self.folder / f"{hashlib.sha256(self.address.encode() + body).hexdigest()[:24]}.json"
        if file.exists():
            return _verdict(json.loads(file.read_text("utf-8"))["reply"]) == "CORRECT"
        reply = self._ask(body)
        with suppress(OSError):  # a cache that cannot be written to keeps nothing
            make_folder(self.folder)
            write_file(file, json.dumps({"asked": asked, "reply": reply}, ensure_ascii=False).encode())
        return _verdict(reply) == "CORRECT"

    def _ask(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get(KEY, '')}"}
        request = urllib.request.Request(f"{self.address.rstrip('/')}/chat/completions", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                reply = str(json.load(answer)["choices"][0]["message"]["content"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise KDPOError(
                f"protocol.judge: {self.address} gave no answer ({type(error).__name__}: {error}); it must be the "
                "address of a server of chat completions, ending in /v1"
            ) from error
        if _verdict(reply) is None:
            raise KDPOError(
                f"protocol.judge_model: {self.model!r} said {reply[:80]!r}; it must say CORRECT or INCORRECT"
            )
        return reply


def _verdict(reply: str) -> str | None:
    """The last of the two words in a reply, which may reason before it."""
    words = [word.strip(".,:;!*\"'`()").upper() for word in reply.split()]
    return next((word for word in reversed(words) if word in ("CORRECT", "INCORRECT")), None)
