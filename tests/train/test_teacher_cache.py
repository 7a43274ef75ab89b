import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, files_of
from PIL import Image
from torch.utils.data import DataLoader

from brixel import BrixelError
from brixel.errors import DamagedFileError
from brixel.images.crops import CropSettings
from brixel.train import teacher_cache as cache_module
from brixel.train.data import CropDataset, find_training_images
from brixel.train.teacher_cache import TeacherCache
from brixel.utils import atomic_files

T, COUNT = 32, 7
CROP_BYTES = 2 * (6 * 4 * 4 + 3 * 8 * 8)
TEACHER_ID = {"backbone": {"width": 6, "patch_px": 8}, "fingerprint": [1.0, 0.5]}


class Teacher:
    """(B, 3, T, T) -> (B, 6, T/8, T/8); counts its crops, and fails after ``fails_in`` of them."""

    def __init__(self, fails_in=None):
        self.crops, self.fails_in = 0, fails_in

    def __call__(self, pixels):
        if self.fails_in is not None and self.crops >= self.fails_in:
            raise RuntimeError("interrupted")
        self.crops += len(pixels)
        return F.avg_pool2d(torch.cat([pixels, pixels**2], dim=1), 8)


@pytest.fixture
def images(tmp_path):
    """Four images and a damaged one."""
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(4):
        pixels = random.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "bad.png").write_bytes(b"not an image")
    return folder


def dataset_of(folder, **settings):
    settings = CropSettings(T, **{"max_zoom": 1.2, **settings})
    return CropDataset(find_training_images([folder]), settings, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))


def build(folder, images, teacher=None, **changes):
    options = {"dataset": dataset_of(images), "count": COUNT, "teacher_id": TEACHER_ID, **changes}
    return TeacherCache.build_or_open(folder, teacher=teacher or Teacher(), **options)


def crops_done(folder):
    return json.loads((folder / "done.json").read_text())["crops"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_items_are_the_rounded_output_of_the_teacher(tmp_path, images, dtype, rounding, batch_size, workers):
    steps = []
    cache = build(
        *(tmp_path / "new" / "cache", images),
        **{"dtype": dtype, "batch_size": batch_size, "workers": workers},
        progress=lambda *step: steps.append(step),
    )
    dataset, teacher = dataset_of(images), Teacher()
    assert len(cache) == COUNT
    for position in range(COUNT):
        student, features = cache[position]
        expected = teacher(dataset[position].teacher[None])[0]
        assert student.dtype == features.dtype == torch.float32
        torch.testing.assert_close(features, expected, rtol=rounding, atol=1e-7)
        assert torch.equal(features, expected.to(dtype).float())
        torch.testing.assert_close(student, dataset[position].student, rtol=2**-11, atol=1e-7)
    assert steps == [(min(done, COUNT), COUNT) for done in range(batch_size, COUNT + batch_size, batch_size)]
    assert cache.skipped == (str(images / "bad.png"),)
    assert cache.dtype == dtype


def test_indices_work_as_for_a_list(tmp_path, images):
    cache = build(tmp_path / "cache", images)
    assert torch.equal(cache[-1][1], cache[COUNT - 1][1])
    for index in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError):
            cache[index]
    assert len(list(cache)) == COUNT


def test_an_item_is_a_copy(tmp_path, images):
    cache = build(tmp_path / "cache", images)
    before = files_of(tmp_path / "cache")
    for tensor in cache[0]:
        tensor.zero_()
    assert cache[0][1].abs().sum() > 0
    assert files_of(tmp_path / "cache") == before


def test_the_global_random_state_is_left_alone(tmp_path, images):
    before = torch.get_rng_state()
    build(tmp_path / "cache", images)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_complete_cache_opens_without_the_teacher(tmp_path, images):
    folder = tmp_path / "cache"
    first = build(folder, images)
    before = files_of(folder)
    idle = Teacher(fails_in=0)
    for cache in (build(folder, images, idle), TeacherCache(folder)):
        assert all(torch.equal(a, b) for i in range(COUNT) for a, b in zip(cache[i], first[i], strict=True))
        assert cache.skipped == first.skipped
    assert files_of(folder) == before


