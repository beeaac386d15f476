"""The notebooks of ``examples/``: in step with their Python files, and saved as they ran.

``make examples`` runs them, and continuous integration does.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for package in ("ipykernel", "jupytext", "matplotlib", "nbclient"):
    pytest.importorskip(package, reason=f"the examples need {package}: pip install 'kdpo-editor[examples]'")

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(file.stem for file in EXAMPLES.glob("[0-9]*.py"))


@pytest.fixture(scope="module")
def runner() -> dict[str, Any]:
    """What ``examples/run.py`` defines."""
    return runpy.run_path(str(EXAMPLES / "run.py"))


def saved(name: str) -> Any:
    return json.loads((EXAMPLES / f"{name}.ipynb").read_text("utf-8"))


def outputs(name: str) -> list[Any]:
    return [output for cell in saved(name)["cells"] for output in cell.get("outputs", [])]


def test_there_are_six() -> None:
    assert len(NAMES) == 6
    assert sorted(file.stem for file in EXAMPLES.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_says_what_its_python_file_says(name: str, runner: dict[str, Any]) -> None:
    python = [(cell.cell_type, cell.source) for cell in runner["paired"](name).cells]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in saved(name)["cells"]] == python


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_was_run_once_from_top_to_bottom(name: str) -> None:
    counts = [cell["execution_count"] for cell in saved(name)["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert outputs(name)


@pytest.mark.parametrize("name", NAMES)
def test_saved_outputs_have_no_errors_or_warnings(name: str) -> None:
    noise = [o for o in outputs(name) if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert not noise


@pytest.mark.parametrize("name", NAMES)
def test_saved_outputs_name_no_folder_of_the_machine_they_were_made_on(name: str) -> None:
    said = json.dumps(
        [{k: v for k, v in o.get("data", o).items() if not k.startswith("image/")} for o in outputs(name)]
    )
    assert not re.findall(r"(?<![\w/])/\w[\w.-]*/|file://", said.replace("\\n", "\n"))


@pytest.fixture
def one_cell(tmp_path: Path) -> Callable[[str], list[str]]:
    """A copy of ``examples/run.py`` beside a notebook of one cell, and the command that runs it from there."""

    def command(code: str) -> list[str]:
        (tmp_path / "01_one.py").write_text(f"# %%\n{code}\n", "utf-8")
        return [sys.executable, shutil.copy(EXAMPLES / "run.py", tmp_path), "--to", str(tmp_path / "made")]

    return command


@pytest.mark.slow
def test_a_notebook_is_saved_with_its_outputs_where_it_is_told(
    one_cell: Callable[[str], list[str]], tmp_path: Path
) -> None:
    subprocess.run(one_cell("print(6 * 7)"), check=True, capture_output=True)
    assert not list(tmp_path.glob("*.ipynb"))
    (cell,) = json.loads((tmp_path / "made" / "01_one.ipynb").read_text("utf-8"))["cells"]
    assert "".join(cell["outputs"][0]["text"]) == "42\n"


@pytest.mark.slow
def test_a_cell_that_fails_ends_the_run_with_its_error(one_cell: Callable[[str], list[str]], tmp_path: Path) -> None:
    done = subprocess.run(one_cell("raise ValueError('the cell')"), check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ValueError: the cell" in re.sub(r"\x1b\[[\d;]*m", "", done.stderr)
    assert not list((tmp_path / "made").glob("*.ipynb"))
