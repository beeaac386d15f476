"""Make the notebooks of this folder from their Python files, run them, and save them with their outputs.

python examples/run.py [--to FOLDER] [--jobs N] [01_quickstart ...]

A cell that fails ends it with the cell's error. With ``--to`` the notebooks are saved there, and those here are left.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
NAMES = sorted(file.stem for file in HERE.glob("[0-9]*.py"))
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def paired(name: str) -> nbformat.NotebookNode:
    """The notebook that ``name.py`` makes, without outputs; the same file always gives the same notebook."""
    notebook = jupytext.read(HERE / f"{name}.py")
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in ``folder``; raises ``nbclient.exceptions.CellExecutionError`` where one fails."""
    # The kernel finds the package that this process would; tqdm asks for widgets that nothing here needs.
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore:IProgress not found"}
    client = NotebookClient(notebook, timeout=3600, record_timing=False, coalesce_streams=True)
    client.execute(cwd=str(folder), env=env)
    notebook.metadata["language_info"] = {"name": "python"}


def make(name: str, to: Path) -> str:
    """Save the notebook of ``name.py`` with its outputs; returns how long that took."""
    start, notebook = time.perf_counter(), paired(name)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    nbformat.write(notebook, to / f"{name}.ipynb")
    return f"{name}: {time.perf_counter() - start:.0f} s\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help="which; all of them if none is named")
    parser.add_argument("--to", type=Path, default=HERE, metavar="FOLDER", help="where they are saved; here by default")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="how many at a time")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.jobs) as pool:
        for made in as_completed([pool.submit(make, name, args.to) for name in args.names]):
            sys.stdout.write(made.result())
            sys.stdout.flush()


if __name__ == "__main__":
    main()
