"""Images with a depth or a surface normal for every pixel, read from the folder layouts of common data sets.

`docs/evaluation.md` lists the layouts. Depth is (1, H, W) in metres, 0 where it was not measured; normals are
(3, H, W), x right, y down, z into the image, pointing to the camera, zeros where there is none.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brixel.errors import BrixelError
from brixel.evaluate.datasets.labelled import (
    LabelledDataset,
    Sample,
    check_samples,
    need,
    paired,
    unpacked,
    visible_files,
)
from brixel.evaluate.datasets.normals_from_depth import normals_from_depth
from brixel.images.target_files import read_colours, read_floats, read_numbers
from brixel.utils.contained_paths import path_below
from brixel.utils.fields import check_field, check_names, json_table, number, path_like, several, text, whole_number
from brixel.utils.structured_files import read_json_value

_SIZE = several(whole_number(1, 2**31), "height and width in pixels", count=2)
_ENTRIES = several(json_table(), "a list of tables", single=False)
_NYU_MM = (1000, 10_050)  # the farthest point of a room lies between these; the sensor reaches 10 m
_FARTHEST_M = 1000.0
_MOST = 0.8  # share of pixels that tells one direction from the other
_NAVI = "navi_v1.5.tar.gz or an earlier version, see https://github.com/google/navi"


def plain_depth(folder: Path, split: str) -> LabelledDataset:
    """`images/` and `depth/NAME.npy` (metres) or `depth/NAME.png` (16 bits, millimetres) in ``folder/split``."""
    return LabelledDataset(folder.resolve().name, paired(folder / split, "depth", (".npy", ".png")), read_depth)


def plain_normals(folder: Path, split: str) -> LabelledDataset:
    """`images/` and `normals/NAME.npy` (H, W, 3) or `normals/NAME.png` (RGB, 0 to 255 for -1 to 1, black none)."""
    return LabelledDataset(folder.resolve().name, paired(folder / split, "normals", (".npy", ".png")), read_normals)


def nyuv2(root: Path, split: str) -> LabelledDataset:
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
    images = visible_files(folder, "*/rgb_*.jpg")
    samples = [Sample(path, path.with_name(f"sync_depth_{path.stem[4:]}.png")) for path in images]
    check_samples(samples, "NYU Depth v2", where)
    return LabelledDataset("NYU Depth v2", samples, _read_nyuv2)


def nyuv2_normals(root: Path, split: str) -> LabelledDataset:
    """NYU Depth v2 as unpacked from `dsine_eval.zip`: `nyuv2/{train,test}/{N_img.png,N_normal.png}`, normals by GeoNet.

    The same 795 and 654 images; "val" means "test". Its normals point away from the camera, so they are negated.
    """
    where = "dsine_eval.zip, linked in step 2 of https://github.com/baegwangbin/DSINE"
    base = unpacked(root, "dsine_eval/nyuv2", "nyuv2")
    folder = base / ("test" if split == "val" else split)
    need("a folder of NYU Depth v2 with normals", where, folder)
    images = visible_files(folder, "*_img.png")
    samples = [Sample(path, path.with_name(path.name.replace("_img.png", "_normal.png"))) for path in images]
    check_samples(samples, f"NYU Depth v2 with normals ({folder}/*_img.png)", where)
    return LabelledDataset("NYU Depth v2", samples, _read_nyuv2_normals)


def navi(root: Path, split: str) -> LabelledDataset:
    """NAVI as unpacked: `OBJECT/SCENE/{images/N.jpg,depth/N.png}`; "train" is `multiview*`, "val" is `wild_set`.

    Its files contain 1 / depth, of the object alone. The videos of v1.5 are ignored.
    """
    need("the folder of NAVI", _NAVI, root)
    scenes = {"train": "multiview*", "val": "wild_set"}  # multiview_NN_CAMERA at first, then multiview-NN-CAMERA
    check_names([split], scenes, "NAVI has no split")
    images = visible_files(root, f"*/{scenes[split]}/images/*.jpg")
    images = [path for path in images if not path.name.startswith("downsampled_")]
    samples = [Sample(path, path.parent.parent / "depth" / f"{path.stem}.png") for path in images]
    check_samples(samples, f"NAVI ({root}/OBJECT/{scenes[split]}/images/*.jpg)", _NAVI)
    return LabelledDataset("NAVI", samples, _read_inverse)


def navi_normals(root: Path, split: str) -> LabelledDataset:
    """Normals from NAVI's depth and the focal lengths in `OBJECT/SCENE/annotations.json`; see `normals_from_depth`."""
    data = navi(root, split)
    scenes = sorted({sample.target.parents[1] for sample in data.samples})
    cameras = {path: focal for scene in scenes for path, focal in _navi_cameras(scene).items()}
    if missing := [sample.target for sample in data.samples if sample.target not in cameras]:
        listed = missing[0].parents[1] / "annotations.json"
        raise BrixelError(f"{listed} lacks the focal length of {missing[0].stem}; source: {_NAVI}")

    def read(path: Path) -> Tensor:
        numbers = _navi_numbers(path)
        return normals_from_depth(numbers, cameras[path] * numbers.shape[1])

    return replace(data, read=read)