def test_workers_open_it_by_its_path(tmp_path, images):
    cache = build(tmp_path / "cache", images)
    assert len(pickle.dumps(cache)) < 300
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again[3][1], cache[3][1])
    read = list(DataLoader(cache, batch_size=3, num_workers=2))
    assert torch.equal(torch.cat([student for student, _ in read]), torch.stack([cache[i][0] for i in range(COUNT)]))
    assert torch.equal(torch.cat([teacher for _, teacher in read]), torch.stack([cache[i][1] for i in range(COUNT)]))


def test_a_read_only_folder_can_be_opened(tmp_path, images):
    folder = tmp_path / "cache"
    expected = build(folder, images)[0][1]
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert torch.equal(build(folder, images)[0][1], expected)
    finally:
        folder.chmod(0o755)


# ---------------------------------------------------------------- interrupted


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_interrupted_build_resumes(tmp_path, images, batch_size):
    build(tmp_path / "whole", images, batch_size=batch_size)
    folder = tmp_path / "cache"
    with pytest.raises(RuntimeError, match="interrupted"):
        build(folder, images, Teacher(fails_in=4), batch_size=batch_size)
    assert crops_done(folder) == 4
    with pytest.raises(BrixelError, match="has 4 of 7 crops: finish building it"):
        TeacherCache(folder)
    teacher, steps = Teacher(), []
    build(folder, images, teacher, batch_size=batch_size, progress=lambda *step: steps.append(step[0]))
    assert teacher.crops == COUNT - 4
    assert steps[0] == 4 + batch_size
    assert files_of(folder) == files_of(tmp_path / "whole")


def test_interrupted_before_the_first_crop(tmp_path, images):
    with pytest.raises(RuntimeError):
        build(tmp_path / "cache", images, Teacher(fails_in=0))
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".header.1234.part.json").write_text("{")  # what a kill leaves
    assert len(build(tmp_path / "cache", images)) == COUNT


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = {paths!r}
from test_teacher_cache import Teacher, build
from brixel.train import teacher_cache as cache

folder, images = Path({folder!r}), Path({images!r})

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def countdown(number, call, before):
    left = [number]
    def counted(*arguments, **named):
        left[0] -= 1
        if left[0] == 0 and before:
            die()
        result = call(*arguments, **named)
        if left[0] == 0:
            die()
        return result
    return counted

def half_written(path, rows, start):
    if start == 3 and path.name == "student.bin":
        with open(path, "r+b") as file:
            file.seek(start * rows[0].nbytes)
            file.write(b"x" * 11)
        die()
    return whole_write(path, rows, start)

teacher, fsync, replace, whole_write = Teacher(), os.fsync, os.replace, cache._write
class Logged:
    def __call__(self, pixels):
        with open({log!r}, "a") as log:
            log.write("call\\n")
        return teacher(pixels)

PLANS = [  # moments at which the process is killed, one after the other
    lambda: setattr(os, "replace", countdown(1, replace, True)),  # before the header exists
    lambda: setattr(os, "replace", countdown(1, replace, False)),  # with nothing but a header
    lambda: setattr(os, "fsync", countdown(1, fsync, True)),  # in the first file of the first crop
    lambda: setattr(os, "fsync", countdown(6, fsync, False)),  # crop 1 written, but not recorded
    lambda: setattr(os, "replace", countdown(2, replace, True)),  # the record written, but not renamed
    lambda: setattr(os, "replace", countdown(1, replace, False)),  # crop 2 recorded
    lambda: setattr(cache, "_write", half_written),  # in the middle of crop 3
    lambda: setattr(teacher, "crops", 0) or setattr(Teacher, "__call__", countdown(2, Teacher.__call__, True)),
]
for plan in PLANS:
    child = os.fork()
    if child == 0:
        plan()
        build(folder, images, Logged())
        os._exit(1)  # not killed
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (plan, status)
    record = folder / "done.json"
    print(record.read_text().split(",")[0].split()[-1] if record.exists() else 0, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills its children with SIGKILL")
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, images):
    folder, log = tmp_path / "cache", tmp_path / "log"
    paths = [os.path.dirname(__file__), str(ROOT / "tests")]
    program = KILLED.format(paths=paths, folder=str(folder), images=str(images), log=str(log))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert [int(line) for line in result.stdout.split()] == [0, 0, 0, 1, 2, 3, 3, 4]
    calls = len(log.read_text().split())
    assert calls == 4 + 7, "every kill but the one after recording lost a call"
    teacher = Teacher()
    build(folder, images, teacher)
    assert teacher.crops == COUNT - 4
    build(tmp_path / "whole", images)
    ours = {name: data for name, data in files_of(folder).items() if not name.startswith(".")}
    assert ours == files_of(tmp_path / "whole")


