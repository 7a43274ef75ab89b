"""Images with a depth or a surface normal for every pixel, read from the folder layouts of common data sets.

`docs/evaluation.md` lists the layouts. Depth is (1, H, W) in metres, 0 where it was not measured; normals are
(3, H, W), x right, y down, z into the image, pointing to the camera, zeros where there is none.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from brixel.errors import BrixelError
from brixel.evaluate.datasets.labelled import ImageDataset, Sample, check_samples, need, paired, read_numbers, unpacked
from brixel.evaluate.datasets.normals_from_depth import normals_from_depth
from brixel.utils.fields import check_names

_NAVI = "navi_v1.5.tar.gz or an earlier version, see https://github.com/google/navi"


def plain_depth(folder: Path, split: str) -> ImageDataset:
    """`images/` and `depth/NAME.npy` (metres) or `depth/NAME.png` (16 bits, millimetres) in ``folder/split``."""
    return ImageDataset(folder.resolve().name, paired(folder / split, "depth", (".npy", ".png")), read_depth)


def plain_normals(folder: Path, split: str) -> ImageDataset:
    """`images/` and `normals/NAME.npy` (H, W, 3) or `normals/NAME.png` (RGB, 0 to 255 for -1 to 1, black none)."""
    return ImageDataset(folder.resolve().name, paired(folder / split, "normals", (".npy", ".png")), read_normals)


def nyuv2(root: Path, split: str) -> ImageDataset:
    """NYU Depth v2 as the scripts of BTS unpack it: `official_splits/{train,test}/SCENE/{rgb_N.jpg,sync_depth_N.png}`.

    795 images to train, 654 to test; "val" means "test". Depth in millimetres.
    """
    where = (
        "nyu_depth_v2_labeled.mat from https://cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html, unpacked by "
        "utils/extract_official_train_test_set_from_mat.py of https://github.com/cleinc/bts"
    )
    base = unpacked(root, "official_splits")
    folder = base / ("test" if split == "val" else split)
    need("a folder of NYU Depth v2", where, folder)
    images = sorted(folder.glob("*/rgb_*.jpg"))
    samples = [Sample(path, path.with_name(f"sync_depth_{path.stem[4:]}.png")) for path in images]
    check_samples(samples, "NYU Depth v2", where)
    return ImageDataset("NYU Depth v2", samples, read_depth)


def nyuv2_normals(root: Path, split: str) -> ImageDataset:
    """NYU Depth v2 as unpacked from `dsine_eval.zip`: `nyuv2/{train,test}/{N_img.png,N_normal.png}`, normals by GeoNet.

    The same 795 and 654 images; "val" means "test". Its normals point away from the camera, so they are negated.
    """
    where = "dsine_eval.zip, linked in step 2 of https://github.com/baegwangbin/DSINE"
    base = unpacked(root, "dsine_eval/nyuv2", "nyuv2")
    folder = base / ("test" if split == "val" else split)
    need("a folder of NYU Depth v2 with normals", where, folder)
    images = sorted(folder.glob("*_img.png"))
    samples = [Sample(path, path.with_name(path.name.replace("_img.png", "_normal.png"))) for path in images]
    check_samples(samples, f"NYU Depth v2 with normals ({folder}/*_img.png)", where)
    return ImageDataset("NYU Depth v2", samples, lambda path: -read_normals(path))


def navi(root: Path, split: str) -> ImageDataset:
    """NAVI as unpacked: `OBJECT/SCENE/{images/N.jpg,depth/N.png}`; "train" is `multiview*`, "val" is `wild_set`.

    Its files contain 1 / depth, of the object alone. The videos of v1.5 are ignored.
    """
    need("the folder of NAVI", _NAVI, root)
    scenes = {"train": "multiview*", "val": "wild_set"}  # multiview_NN_CAMERA at first, then multiview-NN-CAMERA
    check_names([split], scenes, "NAVI has no split")
    images = sorted(root.glob(f"*/{scenes[split]}/images/*.jpg"))
    images = [path for path in images if not path.name.startswith("downsampled_")]
    samples = [Sample(path, path.parent.parent / "depth" / f"{path.stem}.png") for path in images]
    check_samples(samples, f"NAVI ({root}/OBJECT/{scenes[split]}/images/*.jpg)", _NAVI)
    return ImageDataset("NAVI", samples, _read_inverse)


def navi_normals(root: Path, split: str) -> ImageDataset:
    """Normals from NAVI's depth and the focal lengths in `OBJECT/SCENE/annotations.json`; see `normals_from_depth`."""
    data = navi(root, split)
    scenes = sorted({sample.target.parents[1] for sample in data.samples})
    cameras = {path: focal for scene in scenes for path, focal in _navi_cameras(scene).items()}
    if missing := [sample.target for sample in data.samples if sample.target not in cameras]:
        listed = missing[0].parents[1] / "annotations.json"
        raise BrixelError(f"{listed} lacks the focal length of {missing[0].stem}; source: {_NAVI}")

    def read(path: Path) -> Tensor:
        numbers = read_numbers(path)
        return normals_from_depth(numbers, cameras[path] * numbers.shape[1])

    return replace(data, read=read)


