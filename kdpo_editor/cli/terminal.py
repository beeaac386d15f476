"""What the command ``kdpo`` writes to the terminal: JSON lines, text, tables and messages."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm


def columns(heads: list[str], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """A table as wide as the terminal, cells wrapped."""
    width = max((shutil.get_terminal_size((120, 24)).columns - 4) // len(heads), 12)
    for row in [tuple(heads), tuple("-" * width for _ in heads), *rows]:
        cells = [textwrap.wrap(plain(cell), width) or [""] for cell in row]
        for i in range(max(map(len, cells))):
            yield "  ".join((cell[i] if i < len(cell) else "").ljust(width) for cell in cells).rstrip()


def plain(text: str) -> str:
    """``text`` without what would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def put(record: dict[str, Any]) -> None:
    """One JSON line on standard output."""
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