# ---------------------------------------------------------------- another content of the folder


def of_other_settings(**changes):
    def change(options, folder):
        options["dataset"] = dataset_of(folder, **changes)

    return change


def with_option(**changes):
    return lambda options, folder: options.update(changes)


def with_another_image(options, folder):
    shutil.copy(folder / "0.png", folder / "9.png")
    options["dataset"] = dataset_of(folder)


def with_an_image_renamed(options, folder):
    (folder / "0.png").rename(folder / "00.png")
    options["dataset"] = dataset_of(folder)


def with_an_image_changed(options, folder):
    Image.new("RGB", (40, 40)).save(folder / "2.png")


def with_another_teacher_px(options, folder):
    options["dataset"].settings = replace(options["dataset"].settings, teacher_px=64)


def with_another_deviation(options, folder):
    options["dataset"].std = (0.2, 0.2, 0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_option(teacher_id="another"), "teacher is {'backbone': {'width': 6, 'patch_px': 8}, 'fingerprint': "),
        (
            with_option(teacher_id={**TEACHER_ID, "fingerprint": [1.0, 0.25]}),
            "teacher.fingerprint is [1.0, 0.5] in the folder, [1.0, 0.25] now. Name",
        ),
        (with_option(teacher_id={**TEACHER_ID, "new": None}), "teacher.new is nothing in the folder, None now. Name"),
        (with_option(count=8), "count is 7 in the folder, 8 now. Name"),
        (with_option(dtype=torch.bfloat16), "dtype is float16 in the folder, bfloat16 now. Name"),
        (of_other_settings(max_zoom=1.3), "crops.max_zoom is 1.2 in the folder, 1.3 now. Name"),
        (of_other_settings(flip=False), "crops.flip is True in the folder, False now. Name"),
        (of_other_settings(random=False), "crops.random is True in the folder, False now. Name"),
        (
            of_other_settings(seed=1, small="skip"),
            "crops.small is upsample in the folder, skip now; crops.seed is 0 in the folder, 1 now. Name",
        ),
        (with_another_teacher_px, "crops.teacher_px is 32 in the folder, 64 now. Name"),
        (with_another_deviation, "crops.std is [0.2, 0.2, 0.3] in the folder, [0.2, 0.2, 0.2] now. Name"),
        (with_another_image, "pictures.number is 5 in the folder, 6 now; pictures.bytes is"),
        (with_an_image_renamed, "pictures.names_and_sizes is"),
        (with_an_image_changed, "pictures.bytes is"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_a_cache_of_something_else_is_left_alone(tmp_path, images, change, message, complete):
    folder = tmp_path / "cache"
    if complete:
        build(folder, images)
    else:
        with pytest.raises(RuntimeError):
            build(folder, images, Teacher(fails_in=2))
    before = files_of(folder)
    options = {"dataset": dataset_of(images)}
    change(options, images)
    with pytest.raises(BrixelError) as caught:
        build(folder, images, Teacher(fails_in=0), **options)
    assert f"{folder} holds another teacher cache: {message}" in str(caught.value)
    assert str(caught.value).endswith(" now. Name another folder, or delete this one")
    assert files_of(folder) == before


def test_images_may_move_and_be_read_with_other_batches_and_workers(tmp_path, images):
    folder = tmp_path / "cache"
    build(folder, images)
    moved = images.rename(tmp_path / "elsewhere")
    build(folder, moved, Teacher(fails_in=0), batch_size=2, workers=2)


def test_other_folders_are_left_alone(tmp_path, images):
    before = files_of(images)
    for folder in (images, images / "0.png"):
        with pytest.raises(BrixelError, match="exists and is not a teacher cache: name a new or an empty folder"):
            build(folder, images, Teacher(fails_in=0))
    assert files_of(images) == before


def damaged(name, data):
    return lambda folder: (folder / name).write_bytes(data((folder / name).read_bytes()))


def edited(name, **fields):
    return damaged(name, lambda data: json.dumps({**json.loads(data), **fields}).encode())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged("header.json", lambda data: data[:40]), "holds no intact teacher cache .*header.json is not JSON"),
        (damaged("header.json", lambda data: b"{}"), "holds no intact teacher cache .*lacks format_version"),
        (damaged("header.json", lambda data: b"[]"), "holds no intact teacher cache .*header.json is ..; expected"),
        (
            damaged("header.json", lambda data: data.replace(b'"format_version": 1', b'"format_version": 2')),
            "format_version in header.json is 2; expected 1, which this version reads.*build one in another folder",
        ),
        (edited("header.json", fingerprint=None), "fingerprint in header.json is None; expected a table"),
        (edited("header.json", fingerprint={"dtype": "float16"}), "count in fingerprint is None"),
        (edited("header.json", fingerprint={"count": "x", "dtype": "float16"}), "count in fingerprint is 'x'"),
        (edited("header.json", fingerprint={"count": 2**70, "dtype": "float16"}), "count in fingerprint is 1180"),
        (edited("header.json", fingerprint={"count": 7, "dtype": "int8"}), "dtype in fingerprint is 'int8'"),
        (edited("header.json", teacher_shape=[None]), "teacher_shape in header.json is .None.; expected three"),
        (edited("header.json", student_shape=[2**62] * 3), "student_shape in header.json is .461"),
        (edited("header.json", student_shape=[3, 8, 8, 1]), "student_shape in header.json is .3, 8, 8, 1.; expected"),
        (edited("header.json", more=1), "header.json has the unknown field 'more'"),
        (edited("done.json", crops=1e999), "done.json is not JSON"),
        (edited("done.json", crops=-1), "crops in done.json is -1"),
        (edited("done.json", crops=True), "crops in done.json is True"),
        (edited("done.json", skipped={"a": 1}), "skipped in done.json is .'a': 1.; expected a list of paths"),
        (damaged("done.json", lambda data: b"[" * 100000), "done.json is nested deeper"),
        (damaged("done.json", lambda data: b""), "holds no intact teacher cache"),
        (damaged("teacher.bin", lambda data: data[:-2]), "teacher.bin is missing or has the wrong size"),
        (damaged("student.bin", lambda data: data + b"xx"), "student.bin is missing or has the wrong size"),
        (lambda folder: (folder / "student.bin").unlink(), "student.bin is missing"),
    ],
)
def test_damage_is_named(tmp_path, images, damage, message):
    folder = tmp_path / "cache"
    build(folder, images)
    damage(folder)
    for open_cache in (lambda: TeacherCache(folder), lambda: build(folder, images, Teacher(fails_in=0))):
        with pytest.raises(DamagedFileError, match=message):
            open_cache()


