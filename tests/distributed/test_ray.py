"""Extraction by Ray Data on a cluster of two nodes on this machine, compared bit for bit with a single process."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw

from brixel import BrixelError, BrixelFeatures, MapFolder
from brixel.distributed.cluster import on_an_actor, own_errors
from brixel.distributed.ray import FeatureActor, extract_dataset
from brixel.extraction import extract_files
from brixel.extraction.fitted_reduction import fit_reduction
from brixel.extraction.map_folder import verify
from brixel.extraction.sinks import SINKS
from brixel.images.find_images import find_images

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray and what it starts warn on their own account

COUNT, CORRUPT, BLOCK = 500, (3, 77, 150, 151, 299, 402, 499), 32
STORE_BYTES = 100 * 2**20  # of the object store: Ray takes a third of the memory otherwise

DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import ray, ray_recorder
from brixel.distributed.ray import extract_dataset
ray.init(address={address!r}, logging_level="error", log_to_driver=False)
ray.cloudpickle.register_pickle_by_value(ray_recorder)
options = dict(model={model!r}, sink={sink!r}, actors=2, block_images={block})
extract_dataset({images!r}, {out!r}, reduce=ray_recorder.Recorder({log!r}), **options)
"""


def draw(number: int) -> Image.Image:
    """A small drawing of one of two sizes, all different."""
    image = Image.new("RGB", ((56, 40), (40, 48))[number % 2], (number % 256, 80, 255 - number % 256))
    pen = ImageDraw.Draw(image)
    pen.ellipse((number % 20, 5, number % 20 + 18, 25), fill=(255, number % 256, 0))
    pen.line((0, number % 40, 50, 40 - number % 40), fill=(0, 0, 0), width=2)
    return image


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """500 images in two folders, seven of them cut short, empty or no image at all."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    for number in range(COUNT):
        path = folder / ("sub" if number % 3 else "") / f"{number:03}.{'jpg' if number % 2 else 'png'}"
        draw(number).save(path)
        if number in CORRUPT:
            path.write_bytes((b"", b"no image", path.read_bytes()[:150])[number % 3])
    return folder


@pytest.fixture(scope="module")
def model_folder(backbone_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu", short_side_px=28)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(photos, model_folder, tmp_path_factory) -> MapFolder:
    """What a single process makes of the images."""
    out = tmp_path_factory.mktemp("expected")
    model = BrixelFeatures.from_pretrained(model_folder, device="cpu")
    summary = extract_files(model, find_images([photos]), out)
    assert (summary.written, len(summary.failures)) == (COUNT - len(CORRUPT), len(CORRUPT))
    return MapFolder(out)


@pytest.fixture(scope="module")
def cluster():
    """A head with a CPU, and a node with one: of two actors, each has its own."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    node = {"object_store_memory": STORE_BYTES, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 1})
    started.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    ray.init(address=started.address, logging_level="error", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield started
    ray.shutdown()
    started.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def recorder(tmp_path):
    """A function for `reduce=` that writes down what was computed, and by which process."""
    import ray
    import ray_recorder

    ray.cloudpickle.register_pickle_by_value(ray_recorder)  # which the processes of the cluster do not find
    return ray_recorder.Recorder(str(tmp_path / "log"))


def assert_same(out: Path, expected: MapFolder) -> None:
    """The same images and maps as the single process, nothing twice, and every file as its manifest says."""
    found = MapFolder(out)
    assert sorted(found) == sorted(expected)
    for name, feature_map in found.items():
        other = expected[name]
        assert feature_map.features.numpy().tobytes() == other.features.numpy().tobytes()
        assert (feature_map.image_hw, feature_map.stride) == (other.image_hw, other.stride)
        assert feature_map.meta == other.meta
    assert verify(out) == []
    assert not (out / ".blocks").exists()
    listed = {found._files[name].file for name in found}
    endings = (".safetensors", ".parquet", ".zarr", ".tar")
    on_disk = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.suffix in endings}
    assert {file for file in on_disk if "failed-" not in file} == listed


def run(photos, out, model_folder, actors=2, **options):
    return extract_dataset(photos, out, model=model_folder, actors=actors, block_images=BLOCK, **options)


@pytest.mark.parametrize("sink", SINKS)
def test_every_sink_holds_what_a_single_process_computes(cluster, photos, model_folder, expected, tmp_path, sink):
    summary = run(photos, tmp_path / "out", model_folder, sink=sink)
    assert (summary.written, summary.skipped, len(summary.failures)) == (COUNT - 7, 0, 7)
    assert_same(tmp_path / "out", expected)
    if sink == "parquet":
        table = pq.read_table(tmp_path / "out" / "parquet")
        errors = [row for row in table.select(["image", "error"]).to_pylist() if row["error"] is not None]
        assert (table.num_rows, len({*table["image"].to_pylist()}), len(errors)) == (COUNT, COUNT, 7)
        assert {int(Path(row["image"]).stem) for row in errors} == set(CORRUPT)


