import pytest

from brixel import BrixelError
from brixel.extraction import extract_files
from brixel.extraction.map_folder import verify
from brixel.images.find_images import find_images


def test_verify_finds_files_that_changed_or_are_missing(model, album, tmp_path):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out)
    assert verify(out) == []
    path = out / "sub" / "a.png.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (out / "b.JPG.safetensors").unlink()
    assert sorted(line.partition(": ")[2][:19] for line in verify(out)) == ["cannot be read (No ", "changed or damaged"]
    with pytest.raises(BrixelError, match="holds no manifest: expected a folder that `brixel extract` wrote"):
        verify(album)
