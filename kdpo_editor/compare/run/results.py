"""One folder per cell of a comparison: what it was told, what it found, and how far it came.

::

    <out>/<cell>/config.yaml         the resolved config
                 manifest.json       hash, status, versions, the model's fingerprint, notes
                 rows.parquet        one row per (edit, metric, checkpoint)
                 generations.jsonl   what the model said, as it said it
                 run.log
                 checkpoint-<n>/     after n calls of the method, while the cell is being computed

A reader sees all of a file or none.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import easyedit
from ...edits.journal import lock
from ...errors import CellBusy, LedgerLocked, ResultsError
from ...whole_files import appearing, write_file
from ..result_format import IDENTITY, SCHEMA

LOCK = ".lock"
MEASURED = ("edit", "checkpoint", "when", "metric", "value")
PACKAGES = ("kdpo-editor", "torch", "transformers", "peft", "hydra-core", "omegaconf", "numpy", "lm_eval")


@dataclass
class Log:
    """What a cell has measured so far: rows (``edit, checkpoint, when, metric, value``) and raw generations."""

    rows: list[tuple[int, int, str, str, float]] = field(default_factory=list)
    generations: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Cell:
    """A cell's folder. ``identity`` has the columns that are the same in each of its rows."""

    folder: Path
    hash: str
    identity: dict[str, Any]

    def manifest(self) -> dict[str, Any]:
        """What ``manifest.json`` says, ``{}`` if there is none.

        Raises :class:`~kdpo_editor.errors.ResultsError` if it cannot be read or is of another cell.
        """
        file = self.folder / "manifest.json"
        try:
            found = json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ResultsError(f"{file} cannot be read ({error}); overwrite=true computes the cell again") from error
        if not isinstance(found, dict) or found.get("hash") != self.hash or found.get("schema") != SCHEMA:
            raise ResultsError(f"{file} is not of this cell ({self.hash}); overwrite=true computes it again")
        return found

    def note(self, **entries: Any) -> None:
        """Set entries of ``manifest.json``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        known = {"schema": SCHEMA, "hash": self.hash, **self.identity, **self.manifest(), **entries}
        write_file(self.folder / "manifest.json", f"{json.dumps(known, indent=1, ensure_ascii=False)}\n".encode())

    def clear(self) -> None:
        """Remove all that was computed."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if not path.name.startswith(LOCK):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else computes the cell inside. Raises :class:`~kdpo_editor.errors.CellBusy` if somebody does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            held = lock(self.folder / LOCK, 0.0)
        except LedgerLocked as error:
            raise CellBusy(str(error)) from None
        try:
            yield
        finally:
            held.release()

    def save(self, log: Log) -> None:
        """Write the rows and generations, as the cell's results."""
        self._write_log(self.folder, log)

    def save_checkpoint(self, count: int, log: Log, state: dict[str, Tensor]) -> None:
        """Keep what it takes to go on after ``count`` calls of the method; the last such replaces the one before."""
        from safetensors.torch import save_file

        partial = self.folder / "checkpoint.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        self._write_log(partial, log)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial / "state.safetensors")
        done = self.folder / f"checkpoint-{count}"
        shutil.rmtree(done, ignore_errors=True)
        partial.rename(done)
        for other in self.folder.glob("checkpoint-*"):
            if other != done:
                shutil.rmtree(other)

    def load_checkpoint(self) -> tuple[int, Log, dict[str, Tensor]]:
        """What :meth:`save_checkpoint` kept; 0 and nothing if there is none.

        Raises :class:`~kdpo_editor.errors.ResultsError` naming the folder if it is damaged.
        """
        import pandas as pd
        from safetensors.torch import load_file

        found = {int(p.name.rpartition("-")[2]): p for p in self.folder.glob("checkpoint-*")}
        if not found:
            return 0, Log(), {}
        count, folder = max(found.items())
        try:
            frame = pd.read_parquet(folder / "rows.parquet", columns=list(MEASURED))
            rows = [tuple(row) for row in frame.itertuples(index=False)]
            # Texts may hold characters that splitlines would split at as well.
            lines = filter(None, (folder / "generations.jsonl").read_text("utf-8").split("\n"))
            return count, Log(rows, [json.loads(line) for line in lines]), load_file(folder / "state.safetensors")  # type: ignore[arg-type]
        except Exception as error:  # pyarrow, safetensors and json each raise their own
            raise ResultsError(f"{folder} cannot be read ({error}); overwrite=true computes the cell again") from error

    def drop_checkpoints(self) -> None:
        """Remove them, when the cell is complete."""
        for folder in self.folder.glob("checkpoint*"):
            shutil.rmtree(folder)

    def _write_log(self, folder: Path, log: Log) -> None:
        import pandas as pd

        frame = pd.DataFrame(log.rows, columns=list(MEASURED)).astype(
            {"edit": "int64", "checkpoint": "int64", "when": "str", "metric": "str", "value": "float64"}
        )
        for position, key in enumerate(IDENTITY):
            frame.insert(position, key, self.identity[key])
        with appearing(folder / "rows.parquet") as part:
            frame.to_parquet(part, index=False)
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in log.generations)
        write_file(folder / "generations.jsonl", lines.encode())


def versions() -> dict[str, str]:
    """Of the packages that figures depend on, of Python, and of the EasyEdit that is imported."""
    import platform

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    with contextlib.suppress(ModuleNotFoundError):
        found["easyeditor"] = easyedit.version()
    return found


def folder_name(parts: Sequence[Any]) -> str:
    """A folder's name of parts that may hold anything."""
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", str(part)).strip("._") or "_" for part in parts)[:120]
