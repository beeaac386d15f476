"""What README and docs print works: code, commands, links, the model cards' numbers; public names are documented."""

from __future__ import annotations

import ast
import configparser
import csv
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import kdpo_editor
from kdpo_editor import KDPOHyperParams, errors
from kdpo_editor.cli.main import app
from kdpo_editor.derived import default_layers
from kdpo_editor.errors import KDPOError, explained

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
MODULES = sorted((ROOT / "kdpo_editor").rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.is_file()]
if not (ROOT / "docs").is_dir():
    pytest.skip("there is no documentation beside these tests", allow_module_level=True)
# What pages show for a large model runs on the shipped one.
SHIPPED = {
    "hparams/KDPO/llama-2-7b": "hparams/KDPO/kdpo-llama-knowedit",
    "hparams/KDPO-L/auto": "hparams/KDPO-L/kdpo-llama-knowedit",
    "n_edits=100": "n_edits=3",
    "smollm2-135m": "kdpo-llama-knowedit",
}
PROGRAMS = (
    "kdpo",
    "kdpo-compare",
    "kdpo-figures",
    "kdpo-report",
    "kdpo-statistics",
    "make",
    "pip",
    "python",
    "mkdocs",
    "git",
    "export",
)
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: [^>]+ -->\s*$")


@dataclass
class Block:
    """A fenced block. ``skipped``: a comment before it says why it is not run."""

    page: str
    line: int
    language: str
    info: str
    code: str
    skipped: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = []
    for match in FENCE.finditer(text):
        info, before = match["info"].strip(), text[: match.start()]
        skipped = bool(NOT_RUN.search(before))
        line = before.count("\n") + 1
        found.append(Block(page.name, line, info.partition(" ")[0], info, match["code"], skipped))
    return found


ALL = [block for page in PAGES for block in blocks(page)]


def environment(package: Path = ROOT) -> dict[str, str]:
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(paths)}


