"""Find and read the result folders ("cells") of a comparison: one method, model, data set, protocol and seed each."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ...errors import ResultsError
from ..result_format import IDENTITY, SCHEMA
from .means import cell_means, complete_checkpoints
from .result_folder import ResultFolder

TEXTS = ("hash", "status", "method", "label", "model", "dataset", "protocol")
NUMBERS = ("seed", "n_edits")
COLUMNS = {"edit": pa.int64(), "checkpoint": pa.int64(), "when": pa.string(), "metric": pa.string()}
WHEN = {"pre", "right_after", "checkpoint"}
TEXT_KEYS = {"edit", "checkpoint", "when", "kind", "prompt", "wanted", "text", "stopped"}
# Where and with which seed a cell ran does not make it another variant of its method.
NOT_A_SETTING = (
    "seed", "device", "dir", "folder", "path", "root", "out", "output", "cache",
    "overwrite", "threads", "logging", "report", "experiment", "trials",
)  # fmt: skip


def read_cells(folder: Path, partial: bool = False) -> tuple[list[ResultFolder], list[tuple[str, str]]]:
    """Every cell below ``folder`` (itself included), and those left out as (name, why), both sorted by name.

    ``partial`` takes the complete checkpoints of unfinished cells too. Raises :class:`~kdpo_editor.errors.ResultsError`
    where no cell can be shown.
    """
    if not folder.is_dir():
        raise ResultsError(f"{folder} is not a folder")
    cells, left_out = [], []
    for path in _cell_folders(folder):
        name = _line(str(path.relative_to(folder)))
        try:
            cells.append(_read_cell(path, name, partial))
        except ResultsError as error:
            left_out.append((name, str(error)))
    cells, repeated = _without_repeats(_named_apart(_data_named_apart(cells)))
    left_out = sorted(left_out + repeated)
    if not cells:
        why = "".join(f"\n  {name}: {reason}" for name, reason in left_out)
        raise ResultsError(f"{folder} holds no results to show (folders with manifest.json and rows.parquet){why}")
    return cells, left_out


def read_texts(cell: ResultFolder) -> list[dict[str, Any]]:
    """The cell's raw generations about its edits: ``edit``, ``checkpoint``, ``when``, ``kind``, ``prompt``, ``wanted``
    (accepted answers), ``text`` and ``stopped``. Unreadable lines are passed over."""
    texts = []
    try:
        with (_rows_file(cell.folder).parent / "generations.jsonl").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    text = json.loads(line)
                    if text.keys() >= TEXT_KEYS and text["edit"] >= 0:
                        wanted = text["wanted"]
                        text["wanted"] = [str(w) for w in (wanted if isinstance(wanted, list) else [wanted])]
                        texts.append(text | {key: str(text[key]) for key in ("kind", "prompt", "text")})
                except (ValueError, TypeError, AttributeError):
                    continue
    except OSError:
        return []
    return texts


def _cell_folders(folder: Path) -> list[Path]:
    found = (Path(at) for at, _, files in os.walk(folder) if {"manifest.json", "rows.parquet"} & set(files))
    return sorted(path for path in found if not path.name.startswith("checkpoint"))


def _rows_file(folder: Path) -> Path:
    """The cell's rows, or those of its last checkpoint while it is being computed."""
    kept = {int(p.name.rpartition("-")[2]): p for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()}
    final = folder / "rows.parquet"
    return kept[max(kept)] / "rows.parquet" if kept and not final.exists() else final


