"""What a model says before any edit, and what an edited one says of the same."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ...requests.tokens import tokenize
from ...testbed import unedited_texts
from ...tracking import Track, untracked
from . import harness, statistics
from .config import Compare
from .datasets import Record, content_hash
from .editing import Editing
from .evaluate import Evaluator, Reading, accuracy
from .judge import Judge
from .known import known_facts, right
from .other_questions import other_questions
from .results import Log
from .scores import Outputs, observe, rows, texts
from .unedited import kept_for

HELD_OUT = Path(__file__).parent / "held_out.txt"


@dataclass
class Scorer:
    """Asks an edited model everything and compares with what it said before any edit.

    ``edited``: the records to edit. ``spare``: records that some methods train on beside them; nothing about either is
    asked as a known fact. What the unedited model says is the same for every method and is kept in the cache, by the
    content of its weights.
    """

    config: Compare
    editing: Editing
    edited: list[Record]
    spare: list[Record]
    model_fingerprint: str
    pre: list[Outputs] = field(init=False)
    overreach: float = field(init=False, default=math.nan)
    known: list[Record] = field(init=False)
    others: list[tuple[int, Record]] = field(init=False)
    reading: Reading | None = field(init=False, default=None)
    judge: Judge | None = field(init=False, default=None)
    track: Track = field(init=False, default=untracked)

    def __post_init__(self) -> None:
        """Ask the unedited model, or find in the cache what it said."""
        protocol = self.config.protocol
        kept = kept_for(self.editing.model, self.model_fingerprint, Path(self.config.cache))
        self.longest = protocol.longest or self._longest_target() + 8
        asked: dict[str, Any] = {"longest": self.longest, "fluency": protocol.fluency}
        asked["probabilities"] = protocol.probabilities
        asked["as_users"] = protocol.wild
        self.asked = asked
        if protocol.judge:
            self.judge = Judge(protocol.judge, protocol.judge_model, Path(self.config.cache) / "judge")
        evaluator = self._evaluator("before any edit")

        def outputs() -> Any:
            return [o.to_json() for o in observe(evaluator, self.edited, **asked, judge=self.judge)]

        of = {"edited": content_hash(self.edited), "judge": [protocol.judge, protocol.judge_model], **asked}
        self.pre = [Outputs.from_json(entry) for entry in kept(of, outputs)]
        after = protocol.name == "sequence"  # what is asked of the model as a whole, after edits that stay
        self.known = []
        if protocol.known and after:
            beside = [*self.edited, *self.spare]
            self.known = known_facts(evaluator, self.config.dataset.known, protocol.known, beside, kept)
        self.others = []
        if protocol.other_questions:
            self.others = other_questions(self.edited, protocol.other_questions)
            questions = content_hash([question for _, question in self.others])
            self.overreach = kept({"others": questions}, lambda: self._overreach(evaluator, len(self.edited)))
        if protocol.perplexity and after:
            self.documents = self._held_out()
            text = hashlib.sha256("\0".join(self.documents).encode()).hexdigest()

            def reading() -> Any:
                found = evaluator.read(self.documents)
                return [found.perplexity, found.choices]

            self.reading = Reading(*kept({"text": text}, reading))

        self.tasks = kept(self._of_tasks(), lambda: self._measure(evaluator)) if protocol.tasks else {}

    def before(self, log: Log) -> None:
        """Rows and generations of the model as it is before any edit."""
        self._add(log, range(len(self.edited)), self.pre, "pre", 0)
        if self.known:
            log.rows.append((-1, 0, "pre", "known", 1.0))
        if self.others:
            log.rows.append((-1, 0, "pre", "overreach", self.overreach))
        if self.reading is not None:
            log.rows.append((-1, 0, "pre", "perplexity", self.reading.perplexity))
            log.rows.append((-1, 0, "pre", "agreement", 1.0))
        log.rows += [(-1, 0, "pre", name, value) for name, value in self.tasks.items()]

    def score(self, log: Log, which: Sequence[int], when: str, checkpoint: int) -> None:
        """Rows and generations of the edits ``which``."""
        records = [self.edited[i] for i in which]
        # Answers of up to fifty tokens in three forms take long: they are asked for at checkpoints only.
        asked = self.asked if when == "checkpoint" else {**self.asked, "as_users": False}
        now = observe(self._evaluator("scoring"), records, **asked, judge=self.judge)
        self._add(log, which, now, when, checkpoint)

    def score_rest(self, log: Log, checkpoint: int) -> None:
        """What edits should have left alone: other facts, and text in general."""
        if self.known:
            still = right(self._evaluator("known facts"), self.known)
            log.rows.append((-1, checkpoint, "checkpoint", "known", sum(still) / len(still)))
        if self.others:
            share = self._overreach(self._evaluator("other questions"), checkpoint)
            log.rows.append((-1, checkpoint, "checkpoint", "overreach", share))
        if self.reading is not None:
            now = self._evaluator("text").read(self.documents)
            log.rows.append((-1, checkpoint, "checkpoint", "perplexity", now.perplexity))
            agreement = accuracy(now.choices, self.reading.choices)
            log.rows.append((-1, checkpoint, "checkpoint", "agreement", agreement))
        if self.config.protocol.tasks:
            figures = self._measure(self._evaluator("tasks"))
            log.rows += [(-1, checkpoint, "checkpoint", name, value) for name, value in figures.items()]

    def track_means(self, log: Log, checkpoint: int) -> None:
        """Send the mean of each metric at a checkpoint to where figures are tracked."""
        values: dict[str, list[float]] = {}
        for _, when, kind, metric, value in log.rows:
            if (when, kind) == (checkpoint, "checkpoint"):
                values.setdefault(metric, []).append(value)
        self.track({metric: fmean(of) for metric, of in values.items()}, checkpoint)

    def _add(self, log: Log, which: Sequence[int], said: Sequence[Outputs], when: str, checkpoint: int) -> None:
        stops = self.config.protocol.stops
        for i, output in zip(which, said, strict=True):
            record = self.edited[i]
            log.rows += [(i, checkpoint, when, m, v) for m, v in rows(record, self.pre[i], output, stops)]
            place = {"edit": i, "checkpoint": checkpoint, "when": when}
            log.generations += [{**place, **entry} for entry in texts(record, output)]

    def _overreach(self, evaluator: Evaluator, edits: int) -> float:
        """Of other questions about the first so many subjects, the share answered with the edit's new answer."""
        answers = right(evaluator, [question for i, question in self.others if i < edits])
        return sum(answers) / len(answers) if answers else math.nan

    def _measure(self, evaluator: Evaluator) -> dict[str, float]:
        protocol = self.config.protocol
        return harness.measure(evaluator, protocol.tasks, protocol.tasks_limit, self.config.seed)

    def _of_tasks(self) -> dict[str, Any]:
        """What the figures of tasks depend on beside the model: their names, and the content of own files."""
        files = [Path(task).read_text("utf-8") for task in self.config.protocol.tasks if Path(task).is_file()]
        protocol = self.config.protocol
        return {"tasks": list(protocol.tasks), "files": files, "limit": protocol.tasks_limit, "seed": self.config.seed}

    def _evaluator(self, progress: str) -> Evaluator:
        evaluator = self.editing.evaluator()
        evaluator.batch_size = self.config.protocol.batch_size
        evaluator.progress = progress
        return evaluator

    def _longest_target(self) -> int:
        targets = [{"prompt": r.prompt, "target_new": r.target_new} for r in self.edited]
        return max(len(tokens.chosen) for tokens, *_ in tokenize(self.editing.tok, targets))

    def _held_out(self) -> list[str]:
        name = self.config.model.held_out_text
        if name == "shipped":
            return unedited_texts()
        return statistics.read_text(name or HELD_OUT)
