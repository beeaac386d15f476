"""One cell of a comparison: one method on one model and data set, from the first edit to figures on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from tqdm import tqdm

from ... import easyedit
from ...derived import complete
from ...errors import DataError, HyperParamsError, KDPOError, ResultsError
from ...hparams import KDPOHyperParams, settings_folder
from ...models import loading
from ...tracking import tracking
from ...whole_files import write_file
from . import statistics
from .cell_locks import one_at_a_time
from .config import PROTOCOLS, SPLITS, Compare
from .datasets import Record, content_hash, in_validation, load, whole_cases
from .derived_settings import TEMPLATE, fill, is_template
from .editing import NEED_SUBJECT, Editing, available
from .evaluate import fingerprint
from .memory import gpus_of, high_water, wait_for
from .outside import editor
from .results import Cell, Log, folder_name, versions
from .scorer import Scorer

LOG = logging.getLogger(__name__)
RATES = ("lr", "v_lr", "edit_lr")
# What KDPO's settings may leave out.
PLACE = ("layers", "rewrite_module_tmp")
SAVE_EVERY = 60.0  # seconds between checkpoints, beside those at `eval_at`
SPARE = 50  # records that are never edited, for methods that train on some (WISE)
# What a cell's figures do not depend on.
ELSEWHERE = ("out", "cache", "overwrite", "threads", "logging", "report")


def run(config: Compare) -> Cell:
    """Compute a cell, go on with one that was killed, or leave a complete one as it is.

    Whatever goes wrong with the method or its data ends up in the cell's manifest and log (status "failed"), not in an
    exception, so that the cells after it are computed. A method that the installed form of EasyEdit lacks gives a
    cell of status "skipped".

    Raises:
        CellBusy: another process computes it.
        ResultsError: its folder is damaged and ``overwrite`` was not asked for.
        KDPOError: an unknown data set, protocol or model, or a bad record; found before anything is written.
    """
    edited, spare = _records(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    easyedit.require()
    if config.method.hparams is not None:
        config.method.hparams = _filled(config, config.method.hparams)
    settings, notes = _settings(config)
    cell = _cell(config, edited, settings, notes)
    with cell.locked():
        if config.overwrite:
            cell.clear()
        if cell.manifest().get("status") == "complete":
            if config.method.trials is not None:
                cell.note(trials=config.method.trials)
            LOG.info("%s is there already", cell.folder)
            return cell
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        form = easyedit.form().lower()
        cell.note(status="running", started=started, form=form, versions=versions(), error=None)
        cell.note(settings=settings, notes=notes, trials=config.method.trials)
        write_file(cell.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
        with _log_to(cell.folder / "run.log"):
            try:
                _compute(config, cell, settings, notes, edited, spare)
                finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
                if cell.manifest()["status"] == "running":
                    cell.note(status="complete", finished=finished)
            except Exception as error:
                LOG.error("%s failed: %s", cell.folder.name, error)
                with open(cell.folder / "run.log", "a", encoding="utf-8") as stream:
                    stream.write(traceback.format_exc())
                cell.note(status="failed", error=f"{type(error).__name__}: {error}")
    return cell


def _compute(
    config: Compare,
    cell: Cell,
    settings: dict[str, Any] | None,
    notes: list[str],
    edited: Sequence[Record],
    spare: Sequence[Record],
) -> None:
    if notes and settings is None:
        cell.note(status="skipped")
        LOG.warning("%s: %s", config.method.label, notes[0])
        return
    if settings is not None and settings.get("alg_name") in NEED_SUBJECT:
        _check_subjects(edited, settings["alg_name"])
    model, tok = loading.load(config.model.name, dtype=config.model.dtype, device=config.model.device)
    model.requires_grad_(False)
    before = fingerprint(model)
    text = (config.model.text, config.model.characters, config.model.tokens_per_input)
    kept = Path(config.cache) / "stats" / f"{before[:16]}-{statistics.text_digest(*text)}"
    stats = Path(config.stats_dir or kept).absolute()
    start = time.perf_counter()
    single = config.protocol.name == "single"
    prompts = [record.prompt for record in spare]
    outside = None
    if config.method.apply and settings is not None:
        outside = editor(config.method.apply, config.method.settings_class, settings)
    # Cells that run at the same time want the same moments and projections: one computes them, the others wait.
    with one_at_a_time(config.cache, f"set-up-{before[:16]}"):
        if settings is not None:
            statistics.ensure(model, tok, settings, text[0], text[1], stats, text[2])
        editing = Editing(
            model,
            tok,
            settings,
            seed=config.seed,
            folder=stats,
            unrelated=prompts,
            sequence=not single,
            outside=outside,
        )
        editing.prepare()
    setup = time.perf_counter() - start
    if editing.ignored:
        notes.append(f"of no use to EasyEdit's installed form and left out: {', '.join(editing.ignored)}")
    scorer = Scorer(config, editing, list(edited), list(spare), before)
    count, log, state = cell.load_checkpoint()
    if count and cell.manifest().get("model_fingerprint") != before:
        raise ResultsError(
            f"{cell.folder}: its first {count} edits were made on other weights; overwrite=true computes it again"
        )
    cell.note(model_fingerprint=before, dequantised_from=loading.dequantised_from(model), notes=notes)
    if count == 0:
        scorer.before(log)
        if settings is not None:
            log.rows.append((-1, 0, "right_after", "setup_seconds", setup))
    else:
        LOG.info("going on after %d of %d edits", count, len(edited))
    with tracking(config.logging, cell.folder.name, cell.identity) as scorer.track:
        if single:
            _alone(config, cell, editing, scorer, list(edited), count, log)
            scorer.track_means(log, 1)
        else:
            _in_sequence(config, cell, editing, scorer, list(edited), count, log, state)
    if single and fingerprint(model) != before:
        raise KDPOError(f"{config.method.label} left the model changed after its edits were undone")
    cell.save(log)
    cell.drop_checkpoints()


def _alone(
    config: Compare, cell: Cell, editing: Editing, scorer: Scorer, edited: list[Record], done: int, log: Log
) -> None:
    """Each edit by itself, undone before the next."""
    saved = time.monotonic()
    for i in _progress(config, range(done, len(edited)), done):
        editing.count = i  # for the seed
        log.rows += [(i, 1, "right_after", metric, value) for metric, value in _edit(editing, edited[i : i + 1])]
        scorer.score(log, [i], "checkpoint", 1)
        editing.undo()
        if time.monotonic() - saved > SAVE_EVERY:
            cell.save_checkpoint(i + 1, log, {})
            saved = time.monotonic()


def _in_sequence(
    config: Compare, cell: Cell, editing: Editing, scorer: Scorer, edited: list[Record], done: int, log: Log, state: Any
) -> None:
    """One edit after the other, all kept."""
    scored_at = sorted({t for t in config.protocol.eval_at if 0 < t < len(edited)} | {len(edited)})
    calls = _calls(len(edited), config.method.requests_per_call, scored_at)
    if done and editing.resumable:
        editing.load_state(state, count=done)
    elif done:
        for first, last in calls[:done]:
            editing.edit(edited[first:last])
    saved = time.monotonic()
    for number in _progress(config, range(done, len(calls)), done):
        first, last = calls[number]
        costs = _edit(editing, edited[first:last])
        log.rows += [(i, last, "right_after", metric, value) for i in range(first, last) for metric, value in costs]
        if config.protocol.right_after:
            scorer.score(log, range(first, last), "right_after", last)
        if last in scored_at:
            scorer.score(log, range(last), "checkpoint", last)
            scorer.score_rest(log, last)
            scorer.track_means(log, last)
        if last in scored_at or time.monotonic() - saved > SAVE_EVERY:
            cell.save_checkpoint(number + 1, log, editing.state() if editing.resumable else {})
            saved = time.monotonic()


def _calls(total: int, size: int, stops: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of at most ``size`` edits that together are all of them and end at every stop."""
    calls, first = [], 0
    while first < total:
        last = min([first + size, total, *(t for t in stops if t > first)])
        calls.append((first, last))
        first = last
    return calls


