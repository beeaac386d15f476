"""The notebooks of ``examples/``: in step with their Python files, saved as they ran, and running."""

from __future__ import annotations

import json
import re
import runpy
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


def test_there_are_five() -> None:
    assert len(NAMES) == 5
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


# What makes a notebook's run short; ``make examples`` runs them whole.
SHORTER = {
    "02_inside_kdpo": {"records[:40]": "records[:4]"},
    "03_side_by_side": {"n_edits=3": "n_edits=2", "characters=50000": "characters=10000"},
    "04_a_hundred_edits": {
        "(1, 10, 25, 50, 100)": "(1, 2, 4)",
        "records[:100], records[-60:]": "records[:4], records[-10:]",
        "range(0, 100, 25)": "range(4)",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_an_empty_folder(name: str, runner: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("easyeditor", reason="the examples edit through EasyEdit")
    notebook = runner["paired"](name)
    for long, short in SHORTER.get(name, {}).items():
        assert any(long in cell.source for cell in notebook.cells), long
        for cell in notebook.cells:
            cell.source = cell.source.replace(long, short)
    runner["execute"](notebook, tmp_path)
    assert not [o for cell in notebook.cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]
