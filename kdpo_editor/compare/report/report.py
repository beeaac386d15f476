"""Tables, figures and a page from the result folders of a comparison: the command ``kdpo-report``."""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ...errors import KDPOError, explained
from ...whole_files import write_file

if TYPE_CHECKING:
    from .result_folder import ResultFolder

FORMATS = ("terminal", "csv", "markdown", "latex", "figures", "html")
EPILOG = """\
FOLDER is searched for result folders at any depth. Unfinished and damaged ones are named and left out.
Written below DIR: tidy.csv, wide.csv, report.md, tables.tex, figures/*.png and *.svg, report.html.
Exit status: 0 when a report was made, even if some result folders were left out; 1 when there is nothing to
report or a file cannot be written; 2 for wrong usage.
"""


def main(argv: list[str] | None = None) -> int:
    """The command ``kdpo-report``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="kdpo-report",
        description="Tables, radar plots, curves and an HTML page from the results of a comparison of editing methods.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the results are")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default FOLDER/report)")
    parser.add_argument(
        "--format", nargs="+", choices=(*FORMATS, "all"), default=["all"], help="what to make (default all)"
    )
    parser.add_argument(
        "--partial", action="store_true", help="show the complete checkpoints of unfinished or failed runs too"
    )
    args = parser.parse_args(argv)
    formats = set(FORMATS if "all" in args.format else args.format)

    def act() -> None:
        for path in report(args.folder, args.out or args.folder / "report", formats, args.partial):
            if path.suffix != ".svg":  # each figure's PNG stands for both
                say(f"wrote {path}")

    return exit_status("kdpo-report", act)


def exit_status(program: str, act: Callable[[], None]) -> int:
    """Run ``act``: 0, or 1 or 130 where it failed or was interrupted, which standard error then says."""
    try:
        act()
    except ModuleNotFoundError as error:
        sys.stderr.write(f"{program} needs {error.name}: pip install 'kdpo-editor[compare]'\n")
        return 1
    except (KDPOError, OSError) as error:
        sys.stderr.write(f"{program}: {explained(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        return 130
    return 0


def report(folder: Path, out: Path, formats: set[str], partial: bool = False) -> list[Path]:
    """Read the cells below ``folder``, write ``formats`` (of ``FORMATS``) below ``out``, and return the files written.

    Raises :class:`~kdpo_editor.errors.ResultsError` where there is nothing to show, OSError where a file cannot be
    written.
    """
    from . import tables
    from .means import tidy, wide
    from .reading import read_cells

    cells, left_out = read_cells(folder, partial)
    means = tidy(cells)
    all_tables = tables.tables(means)
    notes = _notes(cells)
    files: dict[str, str | bytes] = {}
    if "terminal" in formats:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
        parts = [tables.as_text(table, width) for table in all_tables if not table.detail]
        say("\n\n".join([*parts, tables.LEGEND, *notes]))
    if "csv" in formats:
        files |= {"tidy.csv": means.to_csv(index=False), "wide.csv": wide(means).to_csv(index=False)}
    if "markdown" in formats:
        files["report.md"] = tables.as_markdown(all_tables, [*notes, *(f"Left out {n}: {why}" for n, why in left_out)])
    if "latex" in formats:
        files["tables.tex"] = tables.as_latex(all_tables)
    if formats & {"figures", "html"}:
        from .figures import pictures
        from .page import page

        drawn = pictures(means)
        if "figures" in formats:
            for picture in drawn:
                name = "figures/" + "-".join(map(slug, picture.name))
                files |= {f"{name}.png": picture.png, f"{name}.svg": picture.svg}
        if "html" in formats:
            title = f"Comparison of editing methods: {folder.resolve().name}"
            files["report.html"] = page(title, cells, left_out, all_tables, drawn, notes)

    for name, reason in left_out:
        sys.stderr.write(_printable(f"Left out {name}: {reason}\n", sys.stderr))
    written = [write(out / name, content) for name, content in files.items()]
    return written


def slug(name: str) -> str:
    """``name`` as part of a file's name: ASCII, no separators; different names stay different."""
    safe = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-._")[:60]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}".lstrip("-")


def _notes(cells: Sequence[ResultFolder]) -> list[str]:
    """What the runs noted, and which runs are shown in part, each once per label."""
    notes = [f"{cell.label}: {note}" for cell in cells for note in cell.manifest["notes"]]
    notes += [f"{cell.label}: not finished, {cell.name}" for cell in cells if cell.partial]
    return list(dict.fromkeys(notes))


def write(path: Path, content: str | bytes) -> Path:
    """Write a file, with the folders above it; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    write_file(path, data, synced=False)
    return path


def _printable(text: str, stream: TextIO) -> str:
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str) -> None:
    """Write a line to standard output, whatever its encoding."""
    sys.stdout.write(_printable(f"{text}\n", sys.stdout))


if __name__ == "__main__":
    sys.exit(main())