def _edit(editing: Editing, records: Sequence[Record]) -> list[tuple[str, float]]:
    """Make the edits in one call; its seconds, for each of them, and its memory, for all of them together."""
    gpus = gpus_of(editing.base)
    with high_water(gpus) as peak:
        wait_for(gpus)
        start = time.perf_counter()
        editing.edit(records)
        wait_for(gpus)
        seconds = time.perf_counter() - start
    costs: list[tuple[str, float]] = [("seconds", seconds / len(records))]
    if peak.bytes is not None and peak.total is not None and editing.config:
        costs += [("peak_memory", peak.bytes), ("total_memory", peak.total)]
    return costs


def _records(config: Compare) -> tuple[list[Record], list[Record]]:
    """The records to edit, and some others of the same split, from the order's end, whatever is edited.

    Raises :class:`~kdpo_editor.errors.KDPOError` for settings that cannot be met.
    """
    data, protocol = config.dataset, config.protocol
    for key, value, allowed in (("protocol.name", protocol.name, PROTOCOLS), ("dataset.split", data.split, SPLITS)):
        if value not in allowed:
            raise HyperParamsError(f"{key}: {value!r} is not one of {', '.join(allowed)}")
    for key, number, least in (
        ("n_edits", config.n_edits, 1),
        ("seed", config.seed, 0),
        ("threads", config.threads, 1),
        ("dataset.offset", data.offset, 0),
        ("method.requests_per_call", config.method.requests_per_call, 1),
        ("method.trials", config.method.trials, 1),
        ("protocol.known", protocol.known, 0),
        ("protocol.other_questions", protocol.other_questions, 0),
        ("protocol.longest", protocol.longest, 0),
        ("protocol.fluency", protocol.fluency, 0),
        ("protocol.batch_size", protocol.batch_size, 1),
        ("protocol.tasks_limit", protocol.tasks_limit, 1),
        ("model.characters", config.model.characters, 1),
        ("model.tokens_per_input", config.model.tokens_per_input, 1),
    ):
        if number is not None and number < least:
            wanted = f"at least {least}" if least else "0 or more"
            raise HyperParamsError(f"{key}: {number} is not allowed; it must be {wanted}")
    if protocol.name == "single":
        for key, asked in (("tasks", protocol.tasks), ("other_questions", protocol.other_questions)):
            if asked:
                raise HyperParamsError(f"protocol.{key}: asked once all edits are made, and protocol=single keeps none")
    if protocol.judge and not (protocol.wild and protocol.judge_model):
        raise HyperParamsError(
            "protocol.judge: it judges WILD's answers; protocol.wild=true and protocol.judge_model go with it"
        )
    source = data.validation if data.validation and data.split == "validation" else data.source
    pool = load(
        source,
        seed=config.seed,
        shuffle=data.shuffle,
        unique_subjects=data.unique_subjects,
        drop_bad=data.drop_bad,
    )
    if data.validation is None and data.split != "all":
        first = {record.index: record for record in reversed(pool)}  # the edits of one case stay together
        pool = [record for record in pool if in_validation(first[record.index]) == (data.split == "validation")]
    last = data.offset + config.n_edits
    if last > len(pool):
        distinct = " of different subjects" if data.unique_subjects else ""
        raise DataError(
            f"n_edits: {source} has {len(pool)} records{distinct} in its split {data.split!r}; "
            f"{config.n_edits} from the {data.offset}th on are too many"
        )
    edited = whole_cases(pool[data.offset : last], alone=protocol.name == "single")
    return edited, pool[last:][-SPARE:]


