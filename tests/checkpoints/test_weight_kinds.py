"""The content of a file decides what it is, whatever its name; what is no weight file is called what it is."""

import argparse
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from weight_states import CONFIG, dinov2_state

from brixel.backbones.vit import ViT
from brixel.checkpoints.load_backbone import load_backbone
from brixel.checkpoints.weight_files import read_tensors
from brixel.errors import BrixelError, CheckpointError, MissingFileError

NAMES = ("x.pth.tar", "x.PTH", "x.pkl", "x.pyth", "x.SAFETENSORS", "x.pth", "x.safetensors", "x.weights", "x", "x.v2.0")


def load(path: Path) -> ViT:
    return load_backbone(path, architecture=CONFIG).vit


def write(path: Path, container: str) -> Path:
    state = dinov2_state()
    if container == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=container == "zip")
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("container", ["safetensors", "zip", "pickle"])
def test_any_name(name: str, container: str, tmp_path: Path) -> None:
    found, expected = read_tensors(write(tmp_path / name, container)), dinov2_state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_only_one_of_a_folder(name: str, tmp_path: Path) -> None:
    for beside in ("README.md", "config.json", ".hidden.pth"):
        (tmp_path / beside).write_text("{}")
    write(tmp_path / name, "zip")
    assert read_tensors(tmp_path).keys() == dinov2_state().keys()


def test_settings_of_a_training_beside_the_weights(tmp_path: Path) -> None:
    torch.save({"model": dinov2_state(), "args": argparse.Namespace(lr=1e-3)}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").depth == CONFIG.depth


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 86538000\n"
OTHERS = {
    "a Git LFS pointer.*git lfs pull": LFS,
    "an HTML page": b"\n\n<!DOCTYPE HTML>\n<html><body>Sign in</body></html>",
    "an HTML page, as": b"<HTML lang='en'>",
    "an XML document": b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "JSON text": b'{"error": "Repository Not Found"}',
    "an empty file": b"",
    "only zeros": bytes(4000),
    "a text, 'Access to model x is restricted.'": b"Access to model x\nis restricted.\n",
    "a NumPy array": b"\x93NUMPY\x01\x00v\x00{'descr'",
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(40),
    "a gzip archive": b"\x1f\x8b\x08\x00" + bytes(40),
    "a JPEG image": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "damaged, or no weight file": b"\x03\x05\xfe" * 200,
    "damaged or cut off": b"PK\x03\x04" + bytes(range(200)),
}


@pytest.mark.parametrize("message", OTHERS)
def test_what_is_no_weight_file(message: str, tmp_path: Path) -> None:
    for name in ("x.pth", "model.safetensors", "x"):
        (tmp_path / name).write_bytes(OTHERS[message])
        with pytest.raises(CheckpointError, match=f"{name} is {message}"):
            load(tmp_path / name)


def test_pointers_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"model.safetensors is a Git LFS pointer"):
        load(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights.pth is a Git LFS pointer"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["weights.npy"], "a zip archive that holds weights.npy, not a checkpoint"),
        (["m/code/a.py", "m/constants.pkl", "m/data.pkl"], "a TorchScript model, which holds code"),
    ],
)
def test_zip_archives_of_something_else(members: list[str], message: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for member in members:
            archive.writestr(member, "content")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "x.pt")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("container", ["safetensors", "zip", "pickle"])
def test_files_that_are_cut_off(container: str, share: float, tmp_path: Path) -> None:
    path = write(tmp_path / "x.weights", container)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"x.weights is damaged"):
        load(path)


def test_a_distributed_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80")
    (tmp_path / "__0_0.distcp").write_bytes(b"numbers")
    with pytest.raises(CheckpointError, match=r"torch.distributed, whose tensors are in parts: .* dcp_to_torch"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"])
def test_names_that_no_file_has(name: str, tmp_path: Path) -> None:
    with pytest.raises(BrixelError):
        load(tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{"a" * 300}.safetensors"}}}}')
    with pytest.raises(MissingFileError, match="lacks 1 of 1 weight shards: aaaa"):
        load(tmp_path)


def test_an_index_nested_too_deep(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"index.json is nested deeper"):
        load(tmp_path)


def test_a_safetensors_file_whose_first_byte_is_a_pickles(tmp_path: Path) -> None:
    """The header's length ends in the byte that pickles start with."""
    for length in range(400):
        content = save({"blocks.0": torch.ones(1)}, {"note": "x" * length})
        if content[0] == 0x80:
            break
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="no layout that we know"):  # it was read
        load(tmp_path / "x")
