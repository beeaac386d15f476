"""General ability by EleutherAI's lm-evaluation-harness, on the model in memory."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...engine.generation import inner
from ...engine.weights import as_found
from ...errors import HyperParamsError
from .evaluate import Evaluator

LOG = logging.getLogger(__name__)
TASKS = Path(__file__).parents[1] / "tasks"
"""The folder of the package's own task files."""


def measure(evaluator: Evaluator, tasks: Sequence[str], limit: int | None, seed: int) -> dict[str, float]:
    """Figures of ``tasks`` as ``tasks.<task>.<metric>``, with the filter's name behind where there are several.

    ``tasks``: names that the harness or :data:`TASKS` know, or paths of task files. ``limit``: examples of each at
    most. ``seed``: of few-shot examples. A method that has to be told where prompts end (GRACE) gives no figures.

    Raises ``ModuleNotFoundError`` without the harness, and :class:`~kdpo_editor.errors.HyperParamsError` for a task
    that is not known.
    """
    try:
        from lm_eval import simple_evaluate  # type: ignore[import-not-found]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"tasks need {error.name}: pip install 'kdpo-editor[harness]'", name=error.name
        ) from error
    if evaluator.alike:
        LOG.warning("the harness cannot tell this method where prompts end; its tasks are left out")
        return {}
    folders, names = _located(tasks)
    own = {name for folder in folders for name in _names(folder)}
    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=not set(names) <= own)
    if unknown := set(names) - set(manager.all_tasks):
        raise HyperParamsError(
            f"{min(unknown)!r} is no task of the harness, nor the path of a task file; "
            f"the package's own are {', '.join(sorted(_names(TASKS)))}"
        )
    base = inner(evaluator.model)
    silent = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with as_found(base), silent:
        rows = 1 if evaluator.alone else evaluator.batch_size
        model = HFLM(pretrained=base, tokenizer=evaluator.tok, batch_size=rows)
        model._model = evaluator.model  # a method's wrapper, if it has one
        found = simple_evaluate(
            model=model,
            tasks=names,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
            fewshot_random_seed=seed,
        )
    return dict(_figures(found["results"], names))


def _located(tasks: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Folders of task files, and the tasks' names."""
    folders, names = {TASKS: None}, []
    for task in tasks:
        file = Path(task)
        if file.suffix in (".yaml", ".yml") and file.is_file():
            folders[file.parent.absolute()] = None
            names += _names(file)
        else:
            names.append(task)
    return list(folders), names


def _names(path: Path) -> list[str]:
    """The names of the tasks in a task file, or in those below a folder."""
    files = sorted(path.rglob("*.y*ml")) if path.is_dir() else [path]
    return [name for file in files for name in re.findall(r"^task:\s*(\S+)\s*$", file.read_text("utf-8"), re.MULTILINE)]


def _figures(results: dict[str, dict[str, Any]], names: Sequence[str]) -> Iterator[tuple[str, float]]:
    for name in names:
        values = {key: value for key, value in results[name].items() if "," in key and "_stderr," not in key}
        for key, value in values.items():
            metric, _, by = key.partition(",")
            several = sum(other.startswith(f"{metric},") for other in values) > 1
            if isinstance(value, (int, float)):
                yield f"tasks.{name}.{metric}" + (f".{by}" if several else ""), float(value)