def _check_subjects(records: Sequence[Record], method: str) -> None:
    """Raise :class:`~kdpo_editor.errors.DataError` for the first of ``records`` that ``method`` cannot edit."""
    for record in records:
        where = f"record {record.index}: {method}"
        if not record.subject_in_prompt:
            raise DataError(
                f"{where} needs the subject word for word in the prompt; {record.subject!r} is not in {record.prompt!r}"
            )
        if set("{}") & set(record.prompt.replace(record.subject, "")):
            raise DataError(f"{where} takes no braces in a prompt; {record.prompt!r} has some")


def _digests(config: Compare) -> dict[str, str]:
    """SHA-256 of the files, if any, that figures depend on beside the edited records."""
    names = (config.model.text, config.model.held_out_text, config.dataset.known, *config.protocol.tasks)
    files = {name: Path(name) for name in names if name}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()}


def _cell(config: Compare, edited: Sequence[Record], settings: dict[str, Any] | None, notes: list[str]) -> Cell:
    label = config.method.label
    if notes and settings is not None:
        label += " (own CE)" if config.method.without == "ce" else f" ({config.method.without})"
    told = {k: v for k, v in asdict(config).items() if k not in ELSEWHERE}
    del told["model"]["device"], told["method"]["trials"]
    if told["stats_dir"] is None:
        del told["stats_dir"]
    told |= {"settings": settings, "records": content_hash(edited), "form": easyedit.form().lower()}
    told |= {"files": digests} if (digests := _digests(config)) else {}
    code = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    identity = {
        "method": config.method.name,
        "label": label,
        "model": config.model.name,
        "dataset": config.dataset.name,
        "protocol": config.protocol.name,
        "seed": config.seed,
        "n_edits": config.n_edits,
    }
    name = folder_name(
        [*(identity[k] for k in ("method", "model", "dataset", "protocol", "n_edits")), f"s{config.seed}"]
    )
    return Cell(Path(config.out) / f"{name}-{code}", code, identity)


