"""The command ``kdpo-compare``: methods, models and data sets side by side, a Hydra application.

kdpo-compare -m method=kdpo,ft_l,ft_m,lora,rome,memit n_edits=100 protocol.eval_at=[1,10,100]
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ...cache import cache_folder
from ...errors import KDPOError, explained
from ...hparams import settings_folder
from . import config as schema

# Where results of this run go; known once Hydra has read the command line.
_OUT: dict[str, Any] = {}

OmegaConf.register_new_resolver("kdpo_settings", lambda: str(settings_folder()), replace=True)
OmegaConf.register_new_resolver("kdpo_cache", lambda: str(cache_folder()), replace=True)
OmegaConf.register_new_resolver("gpu", lambda: _gpu(), replace=True)
_store = ConfigStore.instance()
_store.store("schema", schema.Compare)
for _name, _schema in (
    ("method", schema.Method),
    ("model", schema.Model),
    ("dataset", schema.Dataset),
    ("protocol", schema.Protocol),
):
    _store.store(f"{_name}_schema", _schema)


def _gpu() -> str:
    """For ``model.device=${gpu:}``: a GPU of its own for each job that a launcher runs at the same time."""
    import torch
    from hydra.core.hydra_config import HydraConfig

    count = torch.cuda.device_count()
    job = HydraConfig.get().job
    number = 0 if OmegaConf.is_missing(job, "num") else job.num  # a single run has none
    return f"cuda:{number % count}" if count else "cpu"


class Refused(CompactHydraException):
    """Something the user can mend; shown without a traceback."""


class RememberOut(Callback):
    """Notes where results will go, for the report at the end."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra; also before a sweep."""
        _OUT.update(folder=Path(config.out).absolute(), report=config.report)

    on_multirun_start = on_run_start


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def one_cell(config: DictConfig) -> float:
    """Compute one cell; returns what a sweeper maximises: the harmonic mean of rewrite, rephrase and locality."""
    from .cell import run

    compare: Any = OmegaConf.to_object(config)
    try:
        cell = run(compare)
    except (KDPOError, ModuleNotFoundError) as error:
        raise Refused(explained(error)) from None
    except OSError as error:
        raise Refused(f"{type(error).__name__}: {error}") from None
    if cell.manifest()["status"] != "complete":
        return 0.0
    from .tune import objective

    return objective(cell.folder)


def main() -> int:
    """Run the command line, then report on all results in its folder; returns the exit status."""
    started = time.time()
    status = 0
    sys.argv[1:] = map(_quoted, sys.argv[1:])
    try:
        one_cell()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted; the same command goes on from here.\n")
        return 130
    if not _OUT or not _OUT["folder"].is_dir():
        return status
    computed = _manifests(_OUT["folder"], started)
    failed = [cell["error"] for cell in computed if cell.get("status") == "failed"]
    if _OUT["report"] and (computed or not status):  # not where all was refused before it began
        from ..report.report import main as report

        shown = report([str(_OUT["folder"])])
        if not computed or any(cell.get("status") != "skipped" for cell in computed):
            status = status or shown
    for error in failed:
        sys.stderr.write(f"failed: {error}\n")
    return status or (1 if failed else 0)


def _quoted(argument: str) -> str:
    """``key=value`` as Hydra takes it where the value is a file's name that has some of Hydra's own characters."""
    key, equals, value = argument.partition("=")
    if not equals or not re.search(r"[^\w./~-]", value) or not os.path.isfile(value):
        return argument
    return key + '="' + value.replace('"', '\\"') + '"'


def _manifests(folder: Path, since: float) -> list[dict[str, Any]]:
    found = []
    for file in folder.glob("*/manifest.json"):
        with suppress(OSError, ValueError):  # cleared by another process, or not a cell's
            if file.stat().st_mtime >= since:
                found.append(json.loads(file.read_text("utf-8")))
    return found


if __name__ == "__main__":
    from kdpo_editor.compare.run import app  # by its own name, which the callback above goes by

    sys.exit(app.main())
