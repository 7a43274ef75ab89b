import pytest
from PIL import Image

from brixel import MapFolder
from brixel.extraction import extract_files
from brixel.extraction.distributed import ProcessShare
from brixel.extraction.manifest import manifest_paths
from brixel.extraction.map_folder import verify
from brixel.images.find_images import find_images


def test_every_image_belongs_to_one_process():
    names = [f"{index}.jpg" for index in range(1000)]
    owners = [[rank for rank in range(7) if ProcessShare(rank, 7).contains(name)] for name in names]
    assert all(len(ranks) == 1 for ranks in owners)
    counts = [owners.count([rank]) for rank in range(7)]
    assert min(counts) > 100


@pytest.mark.slow
def test_a_restart_with_another_number_of_processes_repeats_no_image(model, tmp_path, monkeypatch):
    for index in range(12):
        Image.new("L", (28, 28), index).save(tmp_path / f"{index}.png")
    images, out = find_images([tmp_path]), tmp_path / "out"
    parts = {}
    for rank in (0, 2):  # of three: the second is late
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        parts[rank] = extract_files(model, images, out).written
    assert parts[0] > 0 < parts[2]
    assert len(MapFolder(out)) == parts[0] + parts[2] < 12
    summaries = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        summaries.append(extract_files(model, images, out))
    assert sum(summary.written for summary in summaries) == 12 - parts[0] - parts[2]
    assert sum(summary.skipped for summary in summaries) == parts[0] + parts[2]
    assert len(MapFolder(out)) == 12
    assert verify(out) == []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert extract_files(model, images, out, overwrite=True).written == 12
    assert [path.name for path in manifest_paths(out)] == ["manifest-0.jsonl"]