def _navi_cameras(scene: Path) -> dict[Path, float]:
    """The focal length over the image's width for each depth map of a scene."""
    path = scene / "annotations.json"
    need("the cameras of a scene of NAVI", _NAVI, path)
    try:
        entries = check_field("the file", read_json_value(path), _ENTRIES)
        return dict(_navi_camera(scene, path, entry) for entry in entries)
    except MemoryError:
        raise
    except BrixelError as error:
        expected = "a list with filename, image_size and camera.focal_length of each image"
        raise BrixelError(f"{path} cannot be used ({error}); expected {expected}; source: {_NAVI}") from error


def _navi_camera(scene: Path, listed: Path, entry: dict[str, Any]) -> tuple[Path, float]:
    """The depth map of an entry, and its focal length over the image's width."""
    name = check_field("filename", entry.get("filename"), text())
    _, width = check_field("image_size", entry.get("image_size"), _SIZE)
    camera = check_field("camera", entry.get("camera"), json_table())
    focal = check_field("focal_length", camera.get("focal_length"), number(above=0))
    return scene / "depth" / f"{path_below(scene, name, listed).stem}.png", focal / width


DEPTH_LAYOUTS = {"plain": plain_depth, "nyuv2": nyuv2, "navi": navi}
NORMALS_LAYOUTS = {"plain": plain_normals, "nyuv2": nyuv2_normals, "navi": navi_normals}


def read_measured(kind: str, layout: str, root: str | Path, split: str) -> LabelledDataset:
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
    return layouts[layout](check_field("root", root, path_like()), check_field("split", split, text(empty=True)))


def read_depth(path: Path) -> Tensor:
    """Metres, (1, H, W), 0 where not measured: from a `.npy` in metres or a 16-bit image in millimetres."""
    depth = read_floats(path) if path.suffix == ".npy" else _millimetres(path) / 1000
    depth = torch.where(depth.isfinite() & (depth > 0), depth, 0.0)
    known = depth[depth > 0]
    if len(known) and (middle := float(known.median())) > _FARTHEST_M:
        raise BrixelError(
            f"{path}: half of its depths are {middle:g} m and more: these look like millimetres, not metres"
        )
    return depth[None]


def _millimetres(path: Path) -> Tensor:
    return read_numbers(path, deep="millimetres of depth, or .npy in metres").float()


def _read_nyuv2(path: Path) -> Tensor:
    """Metres, (1, H, W), from NYU's files in millimetres."""
    depth = _millimetres(path)
    farthest = float(depth.max())
    if farthest > _NYU_MM[1]:
        raise BrixelError(
            f"{path} reaches {farthest / 1000:g} m, and the sensor 10 m: this looks like depth that was scaled so that "
            "65535 = 10 m, or of which the bytes were swapped; expected millimetres"
        )
    if 0 < farthest < _NYU_MM[0]:
        raise BrixelError(
            f"{path} reaches {farthest / 1000:g} m, which no room of NYU does: this looks like centimetres; expected "
            "millimetres"
        )
    return torch.where(depth > 0, depth, 0.0)[None] / 1000


def read_normals(path: Path) -> Tensor:
    """Unit vectors, (3, H, W), zeros where there is none: from a `.npy` (H, W, 3), or an image, black where none."""
    if path.suffix == ".npy":
        values = read_floats(path, [3])
        values = torch.where(values.isfinite().all(-1, keepdim=True), values, 0.0)
    else:
        colours = read_colours(path)
        values = torch.where(colours.sum(-1, keepdim=True) > 0, colours / 127.5 - 1, 0.0)
    length = values.norm(dim=-1, keepdim=True)
    known = length > 0.5
    if path.suffix != ".npy" and _share((length[known] - 1).abs() > 0.05) > 0.5:
        raise BrixelError(
            f"{path}: its colours are not those of unit vectors; expected 0 to 255 for -1 to 1, so that 127.5 is 0, "
            "and black where there is no normal"
        )
    return torch.where(known, values / length.clamp(min=1e-6), 0.0).permute(2, 0, 1).contiguous()


def _read_nyuv2_normals(path: Path) -> Tensor:
    """Unit vectors that point to the camera, from files whose vectors point away from it."""
    normals = read_normals(path)
    depth_axis = normals[2][normals.square().sum(0) > 0]
    if _share(depth_axis < -0.1) > _MOST:
        raise BrixelError(
            f"{path}: its normals point to the camera; those of dsine_eval.zip point away from it, blue for a wall "
            "that faces the camera: make a plain folder of others"
        )
    return -normals


def _share(mask: Tensor) -> float:
    """The share of pixels that are True; 0 of none."""
    return float(mask.float().mean()) if len(mask) else 0.0


def _read_inverse(path: Path) -> Tensor:
    """Metres, (1, H, W), from NAVI's files: a number n is a depth of 65535 * 10 / n mm, 0 is none."""
    numbers = _navi_numbers(path).float()
    return torch.where(numbers > 0, 65535 * 10 / numbers.clamp(min=1) / 1000, 0.0)[None]


def _navi_numbers(path: Path) -> Tensor:
    return read_numbers(path, deep="1 / depth")
