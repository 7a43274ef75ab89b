"""What a file is by its first bytes."""

import pytest

from brixel.utils.file_kinds import video_container


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x20ftypisom", "MP4 or QuickTime"),
        (b"\0\0\0\x14ftypqt  ", "MP4 or QuickTime"),
        (b"\0\0\0\x08wide\0\0\0\0mdat", "QuickTime"),
        (b"\x1a\x45\xdf\xa3\x01", "Matroska or WebM"),
        (b"RIFF\x10\0\0\0AVI LIST", "AVI"),
        (b"OggS\0\x02", "Ogg"),
        ((b"\x47" + bytes(187)) * 2 + b"\x47", "MPEG transport stream"),
        (b"\0\0\0\x20ftypavif", None),
        (b"\0\0\0\x20ftypheic", None),
        (b"\0\0\0\x20ftypmif1", None),
        (b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 ", None),
        (b"RIFF\x10\0\0\0WEBPVP8 ", None),
        (b"\xff\xd8\xff\xe0", None),
        (b"GIF89a", None),  # an image as well
        (b"", None),
    ],
)
def test_videos_are_told_from_images_in_the_same_containers(head: bytes, kind: str | None) -> None:
    assert video_container(head) == kind
