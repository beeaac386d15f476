"""What cells that run at the same time would compute twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock


@contextlib.contextmanager
def one_at_a_time(cache: str | Path, name: str) -> Iterator[None]:
    """Hold the lock ``name`` of the folder ``cache``; other processes wait for it. A killed one lets go of it.

    Where nothing can be written there is no lock, since nothing could be shared either.
    """
    lock = FileLock(Path(cache) / "locks" / name)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError, NotImplementedError):
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock)
        yield
