"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import no_file_longer_than

from kdpo_editor.errors import StorageError
from kdpo_editor.whole_files import appearing, write_file


@pytest.mark.parametrize("synced", [True, False])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path, synced: bool) -> None:
    file = tmp_path / "a.json"
    write_file(file, b"before", synced)
    with no_file_longer_than(10), pytest.raises(StorageError, match=r"cannot write .*a\.json: File too large"):
        write_file(file, b"longer than before", synced)
    assert [(left.name, left.read_bytes()) for left in tmp_path.iterdir()] == [("a.json", b"before")]


def test_whoever_reads_meanwhile_reads_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_file(file, b"before")
    with appearing(file) as part:
        part.write_bytes(b"aft")
        assert file.read_bytes() == b"before"
        part.write_bytes(b"after")
    assert file.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_while_writing_is_raised_as_it_is(tmp_path: Path) -> None:
    def write() -> None:
        with appearing(tmp_path / "a.json") as part:
            part.write_bytes(b"aft")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*nowhere/a\.json: No such file"):
        write_file(tmp_path / "nowhere" / "a.json", b"")
