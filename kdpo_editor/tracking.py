"""Figures sent to what a team tracks its runs with: trackio, Weights & Biases or TensorBoard. Off unless asked for."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import HyperParamsError

TRACKERS = ("trackio", "wandb", "tensorboard")
PROJECT = "kdpo-editor"
Track = Callable[[Mapping[str, float], int], None]
"""Takes figures by name, and the step that they are of."""


def untracked(figures: Mapping[str, float], step: int) -> None:
    """Send ``figures`` nowhere."""


@contextmanager
def tracking(tracker: str | None, name: str, settings: Mapping[str, Any]) -> Iterator[Track]:
    """Inside, a run is open to which the function that is given sends figures; ``None`` gives :func:`untracked`.

    Args:
        tracker: one of :data:`TRACKERS`, or ``None``.
        name: of the run; TensorBoard's folder is ``runs/NAME``.
        settings: what the run was told.

    Raises:
        HyperParamsError: there is no such tracker.
        ModuleNotFoundError: it is not installed.
    """
    if tracker is None:
        yield untracked
        return
    if tracker not in TRACKERS:
        raise HyperParamsError(f"logging: {tracker!r} is not one of {', '.join(TRACKERS)}")
    try:
        library: Any = importlib.import_module("torch.utils.tensorboard" if tracker == "tensorboard" else tracker)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"logging to {tracker} needs {error.name}: pip install {tracker}") from error
    # What trackers say of themselves does not belong among results.
    with contextlib.redirect_stdout(sys.stderr):
        if tracker == "tensorboard":
            run = library.SummaryWriter(f"runs/{name}")
            run.add_text("settings", "\n".join(f"- {key}: {value}" for key, value in settings.items()))
        else:
            run = library.init(project=PROJECT, name=name, config=dict(settings))

    def track(figures: Mapping[str, float], step: int) -> None:
        if tracker == "tensorboard":
            for key, value in figures.items():
                run.add_scalar(key, value, step)
        else:
            run.log(dict(figures), step=step)

    try:
        yield track
    finally:
        with contextlib.redirect_stdout(sys.stderr):
            # Not the run's own finish: trackio would end it again, aloud, when the process ends.
            run.close() if tracker == "tensorboard" else library.finish()