def _settings(config: Compare) -> tuple[dict[str, Any] | None, list[str]]:
    """The method's settings, or what stands in for it, or ``None`` for none; and what is to be said about it."""
    settings = None if config.method.hparams is None else _scaled(config, config.method.hparams)
    if settings is None or config.method.apply or available(settings):
        return settings, []
    form, without = easyedit.form(), config.method.without
    files = (settings_folder() / without / f"{name}.yaml" for name in (config.model.settings, TEMPLATE))
    other = next((file for file in files if file.exists()), None) if without else None
    if without == "ce":
        easyedit.settings(settings)  # raises for a key that neither form knows
        own = {k: settings[k] for k in ("model_name", "layers", "rewrite_module_tmp", "num_steps", "lr")}
        # One cycle of as many steps; FT-M stops below this loss as well.
        own |= {"alg_name": "KDPO", "objective": "ce", "cycles": 1, "stop_loss": 1e-2}
        stand_in = "this package's cross-entropy over the whole target stands in, with its layers, num_steps and lr"
        return own, [f"EasyEdit's {form} form lacks FT-M: {stand_in}"]
    if other is not None:
        taken = _filled(config, _scaled(config, yaml.safe_load(other.read_text("utf-8"))))
        return taken, [f"EasyEdit's {form} form knows {without} instead; settings are those of hparams/{without}"]
    return None, [f"EasyEdit's {form} form does not have this method"]


def _scaled(config: Compare, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with their rate times ``method.rate_factor``."""
    factor = config.method.rate_factor
    if factor == 1:
        return settings
    rate = next((key for key in RATES if key in settings), None)
    if rate is None:
        raise HyperParamsError(f"method.rate_factor: {config.method.name} has none of {', '.join(RATES)} to multiply")
    return {**settings, rate: settings[rate] * factor}


def _filled(config: Compare, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with what they leave to the model: its name, a template's words, KDPO's layers and matrix."""
    name = config.model.name
    if not (config.method.apply or settings.get("alg_name")):
        raise HyperParamsError(
            f"method {config.method.name}: hparams names no alg_name, the method's name in EasyEdit; an editor of your "
            "own is named by method.apply"
        )
    settings = {"model_name": name, **settings}
    if is_template(settings):
        return fill(settings, loading.outline(name), name)
    left_out = [key for key in PLACE if settings.get(key) is None]
    if config.method.apply or settings["alg_name"] != "KDPO" or not left_out:
        return settings
    found = complete(KDPOHyperParams.from_config(settings), loading.outline(name)).to_dict()
    return {**settings, **{key: found[key] for key in left_out}}


def _progress(config: Compare, numbers: range, done: int) -> Iterator[int]:
    label = f"{config.method.label} ({config.dataset.name}, seed {config.seed})"
    return iter(tqdm(numbers, desc=label, unit="edit", initial=done, total=numbers.stop, disable=None, leave=False))


@contextlib.contextmanager
def _log_to(file: Path) -> Iterator[None]:
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours = logging.getLogger("kdpo_editor")
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        handler.close()
