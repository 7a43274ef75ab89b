import contextlib
import errno
import subprocess
import sys
import threading

import pytest
from filelock import FileLock

from brixel import BrixelError
from brixel.extraction import manifest as manifest_module
from brixel.extraction.distributed import ProcessShare
from brixel.extraction.manifest import Manifest, SourceImage, WrittenFile, read_manifests


def entry(name):
    return WrittenFile(f"{name}.safetensors", 3, "0" * 64, (SourceImage(name, 1, 2),))


def test_a_line_that_was_cut_off_is_ignored(tmp_path):
    with Manifest(tmp_path, {"a": "b"}, ProcessShare()) as manifest:
        manifest.begin()
        manifest.add(entry("x"))
        manifest.add(entry("y"))
    path = tmp_path / "manifest-0.jsonl"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        assert [written.file for written in read_manifests(tmp_path)] == ["x.safetensors", "y.safetensors"][
            : max(lines - 1, 0)
        ]
    path.write_bytes(whole[:-5])
    with Manifest(tmp_path, {"a": "b"}, ProcessShare()) as manifest:
        assert len(manifest.written) == 1
        manifest.add(entry("y"))
    assert [written.file for written in read_manifests(tmp_path)] == ["x.safetensors", "y.safetensors"]


@pytest.mark.parametrize("content", [b"{}\n", b"not json\n", b'{"format_version": 1}\n', b"[]\n"])
def test_a_damaged_manifest_says_so(tmp_path, content):
    (tmp_path / "manifest-0.jsonl").write_bytes(content)
    with pytest.raises(BrixelError, match=r"manifest-0\.jsonl is damaged or not a manifest of brixel"):
        Manifest(tmp_path, {}, ProcessShare())
    with Manifest(tmp_path, {}, ProcessShare(), overwrite=True) as manifest:
        assert manifest.written == []


def test_a_newer_manifest_says_so(tmp_path):
    (tmp_path / "manifest-0.jsonl").write_bytes(b'{"format_version": 2, "settings": {}}\n')
    with pytest.raises(BrixelError, match="has format 2, this brixel reads 1; update brixel"):
        read_manifests(tmp_path)


# ---------------------------------------------------------------- locks


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr(manifest_module, "_OTHER_SIZE_S", 0)


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ProcessShare(0, 1), ProcessShare(0, 1)),
        (ProcessShare(0, 1), ProcessShare(1, 2)),
        (ProcessShare(1, 2), ProcessShare(0, 1)),
        (ProcessShare(1, 2), ProcessShare(1, 2)),
    ],
)
def test_another_run_is_refused_and_the_other_processes_of_one_run_are_not(tmp_path, first, second):
    with Manifest(tmp_path, {}, first):
        with pytest.raises(BrixelError, match="another run writes to"), Manifest(tmp_path, {}, second):
            pass
        with Manifest(tmp_path, {}, ProcessShare(0, 2)) if first.processes == 2 else contextlib.nullcontext():
            pass
    with Manifest(tmp_path, {}, second):
        pass


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize("name", [".run-0-of-1", ".run-1-of-2"])
def test_the_lock_of_a_killed_process_is_free(tmp_path, name):
    program = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path / name)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(BrixelError, match="another run writes to"):
            Manifest(tmp_path, {}, ProcessShare())
        process.kill()
    with Manifest(tmp_path, {}, ProcessShare()):
        pass


def test_processes_that_start_together_wait_for_each_others_look_at_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "_OTHER_SIZE_S", 60)
    with FileLock(tmp_path / ".run-0-of-1", thread_local=False) as lock:
        timer = threading.Timer(0.1, lock.release)
        timer.start()
        with Manifest(tmp_path, {}, ProcessShare(0, 2)):
            assert not lock.is_locked
        timer.join()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog, number):
    failing_flock(monkeypatch, number)
    with Manifest(tmp_path, {}, ProcessShare()), Manifest(tmp_path, {}, ProcessShare()):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".run-0-of-1", "manifest-0.jsonl"]
    assert caplog.text.count("has no locks: make sure that no other run writes there") == 2
    assert (tmp_path / ".run-0-of-1").read_bytes() == b""  # no marker, which would outlive a killed process


@pytest.mark.parametrize(
    ("number", "message"), [(errno.EAGAIN, "another run writes to"), (errno.EIO, "cannot write into .*; give another")]
)
def test_other_errors_of_a_lock_stop_the_run(tmp_path, monkeypatch, number, message):
    failing_flock(monkeypatch, number)
    with pytest.raises(BrixelError, match=message):
        Manifest(tmp_path, {}, ProcessShare())


def failing_flock(monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def flock(handle, operation):
        raise OSError(number, "as the test says")

    monkeypatch.setattr(fcntl, "flock", flock)
