"""Coverage-guided fuzzing of the same readers, where atheris is installed: it looks for its own way into the code.

python fuzz_atheris.py -runs=20000
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["kdpo_editor.edits.storage", "kdpo_editor.edits.manifest", "kdpo_editor.cli.request_file"]
):
    from test_fuzz import Samples, use_delta, use_ledger

    from kdpo_editor.cli.request_file import read_lines

SAMPLES = Samples(Path(tempfile.mkdtemp()))
FILES = [SAMPLES.manifest, SAMPLES.tensors, SAMPLES.journal]


def check(data: bytes) -> None:
    """The first byte chooses the file; the rest is put over a piece of it, or in its place."""
    if len(data) < 4:
        return
    which, at, rest = data[0], int.from_bytes(data[1:3], "little"), data[3:]
    if which % 4 == 3:
        read_lines(rest.splitlines(keepends=True), "f")
        return
    path = FILES[which % 4]
    sound = SAMPLES.sound[path]
    at %= len(sound) + 1
    path.write_bytes(rest if which & 4 else sound[:at] + rest + sound[at + (len(rest) if which & 8 else 0) :])
    try:
        use_delta(SAMPLES)
        use_ledger(SAMPLES)
    finally:
        path.write_bytes(sound)


if __name__ == "__main__":
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
