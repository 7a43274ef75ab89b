"""Images with a depth or a surface normal for every pixel, in the folder layouts in which people have them.

`docs/evaluation.md` names the sources. Depth is (1, H, W) in metres, 0 where it was not measured; normals are
(3, H, W), x right, y down, z into the image, towards the camera, zeros where there is none.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from brixel.errors import BrixelError, did_you_mean
from brixel.evaluate.datasets.labelled import Sample, check_outlines, check_samples, need, paired, read_numbers
from brixel.evaluate.datasets.normals_from_depth import normals_from_depth

_NAVI = "navi_v1.5.tar.gz or an earlier version, see https://github.com/google/navi"


@dataclass(frozen=True)
class MeasuredImages:
    """Images with what was measured of them; ``read`` gives it from the file, (C, H, W) float32."""

    name: str
    samples: Sequence[Sample]
    read: Callable[[Path], Tensor]

    def first(self, count: int | None) -> "MeasuredImages":
        """Only the first images; all where None."""
        return replace(self, samples=self.samples[:count])

    def target(self, index: int) -> Tensor:
        """What was measured of an image, (C, H, W)."""
        found = self.read(self.samples[index].target)
        check_outlines(self.samples[index], found.shape[1:])
        return found


def plain_depth(folder: Path, split: str) -> MeasuredImages:
    """`images/` and `depth/NAME.npy` (metres) or `depth/NAME.png` (16 bits, millimetres) below ``folder/split``."""
    return MeasuredImages(folder.resolve().name, paired(folder / split, "depth", (".npy", ".png")), read_depth)


def plain_normals(folder: Path, split: str) -> MeasuredImages:
    """`images/` and `normals/NAME.npy` (H, W, 3) or `normals/NAME.png` (RGB, 0 to 255 for -1 to 1, black none)."""
    return MeasuredImages(folder.resolve().name, paired(folder / split, "normals", (".npy", ".png")), read_normals)


def nyuv2(root: Path, split: str) -> MeasuredImages:
    """NYU Depth v2 as the scripts of BTS unpack it: `official_splits/{train,test}/SCENE/{rgb_N.jpg,sync_depth_N.png}`.

    654 images to test, 795 to train; "val" is "test" here. Depth in millimetres.
    """
    where = (
        "nyu_depth_v2_labeled.mat from https://cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html, unpacked by "
        "utils/extract_official_train_test_set_from_mat.py of https://github.com/cleinc/bts"
    )
    base = root / "official_splits" if (root / "official_splits").is_dir() else root
    folder = base / ("test" if split == "val" else split)
    need(folder, "a folder of NYU Depth v2", where)
    images = sorted(folder.glob("*/rgb_*.jpg"))
    samples = [Sample(path, path.with_name(f"sync_depth_{path.stem[4:]}.png")) for path in images]
    check_samples(samples, "NYU Depth v2", where)
    return MeasuredImages("NYU Depth v2", samples, read_depth)


def nyuv2_normals(root: Path, split: str) -> MeasuredImages:
    """NYU Depth v2 as `dsine_eval.zip` unpacks: `nyuv2/{train,test}/{N_img.png,N_normal.png}`, normals by GeoNet.

    The same 795 and 654 images; "val" is "test" here. Its normals point away from the camera and are turned round.
    """
    where = "dsine_eval.zip, linked in step 2 of https://github.com/baegwangbin/DSINE"
    base = next((path for path in (root / "dsine_eval" / "nyuv2", root / "nyuv2") if path.is_dir()), root)
    folder = base / ("test" if split == "val" else split)
    need(folder, "a folder of NYU Depth v2 with normals", where)
    images = sorted(folder.glob("*_img.png"))
    samples = [Sample(path, path.with_name(path.name.replace("_img.png", "_normal.png"))) for path in images]
    check_samples(samples, f"NYU Depth v2 with normals ({folder}/*_img.png)", where)
    return MeasuredImages("NYU Depth v2", samples, lambda path: -read_normals(path))


def navi(root: Path, split: str) -> MeasuredImages:
    """NAVI as it unpacks: `OBJECT/SCENE/{images/N.jpg,depth/N.png}`; "train" is `multiview*`, "val" `wild_set`.

    Its files hold 1 / depth; what is not the object has no depth. The videos of v1.5 are left aside.
    """
    need(root, "the folder of NAVI", _NAVI)
    scenes = {"train": "multiview*", "val": "wild_set"}  # multiview_NN_CAMERA at first, then multiview-NN-CAMERA
    if split not in scenes:
        raise BrixelError(f"NAVI has no split {split!r} here; {did_you_mean(split, scenes)}")
    images = sorted(root.glob(f"*/{scenes[split]}/images/*.jpg"))
    images = [path for path in images if not path.name.startswith("downsampled_")]
    samples = [Sample(path, path.parent.parent / "depth" / f"{path.stem}.png") for path in images]
    check_samples(samples, f"NAVI ({root}/OBJECT/{scenes[split]}/images/*.jpg)", _NAVI)
    return MeasuredImages("NAVI", samples, _read_inverse)


def navi_normals(root: Path, split: str) -> MeasuredImages:
    """NAVI's depth as normals, by the focal lengths in `OBJECT/SCENE/annotations.json`; see `normals_from_depth`."""
    data = navi(root, split)
    cameras: dict[Path, float] = {}
    for scene in sorted({sample.target.parents[1] for sample in data.samples}):
        cameras |= _navi_cameras(scene)
    if missing := [sample.target for sample in data.samples if sample.target not in cameras]:
        listed = missing[0].parents[1] / "annotations.json"
        raise BrixelError(f"{listed} lacks the focal length of {missing[0].stem}; to be had: {_NAVI}")

    def read(path: Path) -> Tensor:
        numbers = read_numbers(path)
        return normals_from_depth(numbers, cameras[path] * numbers.shape[1])

    return replace(data, read=read)


