"""Files that are written completely or not at all."""

import os
import stat
from pathlib import Path

import pytest

from brixel.errors import BrixelError
from brixel.utils.atomic_files import UNFINISHED, atomic_path, check_folder, write_text


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "map.npy") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".npy"
        assert UNFINISHED.fullmatch(temporary.name)
        temporary.write_text("new")
        assert not (tmp_path / "map.npy").exists()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("map.npy", "new")]


def test_an_error_leaves_the_earlier_file(tmp_path: Path) -> None:
    write_text(tmp_path / "note.txt", "naïve ✓")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "note.txt") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "naïve ✓"


def test_names_that_are_no_utf_8_are_escaped(tmp_path: Path) -> None:
    write_text(tmp_path / "note.txt", "a\udcff")
    assert (tmp_path / "note.txt").read_bytes() == b"a\\udcff"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_the_permissions_are_those_of_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "private") as temporary:
        temporary.chmod(0o600)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    check_folder(tmp_path / "note.txt")
    with pytest.raises(BrixelError, match=r"^no folder .*absent to write note\.txt into$"):
        check_folder(tmp_path / "absent" / "note.txt")