def run_until(recorder, action, *arguments, **options):
    """Run in another thread, and do something once a hundred maps are computed; the main one may start processes."""
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(run, *arguments, reduce=recorder, **options)
        while recorder.count() < 100:
            assert not future.done(), future.result()
            time.sleep(0.01)
        action()
        return future.result()


def test_a_killed_actor(cluster, photos, model_folder, expected, tmp_path, recorder, record_property):
    def kill() -> None:
        os.kill(recorder.processes()[-1], signal.SIGKILL)

    summary = run_until(recorder, kill, photos, tmp_path / "out", model_folder, sink="shards")
    assert (summary.written, len(summary.failures)) == (COUNT - 7, 7)
    assert_same(tmp_path / "out", expected)
    assert len(recorder.processes()) == 3
    twice = recorder.count() - (COUNT - 7)
    record_property("summary", f"ray, actor killed: {twice} of {COUNT} images computed twice, in blocks of {BLOCK}")
    assert 0 <= twice <= BLOCK


def test_a_lost_node(cluster, photos, model_folder, expected, tmp_path, recorder, record_property):
    """Another one takes its place."""

    def replace() -> None:
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    summary = run_until(recorder, replace, photos, tmp_path / "out", model_folder, sink="parquet")
    assert (summary.written, len(summary.failures)) == (COUNT - 7, 7)
    assert_same(tmp_path / "out", expected)
    assert len(recorder.processes()) == 3
    twice = recorder.count() - (COUNT - 7)
    record_property("summary", f"ray, node lost: {twice} of {COUNT} images computed twice, in blocks of {BLOCK}")
    assert 0 <= twice <= BLOCK


def test_a_killed_driver(cluster, photos, model_folder, expected, tmp_path, recorder, record_property):
    names = {"photos": photos, "out": tmp_path / "out", "model": model_folder}
    program = DRIVER.format(
        tests=str(Path(__file__).parents[1]),
        address=cluster.address,
        images=str(names["photos"]),
        out=str(names["out"]),
        model=str(names["model"]),
        sink="webdataset",
        block=BLOCK,
        log=recorder.log,
    )
    driver = subprocess.Popen([sys.executable, "-c", program])
    end = time.monotonic() + 90
    while recorder.count() < 200 and time.monotonic() < end:
        assert driver.poll() is None
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    summary = run(photos, tmp_path / "out", model_folder, sink="webdataset", reduce=recorder)
    assert summary.written + summary.skipped == COUNT - 7
    assert summary.skipped >= 200 - 2 * BLOCK - 7
    assert len(summary.failures) == 7
    assert_same(tmp_path / "out", expected)
    twice = recorder.count() - (COUNT - 7)
    record_property("summary", f"ray, driver killed: {twice} of {COUNT} images computed twice, in blocks of {BLOCK}")
    assert 0 <= twice <= 2 * BLOCK


# ---------------------------------------------------------------- sources


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    draw(number).save(file, "PNG")
    return file.getvalue()[:100] if number == 5 else file.getvalue()


@pytest.fixture(scope="module")
def drawn(model_folder):
    """The maps of twelve drawings, the sixth of which is cut short."""
    model = BrixelFeatures.from_pretrained(model_folder, device="cpu")
    return {number: model.extract(draw(number)).features for number in range(12) if number != 5}


def assert_drawn(out: Path, drawn, name: str) -> None:
    maps = MapFolder(out)
    assert sorted(maps) == sorted(name.format(number) for number in drawn)
    for number, features in drawn.items():
        assert torch.equal(maps[name.format(number)].features, features)


@pytest.mark.parametrize("kind", ["plain", "structure"])
def test_parquet_with_a_column_of_bytes(cluster, model_folder, drawn, tmp_path, kind):
    names, contents = [f"d/{number}.png" for number in range(12)], [encoded(number) for number in range(12)]
    if kind == "plain":
        table = pa.table({"label": list(range(12)), "jpg": contents, "path": names})
    else:
        pairs = [{"bytes": content, "path": name} for name, content in zip(names, contents, strict=True)]
        table = pa.table({"image": pairs, "label": list(range(12))})
    pq.write_table(table, tmp_path / "photos.parquet", row_group_size=5)
    for again in (False, True)[: 1 + (kind == "plain")]:
        summary = run(tmp_path / "photos.parquet", tmp_path / "out", model_folder, actors=1, sink="parquet")
        assert (summary.written, summary.skipped) == ((0, 11) if again else (11, 0))
        assert [str(path) for path, _ in summary.failures] == ["d/5.png"]
    assert_drawn(tmp_path / "out", drawn, "d/{}.png")