def run_blocks(pages: dict[str, list[str]], folder: Path, package: Path = ROOT) -> dict[str, str]:
    file = folder / "blocks.json"
    file.write_text(json.dumps(pages), "utf-8")
    done = subprocess.run(
        [sys.executable, str(HERE / "docs_blocks.py"), str(file)],
        capture_output=True, text=True, env=environment(package), cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


# Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "python"], ids=lambda b: f"{b.page}:{b.line}")
def test_python_blocks_compile(block: Block) -> None:
    compile(block.code, f"{block.page}, line {block.line}", "exec")


@pytest.mark.slow
def test_python_blocks_of_readme_and_docs_run_on_the_shipped_model(tmp_path: Path) -> None:
    runnable: dict[str, list[str]] = {}
    framework = (
        importlib.util.find_spec("easyeditor") is not None or kdpo_editor.easyedit.import_hook.VARIABLE in os.environ
    )
    for block in ALL:
        needs = "easyeditor" in block.code and not framework
        if block.language == "python" and not (block.skipped or needs or block.page == "CONTRIBUTING.md"):
            code = block.code
            for large, shipped in SHIPPED.items():
                code = code.replace(large, shipped)
            runnable.setdefault(block.page, []).append(code)
    assert len(runnable) >= 7
    failed = run_blocks(runnable, tmp_path)
    assert not failed, "\n".join(f"{page}: {error}" for page, error in failed.items())


# A change in CONTRIBUTING.md: the file, where, the beginning of the line there, and what is inserted.
CHANGE = re.compile(r"^In `([^`]+)`, (above|below) `([^`]+)`:\n\n```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def change(text: str, where: str, beginning: str, code: str) -> str:
    """Insert code above or below the one line that begins so, as far indented where that is above."""
    lines = text.splitlines(keepends=True)
    (at,) = (i for i, line in enumerate(lines) if line.lstrip().startswith(beginning))
    if where == "below":
        return "".join([*lines[: at + 1], code, *lines[at + 1 :]])
    indent = lines[at][: -len(lines[at].lstrip())]
    return "".join([*lines[:at], textwrap.indent(code, indent), *lines[at:]])


@pytest.mark.slow
def test_worked_examples_of_contributing_work(tmp_path: Path) -> None:
    """Their changes, made in a copy of the package, make the Python after them run, which fails without."""
    parts = {"kdpo_editor": ["__pycache__"], "hparams": [], "tests": ["__pycache__", "golden", "data"]}
    for name in ("unchanged", "changed"):
        for part, ignored in parts.items():
            shutil.copytree(ROOT / part, tmp_path / name / part, ignore=shutil.ignore_patterns(*ignored))
    changes = CHANGE.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert len(changes) == sum(block.language == "py" for block in ALL)
    for file, where, beginning, code in changes:
        path = tmp_path / "changed" / file
        path.write_text(change(path.read_text("utf-8"), where, beginning, code), "utf-8")
    examples = [b.code for b in ALL if b.page == "CONTRIBUTING.md" and b.language == "python"]
    for name, failing in (("unchanged", 3), ("changed", 0)):
        package, folder = tmp_path / name, tmp_path / f"run-{name}"
        folder.mkdir()
        code = [example.replace('"tests/', f'"{package}/tests/') for example in examples]
        failed = run_blocks({f"example {i}": [c] for i, c in enumerate(code)}, folder, package=package)
        assert len(failed) == failing, "\n".join(failed.values())


# Commands ---------------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, str, bool]]:
    """Where, command, and whether it is complete: those in text may be mentioned without their arguments."""
    for block in ALL:
        if block.language in ("sh", "bash", "console", ""):
            for line in block.code.replace("\\\n", " ").splitlines():
                words = line.split()
                if words and (words[0] in PROGRAMS or block.language):
                    yield block.page, line.strip().removeprefix("$ "), True
    for page in PAGES:
        for text in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", page.read_text("utf-8"))):
            words = text.split()
            if len(words) > 1 and words[0] in PROGRAMS and re.match(r"[\w.'$/\[-]+", words[1]):
                yield page.name, " ".join(words), False


@pytest.mark.parametrize(("page", "command", "complete"), sorted(set(commands())))
def test_commands_exist(page: str, command: str, complete: bool, tmp_path: Path) -> None:
    words = shlex.split(command, comments=True)
    if not words:
        return
    words = words[: words.index(">")] if ">" in words else words
    program, arguments = words[0], words[1:]
    assert program in PROGRAMS, f"{page}: {program} is not a program that these tests know"
    for word in arguments:
        if word.startswith(("hparams/", "benchmarks/", "tests/")):
            assert any((ROOT / f"{word}{suffix}").exists() for suffix in ("", ".yaml")), f"{word} does not exist"
    if complete or program in ("kdpo-compare", "make", "pip", "python"):
        CHECKS.get(program, lambda *_: None)(arguments, tmp_path)
    elif program == "kdpo":
        assert arguments[0] in typer.main.get_command(app).commands or arguments[0].startswith("-")  # type: ignore[attr-defined]


def check_kdpo(arguments: list[str], folder: Path) -> None:
    command = typer.main.get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    given = command.make_context(arguments[0], arguments[1:]).params  # wrong usage raises
    values = dict(pair.split("=", 1) for pair in given.get("changes") or [])
    assert set(values) <= {f.name for f in fields(KDPOHyperParams)}


def check_compare(arguments: list[str], folder: Path) -> None:
    """Every choice of a sweep is composed, against the schema."""
    pytest.importorskip("hydra")
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from kdpo_editor.compare.run import app

    own = arguments[arguments.index("--config-dir") + 1] if "--config-dir" in arguments else None
    if own is not None:
        arguments = [a for a in arguments if a not in ("--config-dir", own)]
        for block in ALL:
            titled = re.search(r'title="([^"]+)"', block.info)
            if titled and titled[1].startswith(f"{own}/"):
                (folder / titled[1]).parent.mkdir(parents=True, exist_ok=True)
                (folder / titled[1]).write_text(block.code, "utf-8")
        if not (folder / own).is_dir():
            return  # a folder that the text leaves to the reader
    overrides = [a for a in arguments if a not in ("-m", "--multirun")]
    if "--help" in overrides:
        return
    for plugin in ("joblib", "submitit"):
        used = plugin in " ".join(overrides) or (plugin == "joblib" and "experiment=shipped" in overrides)
        if used and importlib.util.find_spec(f"hydra_plugins.hydra_{plugin}_launcher") is None:
            pytest.skip(f"hydra's plugin for {plugin} is not installed")
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = []
    for one in parsed:
        if one.is_choice_sweep():
            choices.append([f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()])
        else:
            choices.append([str(one.input_line)])
    for number in range(max(map(len, choices), default=1)):
        given = [values[min(number, len(values) - 1)] for values in choices]
        composed(app, given, folder / own if own else None, folder)


def composed(app: Any, overrides: list[str], own: Path | None, folder: Path) -> None:
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    path = [f"file://{own}"] if own else []
    if own is not None:
        overrides = [*overrides, f"hydra.searchpath=[{','.join([f'file://{app.settings_folder()}', *path])}]"]
    if any(o.startswith("dataset=file") for o in overrides):
        overrides = [o for o in overrides if not o.startswith("dataset.source")] + ["dataset.source=x.json"]
    with initialize_config_module("kdpo_editor.compare.conf", version_base="1.3"):
        config = compose("config", [*overrides, f"cache={folder}"])
    config.model.device = "cpu"
    OmegaConf.to_object(config)


def check_report(arguments: list[str], folder: Path) -> None:
    from kdpo_editor.compare.report import report

    words = [str(folder / a) if i == 0 else a for i, a in enumerate(arguments)]
    assert report.main(words) == 1  # there are no results here; wrong usage would exit


def check_figures(arguments: list[str], folder: Path) -> None:
    from kdpo_editor.cli.settings import chosen_settings
    from kdpo_editor.compare.report import paper_figures

    if arguments[0] == "cycle":
        given = paper_figures.make_parser().parse_args(arguments)
        chosen_settings(given.model, given.hparams, changes=given.set)
    else:
        words = [str(folder / a) if i == 1 else a for i, a in enumerate(arguments)]
        assert paper_figures.main(words) == 1  # there are no results here; wrong usage would exit


def check_statistics(arguments: list[str], folder: Path) -> None:
    from kdpo_editor.compare.run import statistics

    hidden = [str(folder / "none.yaml") if a.startswith("hparams/") else a for a in arguments]
    assert statistics.main(hidden) == 1  # the settings are not there; wrong usage would exit


def check_make(arguments: list[str], folder: Path) -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    for word in arguments:
        name, equals, value = word.partition("=")
        assert re.search(rf"^{name} \?=" if equals else rf"^{name}:", text, re.MULTILINE), f"make has no {name}"
        if name == "EXPERIMENT":
            assert (ROOT / "kdpo_editor/compare/conf/experiment" / f"{value}.yaml").is_file()


def check_pip(arguments: list[str], folder: Path) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for extras in re.findall(r"(?:^|\s)(?:\.|kdpo-editor)\[([\w,]+)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= set(config["options.extras_require"])


def check_python(arguments: list[str], folder: Path) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
    elif arguments[0] == "-m":
        source = importlib.util.find_spec(arguments[1])
        assert source is not None
        assert all(f'"{a}"' in Path(str(source.origin)).read_text("utf-8") for a in arguments if a.startswith("--"))


CHECKS = {
    "kdpo": check_kdpo,
    "kdpo-compare": check_compare,
    "kdpo-figures": check_figures,
    "kdpo-report": check_report,
    "kdpo-statistics": check_statistics,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
}


# Links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as Markdown and GitHub make them."""
    text = FENCE.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#{1,6} +(.+?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()) for title in titles}


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        text = re.sub(r"`[^`\n]+`", "`", FENCE.sub("", page.read_text("utf-8")))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("http:", "https:", "mailto:")):
                yield page, target


@pytest.mark.parametrize(("page", "target"), sorted(set(links())), ids=lambda value: getattr(value, "name", value))
def test_relative_links_and_anchors_resolve(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), f"{page.name}: {target}"
    if not anchor or anchor in anchors(file):
        return
    assert file.name == "api.md", f"{page.name}: {target}"
    assert anchor.startswith("kdpo_editor."), f"{page.name}: {target}"
    module, _, name = anchor.rpartition(".")
    # A module is no attribute of its package until something imports it.
    found = importlib.util.find_spec(anchor) if hasattr(importlib.import_module(module), "__path__") else None
    assert found or hasattr(importlib.import_module(module), name), f"{page.name}: {target}"


def test_pages_end_up_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert re.search(rf"^ +- {name}$", text, re.MULTILINE), name


# What pages say about the package ---------------------------------------------------------------------------------


def test_every_setting_is_explained() -> None:
    cards = re.split(r"^### ", (ROOT / "docs/reference/settings.md").read_text("utf-8"), flags=re.MULTILINE)
    defaults = {}
    for card in cards[1:]:
        (defaults[card.partition("\n")[0].strip("`")],) = re.findall(r"\*\*Default\*\*:\s`([^`]+)`", card)
    for field in fields(KDPOHyperParams):
        assert field.name in defaults, field.name
        said = yaml.safe_load(defaults[field.name])
        default = field.default
        if said == "required":
            assert default is MISSING, field.name
            continue
        numeric = isinstance(default, float)
        assert (float(said) if numeric else said) == default, field.name


# Measured figures. Each row of a table is a row of a result file, named in a comment above the table. A time in prose
# is at the place in a JSON file that the comment behind it names.
RESULTS = ROOT / "benchmarks/results"
MEASURED = {row["name"]: row for row in csv.DictReader((RESULTS / "levers-smollm2.csv").open(encoding="utf-8"))}
COLUMNS = {"s/edit": "seconds", "a call": "requests_per_call"}  # other columns of a table are called as in the file
FIGURE = re.compile(r"(\d+(?:\.\d+)?) (m?s)<!-- (\S+\.json) (.+?) -->")
SECONDS = re.compile(r"(?<![\w.])\d+(?:\.\d+)? m?s\b(?!<!-- \S+\.json .+? -->)")
MEAN = re.compile(r"(?<![\w.])\d*\.\d{3}(?!\d)(?! m?s<!--)")


def prose(page: Path) -> str:
    """A page without its code and its tables."""
    lines = FENCE.sub("", page.read_text("utf-8")).splitlines()
    return re.sub(r"`[^`\n]+`", "", "\n".join(line for line in lines if not line.lstrip().startswith("|")))


def tables(marker: str) -> list[tuple[str, str, list[list[str]]]]:
    """Page, what its comment ``<!-- MARKER ... -->`` says, and the cells of the table below that, headings first."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        here = re.findall(rf"^<!-- {marker} ([^>]+?) -->\n\n((?:\|.*\n)+)", text, re.MULTILINE)
        assert len(here) == text.count(f"\n<!-- {marker} "), f"{page.name}: a comment has no table below it"
        for said, table in here:
            cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
            found.append((page.name, said, [cells[0], *cells[2:]]))
    return found


@pytest.mark.parametrize(("page", "names", "cells"), tables("rows:"), ids=lambda value: str(value)[:40])
def test_rows_of_measured_tables_are_rows_of_the_results(page: str, names: str, cells: list[list[str]]) -> None:
    headings, *rows = cells
    for name, row in zip(names.split(), rows, strict=True):
        for heading, cell in zip(headings[1:], row[1:], strict=True):
            measured = MEASURED[name][COLUMNS.get(heading, heading)]
            assert cell == measured or float(cell) == float(measured), f"{page}: {name}, {heading}"


@pytest.mark.parametrize(("page", "file", "cells"), tables("file:"), ids=lambda value: str(value)[:40])
def test_tables_of_whole_files_are_those_files(page: str, file: str, cells: list[list[str]]) -> None:
    assert list(csv.reader((RESULTS / file).open(encoding="utf-8"))) == cells, page


def test_every_table_of_results_is_shown_or_used() -> None:
    shown = {file for _, file, _ in tables("file:")} | {"levers-smollm2.csv"}
    assert {file.name for file in RESULTS.glob("*.csv")} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_measured_figures_name_their_rows(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    for before, heading in re.findall(r"(.*)\n\n(\|.+\|)\n\|[-|]+\|\n", text):
        if re.search(r"\| (?:rewrite|rephrase|neighbours|s/edit) \|", heading):
            assert before.startswith(("<!-- rows: ", "<!-- file: ")), f"{page.name}: {heading}"


@pytest.mark.parametrize("row", MEASURED.values(), ids=MEASURED.keys())
def test_rows_of_the_results_are_of_settings_that_there_are(row: dict[str, str]) -> None:
    rival, _, _ = row["settings"].partition(" ")
    if "=" not in rival:
        assert (ROOT / "hparams" / rival).is_dir()
        return
    given = dict(pair.split("=", 1) for pair in row["settings"].split())
    KDPOHyperParams.from_config({"model_name": row["model"], **{k: yaml.safe_load(v) for k, v in given.items()}})


RECIPE = "recipe-100"  # the row that it was chosen by


def test_the_recipe_is_the_one_that_was_measured() -> None:
    recipe = KDPOHyperParams.from_hparams(ROOT / "hparams/KDPO-L/auto", "smollm2-135m").to_dict()
    given = {k: yaml.safe_load(v) for k, v in (p.split("=", 1) for p in MEASURED[RECIPE]["settings"].split())}
    layers = given.pop("layers")
    assert KDPOHyperParams.from_config({**recipe, **given}).to_dict() == recipe
    assert default_layers(30, range(30), all_tokens=False) == layers


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_in_prose_are_those_of_the_files_they_name(page: Path) -> None:
    for shown, unit, file, path in FIGURE.findall(page.read_text("utf-8")):
        value = json.loads((RESULTS / file).read_text("utf-8"))
        for key in path.split("/"):
            value = value[key]
        digits = len(shown.partition(".")[2])
        assert f"{value * (1000 if unit == 'ms' else 1):.{digits}f}" == shown, f"{file}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_times_in_prose_name_the_file_they_are_from(page: Path) -> None:
    assert SECONDS.findall(prose(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_means_in_prose_are_in_the_results(page: Path) -> None:
    columns = ("rewrite", "rephrase", "neighbours", "known")
    measured = {f"{float(row[column]):.3f}" for row in MEASURED.values() for column in columns if row[column]}
    assert set(MEAN.findall(prose(page))) <= measured


def literal(node: ast.expr) -> str:
    """The text of a message, its values as ``…``; of a choice its first case."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore[misc]
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    return literal(node.body) if isinstance(node, ast.IfExp) else "…"


def messages() -> Iterator[tuple[str, str]]:
    """Each error of the package that is raised with words of its own, and these words."""
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.args:
                kind, said = getattr(errors, call.func.id, None), literal(call.args[-1])
                if isinstance(kind, type) and re.search(r"[A-Za-z]", said):
                    yield kind.__name__, said


@pytest.mark.parametrize(("error", "message"), sorted(set(messages())))
def test_each_message_has_its_cause_and_remedy(error: str, message: str) -> None:
    """A message is one of those in the first column of its section, in which ``...`` stands for anything."""
    section = getattr(errors, error).section
    text = (ROOT / errors.PAGE).read_text("utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    assert f"`{error}`" in text, f"{errors.PAGE} has no section {section!r} on {error}"
    shown = [
        entry for cell in re.findall(r"^\| (`.+?) \|", text, re.MULTILINE) for entry in re.findall(r"`([^`]+)`", cell)
    ]
    known = [".*".join(map(re.escape, entry.split("..."))) for entry in shown]
    said = message.replace("`", "")
    assert any(re.search(entry, said, re.DOTALL) for entry in known), f"{section} in {errors.PAGE} lacks: {message}"


def test_an_error_names_the_section_that_explains_it() -> None:
    text = (ROOT / errors.PAGE).read_text("utf-8")
    for kind in [KDPOError, *KDPOError.__subclasses__(), ModuleNotFoundError]:
        section = re.search(r'"(.+)"$', explained(kind(1, "what is wrong")))
        assert section is not None, kind
        assert f"\n## {section[1]}\n" in text, kind


def test_every_command_is_described_and_says_what_its_options_do() -> None:
    """The page describes commands; ``--help`` lists their options."""
    text = (ROOT / "docs/reference/command-line.md").read_text("utf-8")
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert re.search(rf"^## kdpo .*\b{name}\b", text, re.MULTILINE), name
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{name} {parameter.opts[0]}"


def test_every_schema_and_source_is_listed() -> None:
    from kdpo_editor.compare.run.datasets import KNOWN, SCHEMAS

    text = (ROOT / "docs/reference/datasets.md").read_text("utf-8")
    assert all(f"| `{name}` |" in text for name in KNOWN)
    for keys, _ in SCHEMAS.values():
        assert ", ".join(f"`{key}`" for key in keys) in text


def test_every_method_of_the_comparison_is_described() -> None:
    text = (ROOT / "docs/reference/rivals.md").read_text("utf-8")
    for file in (ROOT / "kdpo_editor/compare/conf/method").glob("*.yaml"):
        assert f"`{file.stem}`" in text, file.stem


CARDS = sorted(file for file in (ROOT / "hparams/KDPO").glob("*.yaml") if file.stem != "auto")


@pytest.mark.parametrize("file", CARDS, ids=lambda f: f.stem)
def test_model_cards_are_of_their_files(file: Path) -> None:
    hparams = KDPOHyperParams.from_hparams(file)
    text = (ROOT / "docs/reference/models.md").read_text("utf-8")
    (row,) = re.findall(rf"^\| `{re.escape(file.stem)}` \|(.+)\|$", text, re.MULTILINE)
    layer, rate, cycles, stop_loss, source, measured = (cell.strip() for cell in row.split("|"))
    assert int(layer.split()[0]) == hparams.layers[0]
    assert (float(rate), int(cycles), float(stop_loss)) == (hparams.lr, hparams.cycles, hparams.stop_loss)
    assert source.startswith("derived") is ("Not in the paper" in file.read_text("utf-8"))
    assert measured == "no" or file.stem == "kdpo-llama-knowedit"


def test_the_citation_file_names_the_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == kdpo_editor.__version__
    assert f"## {kdpo_editor.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    paper = citation["preferred-citation"]
    assert [a["family-names"] for a in paper["authors"]] == ["Rozner", "Battash", "Wolf", "Lindenbaum"]
    assert "arXiv:2406.09920" in str(paper["identifiers"])


@pytest.mark.parametrize("file", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda f: f.stem)
def test_issue_templates_have_what_github_needs(file: Path) -> None:
    template = yaml.safe_load(file.read_text("utf-8"))
    if file.stem == "config":
        return
    assert {"name", "description", "body"} <= template.keys()
    asked = [part for part in template["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked)
    assert all("label" in part["attributes"] for part in asked)


def test_continuous_integration_runs_the_oldest_python_that_is_supported_and_a_new_one() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    (job,) = workflow["jobs"].values()
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    oldest = config["options"]["python_requires"].removeprefix(">=")
    assert [oldest, "3.13"] == job["strategy"]["matrix"]["python"]
    (command,) = (step["run"] for step in job["steps"] if "run" in step)
    assert os.access(ROOT / command, os.X_OK)


# Docstrings -------------------------------------------------------------------------------------------------------


def public(tree: ast.Module) -> Iterator[tuple[str, ast.AST, str]]:
    """Name, node and docstrings around it of each public function, method and class."""

    def walk(body: list[ast.stmt], prefix: str, around: str) -> Iterator[tuple[str, ast.AST, str]]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                own = ast.get_docstring(node) or ""
                yield f"{prefix}{node.name}", node, around
                if isinstance(node, ast.ClassDef):
                    yield from walk(node.body, f"{prefix}{node.name}.", around + own)

    yield from walk(tree.body, "", "")


SHAPE = re.compile(r"``\[[^`]+\]``|\bscalar\b|any shape")
# Weights by their parameters' names have whichever shape the model gives them.
BY_NAME = re.compile(r"(?:dict|Mapping)\[str, (?:torch\.)?Tensor\]|Callable\[\[\], Tensor\]")


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(ROOT / "kdpo_editor")))
def test_public_names_have_docstrings_and_tensors_shapes(file: Path) -> None:
    tree = ast.parse(file.read_text("utf-8"))
    module = ast.get_docstring(tree)
    assert module, "the module has no docstring"
    for name, node, around in public(tree):
        own = ast.get_docstring(node)
        assert own, f"{name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            asked = [ast.unparse(a.annotation) for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation]
            asked += [ast.unparse(node.returns)] if node.returns else []
            if any(re.search(r"\bTensor\b", BY_NAME.sub("", annotation)) for annotation in asked):
                assert SHAPE.search(own + around), f"{name} takes or gives a tensor and says no shape"


def test_public_names_of_the_package_have_docstrings() -> None:
    for name in kdpo_editor.__all__:
        value = getattr(kdpo_editor, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
        else:
            assert isinstance(value, str)


# The site ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[docs]'")
    site = tmp_path / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**environment(), "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(https?:[^\s\">]+)", text)
        loaded += re.findall(r"<link(?![^>]+rel=\"?canonical)[^>]+href=\"?(https?:[^\s\">]+)", text)
        assert not loaded, page.name
        roles = re.findall(r":(?:class|func|meth|mod|data|attr):", text)
        assert not roles or page.name == "contributing.html", f"{page.name}: a cross-reference is as it was written"
