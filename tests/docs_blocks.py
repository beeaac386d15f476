"""Run the Python blocks of pages: ``python docs_blocks.py blocks.json``; test_docs.py calls it.

``blocks.json`` maps each page to its blocks. The blocks of a page share their names, as when typed one after the other,
and begin with the shipped model and its tokenizer as ``model`` and ``tok``. Every page has a folder with nothing but
``hparams`` in it. Standard output ends with a line of JSON: the traceback of each page that failed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

from kdpo_editor.hparams import settings_folder
from kdpo_editor.testbed import load_model


def run(blocks: list[str], folder: Path) -> str | None:
    folder.mkdir()
    (folder / "hparams").symlink_to(settings_folder().resolve())
    os.chdir(folder)
    model, tok = load_model()
    names = {"__name__": "__main__", "model": model, "tok": tok}
    try:
        for number, block in enumerate(blocks):
            exec(compile(block, f"block {number}", "exec"), names)
    except BaseException:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    file = Path(sys.argv[1]).resolve()
    failed = {}
    for number, (page, blocks) in enumerate(json.loads(file.read_text("utf-8")).items()):
        with contextlib.redirect_stdout(io.StringIO()):
            error = run(blocks, file.parent / f"page-{number}")
        if error is not None:
            failed[page] = error
    sys.stdout.write(f"\n{json.dumps(failed)}\n")
