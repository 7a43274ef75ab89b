"""The layout of DAVIS 2017, and what is not it."""

import numpy as np
import pytest
from PIL import Image
from videos import write_davis

from brixel import BrixelError
from brixel.evaluate import read_davis


@pytest.mark.parametrize("inner", ["", "DAVIS"])
@pytest.mark.parametrize("size", ["480p", "Full-Resolution"])
def test_videos_are_read_in_the_order_of_the_list(tmp_path, inner, size):
    write_davis(tmp_path / inner, ("cat", "boat"), size=size)
    data = read_davis(tmp_path, "val")
    assert [sequence.name for sequence in data.sequences] == ["cat", "boat"]
    sequence = data.sequences[0]
    assert [sample.image.name for sample in sequence.samples] == [f"{time:05d}.jpg" for time in range(4)]
    assert sequence.objects() == [1, 3]
    assert sequence.mask(1)[5].tolist() == [0] * 6 + [1] * 10 + [0] * 20
    assert len(data.first(1).sequences) == 1


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(BrixelError, match=r"the list of videos of DAVIS 2017 at .*val\.txt, which does not exist"):
        read_davis(tmp_path)
    write_davis(tmp_path)
    (tmp_path / "Annotations" / "480p" / "cat" / "00002.png").unlink()
    with pytest.raises(BrixelError, match=r"1 files of frames of .*cat are missing, the first .*00002\.png"):
        read_davis(tmp_path)
    listed = tmp_path / "ImageSets" / "2017" / "val.txt"
    for text, message in (
        ("dog\n", "a folder of a video of DAVIS 2017"),
        ("\n", "names no videos"),
        ("../../out\n", "out"),
    ):
        listed.write_text(text)
        with pytest.raises(BrixelError, match=message):
            read_davis(tmp_path)


def test_annotations_of_another_kind_are_named(tmp_path):
    write_davis(tmp_path, ("boat",))
    path = tmp_path / "Annotations" / "480p" / "boat" / "00000.png"
    sequence = read_davis(tmp_path).sequences[0]
    for pixels, message in (
        (np.full((24, 36), 255, np.uint8), "looks like DAVIS 2016"),
        (np.zeros((24, 36), np.uint8), "has no objects.*all its pixels are 0"),
        (np.zeros((24, 36, 3), np.uint8), "expected one whole number per pixel"),
        (np.ones((36, 24), np.uint8), "different aspects"),
    ):
        Image.fromarray(pixels).save(path)
        with pytest.raises(BrixelError, match=message):
            sequence.objects()


def test_two_frames_are_no_video(tmp_path):
    write_davis(tmp_path, ("boat",), count=2)
    with pytest.raises(BrixelError, match="has 2 frames; expected at least 3"):
        read_davis(tmp_path)