def _navi_cameras(scene: Path) -> dict[Path, float]:
    """The focal length over the image's width for each depth map of a scene."""
    path = scene / "annotations.json"
    need(path, "the cameras of a scene of NAVI", _NAVI)
    try:
        return {
            scene / "depth" / f"{Path(each['filename']).stem}.png": each["camera"]["focal_length"] / width
            for each in json.loads(path.read_text(encoding="utf-8"))
            for _, width in [each["image_size"]]
        }
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        expected = "a list with filename, image_size and camera.focal_length of each image"
        raise BrixelError(f"{path} cannot be used ({error!r}); expected {expected}; to be had: {_NAVI}") from error


DEPTH_LAYOUTS = {"plain": plain_depth, "nyuv2": nyuv2, "navi": navi}
NORMALS_LAYOUTS = {"plain": plain_normals, "nyuv2": nyuv2_normals, "navi": navi_normals}


def read_measured(kind: str, layout: str, root: Path, split: str) -> MeasuredImages:
    """Images with "depth" or "normals" in a layout. Raises BrixelError where something is not where it should."""
    layouts = DEPTH_LAYOUTS if kind == "depth" else NORMALS_LAYOUTS
    if layout not in layouts:
        raise BrixelError(f"no layout {layout!r} for {kind}; {did_you_mean(layout, layouts)}")
    return layouts[layout](root, split)


def read_depth(path: Path) -> Tensor:
    """Metres, (1, H, W), 0 where not measured: of a `.npy` as it is, of a 16-bit image from millimetres."""
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
    """Unit vectors, (3, H, W), zeros where there is none: of a `.npy` (H, W, 3), or an image, black where none."""
    if path.suffix == ".npy":
        values = torch.from_numpy(_array(path, 3)).float()
    else:
        with Image.open(path) as image:
            colours = torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32))
        values = torch.where(colours.sum(-1, keepdim=True) > 0, colours / 127.5 - 1, 0.0)
    length = values.norm(dim=-1, keepdim=True)
    return torch.where(length > 0.5, values / length.clamp(min=1e-6), 0.0).permute(2, 0, 1).contiguous()


def _read_inverse(path: Path) -> Tensor:
    """NAVI's files: 65535 stands for 10 / mm, 0 for none."""
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
        raise BrixelError(f"{path} holds {array.dtype} {array.shape}; expected floats {expected}")
    return array
