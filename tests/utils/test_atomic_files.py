"""Files that appear whole or not at all, also after a power cut."""

import os

import pytest

from brixel.utils import atomic_files
from brixel.utils.atomic_files import atomic_path, write_text


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut leaves the earlier file or the new one, and never an empty one."""
    order = []
    genuine = atomic_files.os.replace
    monkeypatch.setattr(atomic_files, "_to_disk", lambda path: order.append(path))
    monkeypatch.setattr(atomic_files.os, "replace", lambda a, b: (order.append("renamed"), genuine(a, b)))
    with atomic_path(tmp_path / "state.pt", durable=True) as temporary:
        temporary.write_bytes(b"new")
    assert order == [temporary, "renamed", tmp_path]
    order.clear()
    write_text(tmp_path / "settings.toml", "a = 1\n")
    assert [each for each in order if each != "renamed"][1:] == [tmp_path]
    order.clear()
    with atomic_path(tmp_path / "map.npy") as temporary:
        temporary.write_bytes(b"map")
    assert order == ["renamed"]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="names of open files are read from /proc")
def test_fsync_is_called_for_the_file_and_its_folder(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic_files.os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    write_text(tmp_path / "a.txt", "text")
    assert synced[-1] == str(tmp_path)
    assert synced[0].endswith(".part.txt")
