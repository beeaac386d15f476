"""What the command ``kdpo`` writes to the terminal: JSON lines, text, tables and messages."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output, as wide as the terminal or, elsewhere, 120 columns; cells are wrapped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(*heads, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in rows:
        shown.add_row(*(Text(plain(cell)) for cell in row))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(shown)


def plain(text: str) -> str:
    """``text`` without what would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def put(record: dict[str, Any]) -> None:
    """One JSON line on standard output."""
    from tqdm import tqdm

    line = json.dumps(record, ensure_ascii=False)
    with tqdm.external_write_mode(file=sys.stdout):
        sys.stdout.write("".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in line) + "\n")
        sys.stdout.flush()


def say(text: str) -> None:
    """One line on standard output."""
    sys.stdout.write(plain(text) + "\n")


def complain(text: str) -> None:
    """A message, of a line or more, on standard error."""
    lines = (plain(line) for line in text.splitlines())
    sys.stderr.write("kdpo: " + "\n".join(lines) + "\n")
