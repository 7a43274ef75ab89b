import pytest

from brixel import BrixelError
from brixel.images.find_images import find_images


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
