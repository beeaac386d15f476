"""The command ``kdpo-compare`` as pip installs it: says which extra brings what the comparison needs."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the comparison; returns the exit status, 1 where a package that it needs is missing."""
    try:
        from .run.app import main as compare
    except ModuleNotFoundError as error:
        sys.stderr.write(f"kdpo-compare needs {error.name}: pip install 'kdpo-editor[compare]'\n")
        return 1
    return compare()
