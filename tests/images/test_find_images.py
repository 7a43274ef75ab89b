import os
from pathlib import Path

import pytest

from brixel import BrixelError
from brixel.images.find_images import describe_left_out, find_images, is_hidden


@pytest.fixture
def album(tmp_path):
    """a.png, b.JPG, sub/a.png, which are only looked for; a text file and a hidden image that do not count."""
    (tmp_path / "album" / "sub").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "sub/a.png", ".hidden.png", "notes.txt"):
        (tmp_path / "album" / name).touch()
    return tmp_path / "album"


def test_folders_keep_their_structure_and_files_go_by_name(album, image_path):
    found = find_images([album, image_path])
    assert [str(path) for _, path in found] == ["a.png", "b.JPG", "sub/a.png", "waves.png"]
    assert [path for path, _ in found] == [album / "a.png", album / "b.JPG", album / "sub/a.png", image_path]


def test_one_image_named_twice_counts_once(album):
    assert len(find_images([album, album / "a.png"])) == 3


def test_folders_within_each_other_count_their_images_once(album):
    paths = [str(path) for _, path in find_images([album, album / "sub"])]
    assert paths == ["a.png", "b.JPG", "sub/a.png"]


def test_wrong_paths_say_so(album, tmp_path):
    with pytest.raises(BrixelError, match="no image or folder at .*missing"):
        find_images([album / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BrixelError, match="no images in .*empty"):
        find_images([tmp_path / "empty"])
    with pytest.raises(BrixelError, match=r"would both be written as a\.png; extract them separately"):
        find_images([album / "a.png", album / "sub" / "a.png"])


def names(folder, *more):
    return [path.as_posix() for _, path in find_images([folder, *more])]


def touch(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()


def test_what_is_left_out_is_counted_by_ending_and_logged(album, caplog):
    touch(album, "a.PDF", "b.pdf", "sub/c.mov", "README", "sub/._a.png", ".git/x.pdf")
    os.symlink("nowhere.png", album / "gone.png")
    found = find_images([album])
    assert len(found) == 3
    expected = {".pdf": 2, ".mov": 1, ".txt": 1, "name without ending": 1, "broken link": 1}
    assert found.left_out == expected
    assert "6 files left out: 2 .pdf, 1 .mov, 1 .txt, 1 broken link, 1 name without ending" in caplog.messages
    assert find_images([album / "a.png"]).left_out == {}


def test_heic_files_that_cannot_be_read_are_left_out_with_a_hint():
    hint = "2 files left out: 2 .heic (HEIC needs the package pillow-heif: pip install 'brixel[images]')"
    assert describe_left_out({".heic": 2}) == hint
    assert describe_left_out({}) == ""
    many = {f".{letter}": 1 for letter in "abcdefghijkl"}
    assert describe_left_out(many).endswith("1 .h, 4 others")


def test_a_folder_of_other_files_says_what_is_in_it(tmp_path):
    touch(tmp_path, "a.pdf", "b.pdf", ".hidden.png")
    with pytest.raises(BrixelError, match=r"no images in .*\(2 files left out: 2 \.pdf\); looked for "):
        find_images([tmp_path])


def test_hidden_files_are_those_of_macos_too():
    assert all(is_hidden(Path(name)) for name in ("._a.png", ".a.png", "b/.a.png"))
    assert not any(is_hidden(Path(name)) for name in ("a.b.png", ".b/c.png"))


def test_linked_folders_are_followed(tmp_path):
    touch(tmp_path / "pool", "cat/0.png", "cat/1.png")
    touch(tmp_path / "subset", "own/a.png")
    os.symlink("../pool/cat", tmp_path / "subset" / "cat")
    os.symlink(tmp_path / "pool" / "cat", tmp_path / "subset" / "again")
    os.symlink(tmp_path / "subset" / "own" / "a.png", tmp_path / "subset" / "b.png")
    expected = ["again/0.png", "again/1.png", "b.png", "cat/0.png", "cat/1.png", "own/a.png"]
    assert names(tmp_path / "subset") == expected  # two names of one content are two images
    os.symlink("subset", tmp_path / "link")
    assert names(tmp_path / "link") == expected


def test_links_in_circles_end(tmp_path, caplog):
    touch(tmp_path, "a/0.png", "b/1.png")
    os.symlink("..", tmp_path / "a" / "up")
    os.symlink("../b", tmp_path / "a" / "b")
    os.symlink("../a", tmp_path / "b" / "a")
    os.symlink("self", tmp_path / "self")
    assert {"a/0.png", "b/1.png", "a/b/1.png", "b/a/0.png"} <= set(names(tmp_path))
    assert "circular link" in caplog.text
    assert "1 broken link" in caplog.text  # to itself


def test_folders_full_of_links_to_each_other_end(tmp_path):
    """Of twelve such folders there are more paths than could ever be listed."""
    folders = [tmp_path / "all" / f"{number}" for number in range(12)]
    for folder in folders:
        touch(folder, "a.png")
    for folder in folders:
        for other in folders:
            if other != folder:
                os.symlink(other, folder / other.name)
    found = find_images([tmp_path / "all"])
    assert {path.as_posix() for _, path in found} >= {f"{number}/a.png" for number in range(12)}
    assert len(found) < 12 * 100
    assert found.left_out["circular link"] > 0


def test_a_folder_that_cannot_be_read_is_counted(album, monkeypatch):
    plain_scandir = os.scandir

    def scandir(folder):
        if Path(folder).name == "sub":
            raise PermissionError(13, "Permission denied", folder)
        return plain_scandir(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    found = find_images([album])
    assert len(found) == 2
    assert found.left_out == {".txt": 1, "unreadable folder": 1}


def test_special_files_are_counted(album):
    os.mkfifo(album / "pipe.png")
    assert find_images([album]).left_out == {".txt": 1, "special file": 1}


def test_odd_names_are_found_in_a_fixed_order(tmp_path):
    odd = ["a\nb.png", "\x1b[2J.png", "ü.png", "-o.png", " .png", os.fsdecode(b"\xff.png"), "b.tar.png", "c.JPEG"]
    touch(tmp_path, *odd, "d/a.png", "d.png")
    expected = sorted([*odd, "d/a.png", "d.png"], key=lambda name: name.split("/"))
    assert names(tmp_path) == expected