def _navi_cameras(scene: Path) -> dict[Path, float]:
    """The focal length over the image's width for each depth map of a scene."""
    path = scene / "annotations.json"
    need("the cameras of a scene of NAVI", _NAVI, path)
    try:
        return {
            scene / "depth" / f"{Path(entry['filename']).stem}.png": entry["camera"]["focal_length"] / width
            for entry in json.loads(path.read_text(encoding="utf-8"))
            for _, width in [entry["image_size"]]
        }
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        expected = "a list with filename, image_size and camera.focal_length of each image"
        raise BrixelError(f"{path} cannot be used ({error!r}); expected {expected}; source: {_NAVI}") from error


DEPTH_LAYOUTS = {"plain": plain_depth, "nyuv2": nyuv2, "navi": navi}
NORMALS_LAYOUTS = {"plain": plain_normals, "nyuv2": nyuv2_normals, "navi": navi_normals}


def read_measured(kind: str, layout: str, root: str | Path, split: str) -> ImageDataset:
    """Read a split of a data set with depth or surface normals.

    Args:
        kind: "depth" or "normals".
        layout: One of ``DEPTH_LAYOUTS`` or ``NORMALS_LAYOUTS``: "plain", "nyuv2", "navi".
        root: The data set's folder.
        split: Its name, such as "train" or "val".

    Returns:
        The images; depth and normals are read when they are needed.

    Raises:
        BrixelError: The layout is unknown, or files are missing.
    """
    layouts = DEPTH_LAYOUTS if kind == "depth" else NORMALS_LAYOUTS
    check_names([layout], layouts, f"unknown layout for {kind}:")
    return layouts[layout](Path(root), split)


def read_depth(path: Path) -> Tensor:
    """Metres, (1, H, W), 0 where not measured: from a `.npy` in metres or a 16-bit image in millimetres."""
    depth = torch.from_numpy(_array(path, 2)).float() if path.suffix == ".npy" else _millimetres(path) / 1000
    return torch.where(depth.isfinite() & (depth > 0), depth, 0.0)[None]


def _millimetres(path: Path) -> Tensor:
    with Image.open(path) as image:
        if not image.mode.startswith("I"):
            raise BrixelError(
                f"{path} has mode {image.mode}, 8 bits; expected 16 bits with millimetres of depth, or .npy in metres"
            )
    return read_numbers(path).float()


def read_normals(path: Path) -> Tensor:
    """Unit vectors, (3, H, W), zeros where there is none: from a `.npy` (H, W, 3), or an image, black where none."""
    if path.suffix == ".npy":
        values = torch.from_numpy(_array(path, 3)).float()
    else:
        with Image.open(path) as image:
            colours = torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32))
        values = torch.where(colours.sum(-1, keepdim=True) > 0, colours / 127.5 - 1, 0.0)
    length = values.norm(dim=-1, keepdim=True)
    return torch.where(length > 0.5, values / length.clamp(min=1e-6), 0.0).permute(2, 0, 1).contiguous()


def _read_inverse(path: Path) -> Tensor:
    """Metres, (1, H, W), from NAVI's files: a number n is a depth of 65535 * 10 / n mm, 0 is none."""
    numbers = read_numbers(path).float()
    return torch.where(numbers > 0, 65535 * 10 / numbers.clamp(min=1) / 1000, 0.0)[None]


def _array(path: Path, dimensions: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.floating]]":
    try:
        array: np.ndarray[tuple[int, ...], np.dtype[np.floating]] = np.load(path)
    except (ValueError, OSError, EOFError) as error:
        raise BrixelError(f"{path} cannot be read ({error}); write it again with numpy.save") from error
    wrong = array.ndim != dimensions or (dimensions == 3 and array.shape[-1] != 3)
    if wrong or not np.issubdtype(array.dtype, np.floating):
        expected = "(H, W)" if dimensions == 2 else "(H, W, 3)"
        raise BrixelError(f"{path} contains {array.dtype} {array.shape}; expected floats {expected}")
    return array
