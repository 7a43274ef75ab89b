"""Files of feature maps: what is written is read back, and what is no map is refused."""

import json
import math
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from brixel.errors import BrixelError
from brixel.feature_maps.feature_map import FeatureMap

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def random_map(
    *,
    dtype: torch.dtype = torch.float32,
    grid_hw: tuple[int, int] = (5, 8),
    image_hw: tuple[int, int] = (43, 51),
    stride: tuple[float, float] = (9.75, 7.125),
) -> FeatureMap:
    features = torch.randn(3, *grid_hw, generator=torch.Generator().manual_seed(0)).to(dtype)
    return FeatureMap(features, image_hw, stride, {"model": "tiny"})


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("ending", [".safetensors", ".npy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load_bit_for_bit(tmp_path: Path, dtype: torch.dtype, ending: str) -> None:
    features = random_map(dtype=dtype, grid_hw=(7, 5), image_hw=(100, 33), stride=(100 / 7, 6.6)).features
    features[0, 0, :4] = torch.tensor([-0.0, math.inf, -math.inf, torch.finfo(dtype).smallest_normal / 4])
    meta = {"model": "naïve ✓", "quote\"'\n": "", "lone \ud800": "[1, 2]", "format": "pt", "shape": "no"}
    fm = FeatureMap(features, (100, 33), (100 / 7, 6.6), meta)
    fm.save(tmp_path / f"map{ending}")
    loaded = FeatureMap.load(str(tmp_path / f"map{ending}"))
    assert loaded.features.dtype == dtype
    assert bits(loaded.features) == bits(features)
    assert loaded.image_hw == (100, 33)
    assert loaded.stride == (100 / 7, 6.6)
    assert dict(loaded.meta) == meta
    expected = {"map.safetensors"} if ending == ".safetensors" else {"map.npy", "map.npy.json"}
    assert {p.name for p in tmp_path.iterdir()} == expected


@pytest.mark.parametrize("ending", [".safetensors", ".npy"])
def test_saves_views_and_gradients(tmp_path: Path, ending: str) -> None:
    features = torch.randn(6, 5, 4, requires_grad=True).permute(2, 1, 0)[1:, :, ::2]
    FeatureMap(features, (5, 3), (1, 1)).save(tmp_path / f"map{ending}")
    loaded = FeatureMap.load(tmp_path / f"map{ending}").features
    assert torch.equal(loaded, features)
    assert not loaded.requires_grad


def test_others_can_read_the_files(tmp_path: Path) -> None:
    fm = random_map()
    fm.save(tmp_path / "map.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "map.npy"), fm.features)
    assert json.loads((tmp_path / "map.npy.json").read_text()) == {
        "brixel_feature_map": "1",
        "image_hw": [43, 51],
        "stride": [9.75, 7.125],
        "meta": {"model": "tiny"},
        "shape": [3, 5, 8],
        "dtype": "float32",
    }
    fm.save(tmp_path / "map.safetensors")
    fm.save(tmp_path / "again.safetensors")
    assert (tmp_path / "map.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert torch.equal(load_file(tmp_path / "map.safetensors")["features"], fm.features)
    random_map(dtype=torch.bfloat16).save(tmp_path / "bf16.npy")
    assert np.load(tmp_path / "bf16.npy").dtype == np.float32


def test_npy_is_mapped_and_the_file_safe_from_writes(tmp_path: Path) -> None:
    fm = random_map()
    fm.save(tmp_path / "map.npy")
    loaded = FeatureMap.load(tmp_path / "map.npy")
    with (tmp_path / "map.npy").open("r+b") as file:  # a mapping sees this, a copy would not
        file.seek(-4, 2)
        file.write(np.float32(5).tobytes())
    assert loaded.features[-1, -1, -1] == 5
    before = (tmp_path / "map.npy").read_bytes()
    loaded.features.fill_(7)
    assert (tmp_path / "map.npy").read_bytes() == before
    fm.to(torch.float64).save(tmp_path / "map.npy")  # over a file that is still mapped
    assert (loaded.features == 7).all()
    assert FeatureMap.load(tmp_path / "map.npy").features.dtype == torch.float64


@pytest.mark.parametrize(
    ("ending", "writer"), [(".safetensors", "save_file"), (".npy", "np.save"), (".npy", "json.dumps")]
)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_failing_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, writer: str, earlier: bool
) -> None:
    path = tmp_path / f"map{ending}"
    if earlier:
        random_map().save(path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    parts_written = []

    def fail(*arguments: object, **options: object) -> None:
        for argument in arguments:
            if isinstance(argument, Path):
                argument.write_bytes(b"half")
        parts_written.extend(p.name for p in tmp_path.iterdir() if ".part" in p.name)
        raise OSError("disk full")

    monkeypatch.setattr(f"brixel.feature_maps.storage.{writer}", fail)
    with pytest.raises(OSError, match="disk full"):
        random_map(grid_hw=(4, 6), image_hw=(64, 96), stride=(16, 16)).save(path)
    assert parts_written
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_description_is_in_place_before_the_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = []
    replace = os.replace

    def record(source: Path, target: Path) -> None:
        placed.append(target.name)
        replace(source, target)

    monkeypatch.setattr("os.replace", record)
    random_map().save(tmp_path / "map.npy")
    assert placed == ["map.npy.json", "map.npy"]


def test_save_errors(tmp_path: Path) -> None:
    fm = random_map()
    for name in ("map.png", "map", ".npy", "map.NPY"):
        message = re.escape(f"{name} ends in {Path(name).suffix!r}; name a feature map *.safetensors or")
        with pytest.raises(BrixelError, match=message):
            fm.save(tmp_path / name)
        with pytest.raises(BrixelError, match=message):
            FeatureMap.load(tmp_path / name)
    with pytest.raises(BrixelError, match=r"map\.npy cannot be written: its folder does not exist; give"):
        fm.save(tmp_path / "absent" / "map.npy")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(BrixelError, match=r"folder\.npy is a folder; give a file in a folder that exists"):
        fm.save(tmp_path / "folder.npy")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.npy"]


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no feature map at .*map\.safetensors: there is no such"):
        FeatureMap.load(tmp_path / "map.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no feature map at .*map\.npy"):
        FeatureMap.load(tmp_path / "map.npy")
    np.save(tmp_path / "map.npy", np.zeros((1, 2, 3)))
    with pytest.raises(BrixelError, match=r"map\.npy lacks map\.npy\.json next to it; move both files, or"):
        FeatureMap.load(tmp_path / "map.npy")


@pytest.mark.parametrize("ending", [".safetensors", ".npy"])
def test_every_truncation_is_noticed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"map{ending}"
    random_map().save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(BrixelError, match=rf"map{ending} is damaged or not a feature map \(.*save it"):
            FeatureMap.load(path)


def npy_of(shape: str, dtype: str = "<f4") -> bytes:
    """A `.npy` file of 3 x 5 x 8 numbers whose header says something else."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({shape}), }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(3 * 5 * 8 * 4)


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"PK\x05\x06" + bytes(18),  # an empty archive
        pickle.dumps([1]),
        b"\x93NUMPY\x01\x00\x02\x00(\n",  # brackets that do not close
        b"\x93NUMPY\x03\x00\x03\x00\x00\x001 1",  # not an expression
        npy_of("-" * 9000 + "1,"),  # deep for who evaluates it
        npy_of("3, 5, 8, 10000000000"),
        npy_of("3, 5, 0"),
        npy_of("3, 5, 8", dtype="<f16"),
        npy_of("3, 5, 8", dtype=">f4"),  # whole, but torch has no such numbers
    ],
)
def test_an_npy_that_is_something_else(tmp_path: Path, content: bytes) -> None:
    random_map().save(tmp_path / "map.npy")
    (tmp_path / "map.npy").write_bytes(content)
    with pytest.raises(BrixelError, match=r"map\.npy is damaged or not a feature map"):
        FeatureMap.load(tmp_path / "map.npy")


def test_an_npy_in_the_order_of_fortran_is_read(tmp_path: Path) -> None:
    fm = random_map()
    fm.save(tmp_path / "map.npy")
    np.save(tmp_path / "map.npy", np.asfortranarray(fm.numpy()))
    assert torch.equal(FeatureMap.load(tmp_path / "map.npy").features, fm.features)


def test_an_npy_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    random_map().save(tmp_path / "map.npy")
    np.save(tmp_path / "map.npy", np.array([{}, {}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(BrixelError, match=r"map\.npy is damaged or not a feature map"):
        FeatureMap.load(tmp_path / "map.npy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"map\.npy is damaged or not a feature map \(.*map\.npy\.json is not JSON"),
        ("\xff", r"map\.npy is damaged or not a feature map \(.*map\.npy\.json is not JSON"),
        ("[" * 100000, r"map\.npy is damaged or not a feature map \(.*map\.npy\.json is nested deeper"),
        ("[1]", r"map\.npy\.json was not written by brixel: it lacks 'brixel_feature_map'; give a file that save"),
        ("{}", r"map\.npy\.json was not written by brixel"),
        ('{"brixel_feature_map": "1"}', r"map\.npy is damaged or not a feature map \(.*lacks image_hw, stride"),
        ('{"brixel_feature_map": "2"}', r"json has format '2', this brixel reads '1'; update brixel"),
    ],
)
def test_a_description_that_is_something_else(tmp_path: Path, text: str, message: str) -> None:
    random_map().save(tmp_path / "map.npy")
    (tmp_path / "map.npy.json").write_text(text, encoding="latin-1")
    with pytest.raises(BrixelError, match=message):
        FeatureMap.load(tmp_path / "map.npy")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shape", [3, 8, 5], r"the array is \(3, 5, 8\), its description says \[3, 8, 5\]"),
        ("image_hw", [900, 51], "along y, 5 cells at a stride of 9.75 do not fit 900 pixels"),
        ("image_hw", "43", "image_hw in the description is '43'; expected two positive whole numbers"),
        ("stride", None, "stride in the description is None; expected two positive finite numbers"),
        ("meta", ["model"], r"meta in the description is \['model'\]; expected a mapping"),
        ("dtype", "int8", "'int8'"),
        ("dtype", ["float32"], "expected one of 'float32'"),
        ("dtype", "float16", "the array holds float32, its description says float16"),
        ("image_hw", [10**400, 51], "expected two positive whole numbers"),
        ("stride", [10**400, 7.125], "expected two positive finite numbers"),
        ("stride", [1e300, 7.125], "expected two positive finite numbers"),
        ("shape", [3, 5, 2**62], r"its description says \[3, 5, 4611686018427387904\]"),
        ("meta", {"model": 1}, "expected a mapping from texts to texts"),
    ],
)
@pytest.mark.parametrize("ending", [".safetensors", ".npy"])
def test_a_field_that_does_not_fit(tmp_path: Path, ending: str, field: str, value, message: str) -> None:
    path = tmp_path / f"map{ending}"
    fm = random_map()
    fm.save(path)
    fields = {"image_hw": (43, 51), "stride": (9.75, 7.125), "meta": {}, "shape": (3, 5, 8)}
    fields |= {"dtype": "float32", field: value}
    text = json.dumps({"brixel_feature_map": "1", **fields})
    if ending == ".npy":
        (tmp_path / "map.npy.json").write_text(text)
    else:
        save_file({"features": fm.features}, path, {"brixel_feature_map": text})
    with pytest.raises(BrixelError, match=rf"map{ending} is damaged or not a feature map \(.*{message}"):
        FeatureMap.load(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, r"map\.safetensors was not written by brixel: it lacks 'brixel_feature_map'"),
        ({"format": "pt"}, r"map\.safetensors was not written by brixel: it lacks 'brixel_feature_map'"),
        ({"brixel_feature_map": "1"}, r"map\.safetensors was not written by brixel: it lacks 'brixel_feature_map'"),
        (
            {"brixel_feature_map": '{"brixel_feature_map": "12"}'},
            r"map\.safetensors has format '12', this brixel reads",
        ),
        ({"brixel_feature_map": '{"brixel_feature_map": "1"}'}, r"map\.safetensors is damaged .*tensor features"),
        ({"brixel_feature_map": "("}, r"map\.safetensors is damaged or not .* \(Exp"),
    ],
)
def test_a_safetensors_that_is_something_else(tmp_path: Path, metadata, message: str) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "map.safetensors", metadata)
    with pytest.raises(BrixelError, match=message):
        FeatureMap.load(tmp_path / "map.safetensors")


@pytest.mark.parametrize("ending", [".safetensors", ".npy"])
def test_any_text_of_the_meta_is_read_back(tmp_path: Path, ending: str) -> None:
    meta = {"": "", "a": "x\0y\n", "picture": "caf\udce9.jpg", "ü": "[[[["}
    FeatureMap(torch.ones(3, 5, 8), (43, 51), (9.75, 7.125), meta).save(tmp_path / f"map{ending}")
    assert FeatureMap.load(tmp_path / f"map{ending}").meta == meta