def test_webdataset_tars(cluster, model_folder, drawn, tmp_path):
    """One of two tars is cut off in its last image."""
    for tar_number in range(2):
        with tarfile.open(tmp_path / f"t-{tar_number}.tar", "w") as tar:
            for number in range(12):
                member = tarfile.TarInfo(f"{number}.png")
                content = encoded(number)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                tar.addfile(tarfile.TarInfo(f"{number}.cls"), io.BytesIO(b""))
                if (tar_number, number) == (1, 11):
                    start = tar.offset
    content = (tmp_path / "t-1.tar").read_bytes()
    (tmp_path / "t-1.tar").write_bytes(content[: start - 1024 - 200])
    sources = [tmp_path / "t-0.tar", tmp_path / "t-1.tar"]
    summary = run(sources, tmp_path / "out", model_folder, actors=1)
    failed = {str(path): str(error) for path, error in summary.failures}
    assert sorted(failed) == ["t-0/5.png", "t-1.tar", "t-1/5.png"]
    assert "cannot be read to its end" in failed["t-1.tar"]
    maps = MapFolder(tmp_path / "out")
    assert len(maps) == summary.written == 11 + 10
    assert torch.equal(maps["t-1/4.png"].features, drawn[4])


def test_a_store_by_its_uri(cluster, model_folder, drawn, tmp_path):
    """The file system that a URI names is read through pyarrow, as object stores are."""
    (tmp_path / "photos" / ".hidden").mkdir(parents=True)
    for number in range(12):
        (tmp_path / "photos" / f"{number}.png").write_bytes(encoded(number))
    (tmp_path / "photos" / ".hidden" / "13.png").write_bytes(encoded(13))
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    for again in (False, True):
        summary = run(f"file://{tmp_path}/photos", tmp_path / "out", model_folder, actors=1)
        assert (summary.written, summary.skipped) == ((0, 11) if again else (11, 0))
        assert len(summary.failures) == 1
    assert_drawn(tmp_path / "out", drawn, "{}.png")


def test_the_actor_in_a_pipeline_of_ones_own(cluster, model_folder, drawn, tmp_path):
    import ray

    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    images = ray.data.read_binary_files(str(tmp_path), include_paths=True)
    pool = ray.data.ActorPoolStrategy(size=1)
    options = {"model": str(model_folder), "save_dtype": "float16"}
    rows = images.map_batches(FeatureActor, fn_constructor_kwargs=options, batch_size=5, compute=pool).take_all()
    assert len(rows) == 12
    for row in rows:
        number = int(Path(row["image"]).stem)
        if number == 5:
            assert "cannot be decoded" in row["error"]
            assert row["features"] is None
            continue
        features = np.asarray(row["features"], np.float16).reshape(row["shape"])
        np.testing.assert_array_equal(features, drawn[number].half().numpy())


# ---------------------------------------------------------------- what a hurried user gives


def test_a_machine_is_asked_what_it_computes_with(cluster):
    """As the driver does for the dtype on GPUs, here on a CPU; an error of ours comes back as it was."""
    import ray

    assert on_an_actor(ray, {"num_cpus": 1}, os.getpid) != os.getpid()
    with pytest.raises(BrixelError, match="^no model at '/absent/model'"), own_errors(ray):
        on_an_actor(ray, {"num_cpus": 1}, partial(BrixelFeatures.from_pretrained, "/absent/model"))


def test_errors_say_what_to_do(cluster, photos, model_folder, tmp_path):
    with pytest.raises(BrixelError, match="no model"):
        run(photos, tmp_path / "out", tmp_path / "absent")
    with pytest.raises(BrixelError, match="the cluster has room for 2 actors of cpus 1, and 9 were asked for"):
        extract_dataset(photos, tmp_path / "out", model=model_folder, actors=9)
    with pytest.raises(BrixelError, match="Parquet does not support|a Parquet file does not support bfloat16"):
        run(photos, tmp_path / "out", model_folder, sink="parquet", save_dtype=torch.bfloat16)
    assert not (tmp_path / "out" / "manifest-0.jsonl").exists()


def test_either_engine_continues_what_the_other_began(cluster, photos, model_folder, expected, tmp_path):
    model = BrixelFeatures.from_pretrained(model_folder, device="cpu")
    found = [pair for pair in find_images([photos]) if pair[0].parent.name != "sub"]
    first = extract_files(model, found, tmp_path / "out", sink="shards")
    second = run(photos, tmp_path / "out", model_folder, sink="shards")
    assert second.skipped == first.written > 100
    assert_same(tmp_path / "out", expected)
    third = extract_files(model, find_images([photos]), tmp_path / "out", sink="shards")
    assert (third.written, third.skipped) == (0, COUNT - len(CORRUPT))


def test_maps_are_reduced_by_the_basis_of_the_folder(cluster, photos, model_folder, expected, tmp_path):
    some = [pair for pair in find_images([photos]) if pair[0].name < "040"]
    out, model = tmp_path / "out", BrixelFeatures.from_pretrained(model_folder, device="cpu")
    images = [path for path, _ in some]
    with pytest.raises(BrixelError, match="pca:4,int8 needs a basis, which one process fits"):
        run(images, out, model_folder, reduce="pca:4,int8")
    reduce = fit_reduction(model, some, out, "pca:4,int8")
    run(images, out, model_folder, sink="shards", reduce="pca:4,int8")
    maps = MapFolder(out)
    assert len(maps) == 40 - sum(number < 40 for number in CORRUPT)
    for name, found in maps.items():
        whole = model.extract(next(path for path, relative in some if relative.name == name))
        assert torch.equal(found.features, reduce(whole).features)
        assert found.restored().embed_dim == whole.embed_dim