def _read_cell(folder: Path, name: str, partial: bool) -> ResultFolder:
    manifest = _read_manifest(folder)
    finished = manifest["status"] == "complete"
    file = _rows_file(folder)
    if not finished and not partial and not file.exists():
        raise ResultsError(_unfinished(manifest))
    config = _read_text(folder / "config.yaml")
    try:
        resolved = yaml.load(config, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ResultsError(f"config.yaml cannot be read ({_line(str(error))})") from error
    if not isinstance(resolved, dict):
        raise ResultsError("config.yaml is not a mapping")
    rows = _read_rows(file, manifest)
    if not finished:
        whole = complete_checkpoints(rows, single=manifest["protocol"] == "single")
        shown = ", ".join(map(str, whole))
        if not partial or not whole:
            hint = f"; --partial shows its checkpoint{'s'[: len(whole) > 1]} {shown}" if whole else ""
            raise ResultsError(_unfinished(manifest) + hint)
        rows = rows[(rows["when"] != "checkpoint") | rows["checkpoint"].isin([0, *whole])]
    means = cell_means(rows)
    if means.empty:
        raise ResultsError("rows.parquet holds no figures")
    settings = {"method": manifest["method"], **_flat(resolved)}
    settings |= {key: str(manifest[key])[:12] for key in ("form", "model_fingerprint") if manifest.get(key)}
    label = manifest["label"] + ("" if finished else " (partial)")
    return ResultFolder(folder, name, label, manifest, config, settings, means, partial=not finished)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ResultsError(f"{path.name} is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path.name} cannot be read ({_line(str(error))})") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_read_text(folder / "manifest.json"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ResultsError(f"manifest.json cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise ResultsError(f"manifest.json is not of schema {SCHEMA}")
    for keys, kind, allowed in ((TEXTS, str, "a text"), (NUMBERS, int, "a whole number")):
        for key in keys:
            if type(manifest.get(key)) is not kind:
                raise ResultsError(f"manifest.json: {key} is {manifest.get(key)!r}, not {allowed}")
    if type(manifest.get("trials", 0)) not in (int, type(None)):
        raise ResultsError(f"manifest.json: trials is {manifest['trials']!r}, not a whole number")
    manifest |= {key: _line(manifest[key]) for key in TEXTS}
    if not isinstance(manifest.get("versions") or {}, dict) or not isinstance(manifest.get("notes") or [], list):
        raise ResultsError("manifest.json: versions is not a mapping or notes is not a list")
    manifest["notes"] = [_line(str(note)) for note in manifest.get("notes") or []]
    manifest["versions"] = {_line(k): _line(str(v)) for k, v in (manifest.get("versions") or {}).items()}
    return manifest


def _unfinished(manifest: dict[str, Any]) -> str:
    error = manifest.get("error")
    if manifest["status"] == "skipped" and manifest["notes"]:
        error = manifest["notes"][0]
    return f"its status is {manifest['status']!r}" + (f" ({_line(str(error))})" if error else "")


def _read_rows(path: Path, manifest: dict[str, Any]) -> pd.DataFrame:
    """Columns of ``COLUMNS`` and ``value`` (float64), after checking them against the manifest."""
    if not path.exists():
        raise ResultsError("rows.parquet is missing")
    try:
        # Not read_table: that takes "seed=0" in a folder's name for a column.
        with pq.ParquetFile(path) as file:
            lacking = {*COLUMNS, *IDENTITY, "value"} - set(file.schema_arrow.names)
            if lacking:
                raise ResultsError(f"rows.parquet lacks {', '.join(sorted(lacking))}")
            table = file.read(columns=[*COLUMNS, *IDENTITY, "value"])
        for key in IDENTITY:
            found = [_line(v) if isinstance(v, str) else v for v in table[key].unique().to_pylist()]
            if found not in ([], [manifest[key]]):
                raise ResultsError(f"rows.parquet is of {key} {found}, manifest.json of {manifest[key]!r}")
        schema = pa.schema([*COLUMNS.items(), ("value", pa.float64())])
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(f"rows.parquet cannot be read ({_line(str(error))})") from error
    unknown = set(table["when"].unique().to_pylist()) - WHEN
    if unknown:
        raise ResultsError(f"rows.parquet: when is {unknown}, not one of {sorted(WHEN)}")
    if any(table[column].null_count for column in COLUMNS):
        raise ResultsError(f"rows.parquet has empty fields among {', '.join(COLUMNS)}")
    return table.to_pandas()


def _flat(config: dict[Any, Any], above: str = "") -> dict[str, str]:
    """``{"a": {"b": 1}}`` as ``{"a.b": "1"}``, without what is not a setting of the method."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{above}{key}.")
        elif str(key).rsplit("_", 1)[-1] not in NOT_A_SETTING and not above.startswith("hydra."):
            flat[_line(f"{above}{key}")] = _line(str(value))
    return flat


def _named_apart(cells: Iterable[ResultFolder]) -> list[ResultFolder]:
    """Cells of one group and label whose settings differ (a sweep) get those settings into their labels."""
    alike = defaultdict(list)
    for cell in cells:
        alike[cell.group, cell.label].append(cell)
    named = []
    for same in alike.values():
        for cell, said in zip(same, _differences(same), strict=True):
            named.append(dataclasses.replace(cell, label=f"{cell.label} ({said})" if said else cell.label))
    return sorted(named, key=lambda cell: cell.name)


def _data_named_apart(cells: Iterable[ResultFolder]) -> list[ResultFolder]:
    """Cells of one group whose records were chosen otherwise get that into their data set's name."""
    alike = defaultdict(list)
    for cell in cells:
        alike[cell.group].append(cell)
    named = []
    for same in alike.values():
        for cell, said in zip(same, _differences(same, "dataset."), strict=True):
            dataset = f"{cell.manifest['dataset']} ({said})" if said else cell.manifest["dataset"]
            named.append(dataclasses.replace(cell, manifest=cell.manifest | {"dataset": dataset}))
    return named


def _differences(cells: Sequence[ResultFolder], beginning: str = "") -> list[str]:
    """Of each cell, those of its settings that not all of ``cells`` have; of settings that so begin."""
    keys = sorted({key for cell in cells for key in cell.settings if key.startswith(beginning)})
    keys = [key for key in keys if len({cell.settings.get(key) for cell in cells}) > 1]
    short = [key.rsplit(".", 1)[-1] for key in keys]
    names = [brief if short.count(brief) == 1 else key for key, brief in zip(keys, short, strict=True)]
    told = [
        [f"{name}={cell.settings.get(key, 'unset')}" for key, name in zip(keys, names, strict=True)] for cell in cells
    ]
    return list(map(", ".join, told))


def _without_repeats(cells: list[ResultFolder]) -> tuple[list[ResultFolder], list[tuple[str, str]]]:
    """Of cells alike in everything, seed included, the one finished last; the others as left out."""
    kept: dict[Any, ResultFolder] = {}
    left_out = []
    for cell in sorted(cells, key=lambda cell: str(cell.manifest.get("finished")), reverse=True):
        first = kept.setdefault((cell.group, cell.label, cell.manifest["seed"]), cell)
        if first is not cell:
            left_out.append((cell.name, f"repeats {first.name}: same settings and seed"))
    return sorted(kept.values(), key=lambda cell: cell.name), left_out


def _line(text: str) -> str:
    """``text`` on one line, without characters that a terminal would act on."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