def test_a_missing_cache_is_named(tmp_path):
    with pytest.raises(BrixelError, match="nowhere holds no intact teacher cache .*header.json"):
        TeacherCache(tmp_path / "nowhere")


def test_a_build_whose_files_were_truncated_does_not_resume(tmp_path, images):
    with pytest.raises(RuntimeError):
        build(tmp_path / "cache", images, Teacher(fails_in=3))
    os.truncate(tmp_path / "cache" / "teacher.bin", 100)
    with pytest.raises(BrixelError, match=r"teacher\.bin is shorter than done\.json says: delete the folder"):
        build(tmp_path / "cache", images)


# ---------------------------------------------------------------- a full disk


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_written(tmp_path, images, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=COUNT * CROP_BYTES - 1)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    teacher = Teacher()
    with pytest.raises(BrixelError, match=r"needs 0\.00 GiB more, and 0\.00 GiB are free: free space on the disk or"):
        build(tmp_path / "new" / "cache", images, teacher)
    assert asked == [tmp_path]
    assert teacher.crops == 1
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=COUNT * CROP_BYTES))
    build(tmp_path / "new" / "cache", images)


def test_the_error_gives_the_sizes_of_cache_and_disk(tmp_path, images, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**28))
    with pytest.raises(BrixelError, match=r"needs 4\.29 GiB more, and 0\.75 GiB are free"):
        build(tmp_path / "cache", images, count=8_000_000)


def test_only_the_missing_crops_need_space(tmp_path, images, monkeypatch):
    with pytest.raises(RuntimeError):
        build(tmp_path / "cache", images, Teacher(fails_in=5))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * CROP_BYTES))
    build(tmp_path / "cache", images)


@pytest.mark.parametrize("fails_in", [1, 2, 8])
def test_a_disk_that_fills_up_is_an_error_and_the_build_resumes_later(tmp_path, images, monkeypatch, fails_in):
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == fails_in:
            raise OSError(errno.ENOSPC, "No space left on device")

    folder, done = tmp_path / "cache", (fails_in - 1) // 2
    with monkeypatch.context() as patched:
        patched.setattr(cache_module.os, "fsync", full)
        patched.setattr(atomic_files, "_to_disk", lambda path: None)
        kept = f"{done} crops are kept, {COUNT - done} missing"
        with pytest.raises(BrixelError, match=f"cannot write the teacher cache: .*No space left.*start again, {kept}"):
            build(folder, images)
    teacher = Teacher()
    build(folder, images, teacher)
    assert teacher.crops == COUNT - done
    build(tmp_path / "whole", images)
    assert files_of(folder) == files_of(tmp_path / "whole")


def test_a_disk_that_is_really_full(tmp_path, images):
    """A limit on the size of files makes the kernel refuse the write."""
    resource = pytest.importorskip("resource", reason="limits of a process exist on Unix only")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 3 * 8 * 8 * 2 + 300, before[1]))
    try:
        with pytest.raises(
            BrixelError, match="cannot write the teacher cache: .*; fix this and start again, 2 crops are kept"
        ):
            build(tmp_path / "cache", images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    build(tmp_path / "cache", images)
    build(tmp_path / "whole", images)
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")


# ---------------------------------------------------------------- a teacher that fails


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_an_error_and_not_stored(tmp_path, images, bad):
    inner = Teacher()

    def teacher(pixels):
        features = inner(pixels)
        if inner.crops == 4:
            features[1, 2, 3, 1] = bad
        return features

    image = dataset_of(images)[3].image
    with pytest.raises(BrixelError, match=f"features of crop 3, from {image}, are not finite"):
        build(tmp_path / "cache", images, teacher, batch_size=2)
    assert crops_done(tmp_path / "cache") == 2
    build(tmp_path / "cache", images, batch_size=2)


def test_features_too_large_for_float16_ask_for_bfloat16(tmp_path, images):
    def teacher(pixels):
        return Teacher()(pixels) * 1e5

    with pytest.raises(BrixelError, match=r"features of crop 0, .* do not fit torch\.float16: take bfloat16"):
        build(tmp_path / "cache", images, teacher)
    build(tmp_path / "cache", images, teacher, dtype=torch.bfloat16)


@pytest.mark.parametrize("wrong", [lambda x: x.flatten(1), lambda x: torch.cat([x, x])])
def test_features_of_a_wrong_shape_are_an_error(tmp_path, images, wrong):
    with pytest.raises(BrixelError, match=r"the teacher gave .*; expected \(1, D, h, w\)"):
        build(tmp_path / "cache", images, wrong)


def test_a_teacher_that_changes_shape_is_an_error(tmp_path, images):
    with pytest.raises(RuntimeError):
        build(tmp_path / "cache", images, Teacher(fails_in=3))
    message = r"output does not fit the cache in .*: teacher_shape is \(6, 4, 4\) in the folder, \(3, 32, 32\) now"
    with pytest.raises(BrixelError, match=message):
        build(tmp_path / "cache", images, lambda pixels: pixels)
    assert crops_done(tmp_path / "cache") == 3


def test_the_teacher_runs_without_gradients(tmp_path, images):
    weight = torch.ones((), requires_grad=True)
    seen = []

    def teacher(pixels):
        features = Teacher()(pixels) * weight
        seen.append(features.requires_grad)
        return features

    build(tmp_path / "cache", images, teacher)
    assert seen == [False] * COUNT


def test_wrong_arguments_say_so(tmp_path, images):
    with pytest.raises(BrixelError, match="of 7 crops in float32; expected 1 or more, in float16 or bfloat16"):
        build(tmp_path / "cache", images, dtype=torch.float32)
    with pytest.raises(BrixelError, match="a teacher cache of 0 crops"):
        build(tmp_path / "cache", images, count=0)
