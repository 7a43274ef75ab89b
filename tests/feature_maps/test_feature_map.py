import base64
import copy
import dataclasses
import io
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from brixel.errors import BrixelError
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.pca import PcaBasis

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
GEOMETRIES = {  # name: (grid_hw, image_hw, stride)
    "exact": ((4, 6), (64, 96), (16.0, 16.0)),
    "partial last cell": ((4, 6), (50, 95), (16.0, 16.0)),
    "stride not integer": ((7, 5), (100, 33), (100 / 7, 6.6)),
    "both": ((5, 8), (43, 51), (9.75, 7.125)),
    "below one pixel": ((9, 10), (3, 5), (1 / 3, 0.5)),
    "one cell": ((1, 1), (5, 3), (8.0, 8.0)),
}


def random_map(name: str = "both", dtype: torch.dtype = torch.float32, d: int = 3) -> FeatureMap:
    grid_hw, image_hw, stride = GEOMETRIES[name]
    features = torch.randn(d, *grid_hw, generator=torch.Generator().manual_seed(0)).to(dtype)
    return FeatureMap(features, image_hw, stride, {"model": "tiny"})


def ramp_map(name: str) -> FeatureMap:
    """Two channels that hold the y and the x of each cell's centre."""
    (rows, columns), image_hw, (stride_y, stride_x) = GEOMETRIES[name]
    y = (torch.arange(rows, dtype=torch.float64) + 0.5) * stride_y
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) * stride_x
    return FeatureMap(torch.stack(torch.meshgrid(y, x, indexing="ij")), image_hw, (stride_y, stride_x))


def naive_at(fm: FeatureMap, y: float, x: float) -> np.ndarray:
    """Bilinear interpolation as a weighted mean over all cells: each weighs by a tent around its centre."""
    rows, columns = fm.grid_hw
    y = min(max(y, 0.5 * fm.stride[0]), (rows - 0.5) * fm.stride[0])
    x = min(max(x, 0.5 * fm.stride[1]), (columns - 0.5) * fm.stride[1])
    value = np.zeros(fm.embed_dim)
    for i in range(rows):
        for j in range(columns):
            off_y, off_x = y / fm.stride[0] - (i + 0.5), x / fm.stride[1] - (j + 0.5)
            weight = max(0.0, 1 - abs(off_y)) * max(0.0, 1 - abs(off_x))
            value += weight * fm.features[:, i, j].double().numpy()
    return value


def new_centres(image_hw: tuple[int, int], out_hw: tuple[int, int]) -> list[tuple[float, float]]:
    step_y, step_x = image_hw[0] / out_hw[0], image_hw[1] / out_hw[1]
    return [((i + 0.5) * step_y, (j + 0.5) * step_x) for i in range(out_hw[0]) for j in range(out_hw[1])]


# ---- the object


def test_properties_and_repr() -> None:
    fm = FeatureMap(torch.zeros(384, 32, 40), (512, 630), (16, 15.75), {"model": "tiny"})
    assert fm.embed_dim == 384
    assert fm.grid_hw == (32, 40)
    assert fm.meta == {"model": "tiny"}
    assert repr(fm) == "FeatureMap((384, 32, 40) float32 on cpu, image_hw=(512, 630), stride=(16, 15.75))"


def test_sizes_become_plain_numbers() -> None:
    fm = FeatureMap(torch.zeros(1, 2, 3), np.array([4, 6]), torch.tensor([2, 2]))  # type: ignore[arg-type]
    assert [type(n) for n in (*fm.image_hw, *fm.stride)] == [int, int, float, float]
    assert (fm.image_hw, fm.stride) == ((4, 6), (2.0, 2.0))


def test_meta_is_a_frozen_copy() -> None:
    meta = {"model": "tiny"}
    fm = FeatureMap(torch.zeros(1, 2, 3), (4, 6), (2, 2), meta)
    meta["model"] = "other"
    assert fm.meta["model"] == "tiny"
    with pytest.raises(TypeError, match="does not support item assignment"):
        fm.meta["model"] = "other"  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        fm.image_hw = (1, 1)  # type: ignore[misc]


def test_equal_only_to_itself() -> None:
    fm = random_map()
    same = dataclasses.replace(fm)
    assert fm == fm
    assert fm != same
    assert len({fm, fm, same}) == 2


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda fm: pickle.loads(pickle.dumps(fm))])
def test_copies(duplicate) -> None:
    fm = random_map("partial last cell", torch.bfloat16)
    twin = duplicate(fm)
    assert torch.equal(twin.features, fm.features)
    assert (twin.image_hw, twin.stride, dict(twin.meta)) == (fm.image_hw, fm.stride, dict(fm.meta))
    assert type(twin.meta) is type(fm.meta)
    assert (twin.features.data_ptr() == fm.features.data_ptr()) == (duplicate is copy.copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros((1, 2, 3))}, r"features are a ndarray; expected a torch tensor \(D, Hf, Wf\)"),
        ({"features": torch.zeros(2, 3)}, r"features have shape \(2, 3\); expected \(D, Hf, Wf\)"),
        ({"features": torch.zeros(0, 2, 3)}, r"features have shape \(0, 2, 3\); expected .* none zero"),
        ({"features": torch.zeros(1, 2, 3).int()}, r"features are torch.int32; expected .*float16.*convert"),
        ({"image_hw": (4.5, 6)}, r"image_hw is \(4.5, 6\); expected two positive whole numbers, \(y, x\)"),
        ({"image_hw": (4, -6)}, r"image_hw is \(4, -6\); expected two positive whole numbers"),
        ({"image_hw": (4, 6, 3)}, r"image_hw is \(4, 6, 3\); expected two positive"),
        ({"image_hw": 4}, r"image_hw is 4; expected two positive"),
        ({"stride": (2.0, 0.0)}, r"stride is \(2.0, 0.0\); expected two positive finite numbers"),
        ({"stride": (math.nan, 2.0)}, r"stride is \(nan, 2.0\); expected two positive finite"),
        ({"stride": (math.inf, 2.0)}, r"stride is \(inf, 2.0\); expected two positive finite"),
        ({"stride": None}, "stride is None; expected two positive finite"),
        ({"meta": {"model": 3}}, "meta is {'model': 3}; expected a mapping from strings to strings"),
        ({"meta": {3: "model"}}, "meta is {3: 'model'}; expected a mapping from strings to strings"),
        ({"meta": "tiny"}, "meta is 'tiny'; expected a mapping"),
        (
            {"image_hw": (5, 6)},
            "along y, 2 cells at a stride of 2 do not fit 5 pixels: expected its edge in the "
            "last cell, from 2 to 4; give sizes of one image",
        ),
        ({"image_hw": (4, 4)}, "along x, 3 cells at a stride of 2 do not fit 4 pixels: .* from 4 to 6"),
    ],
)
def test_parts_that_do_not_fit(change, message: str) -> None:
    parts = {"features": torch.zeros(1, 2, 3), "image_hw": (4, 6), "stride": (2, 2)} | change
    with pytest.raises(BrixelError, match=message):
        FeatureMap(**parts)


def test_cover_allows_rounding_both_ways() -> None:
    for cells in range(1, 300, 3):
        for image_px in (1, 7, 224, 1001):
            stride = image_px / cells
            FeatureMap(torch.zeros(1, cells, 1), (image_px, 5), (stride, 5))
            FeatureMap(torch.zeros(1, cells, 1), (image_px, 5), (float(np.float32(stride)), 5))
            with pytest.raises(BrixelError, match=f"along y, {cells + 1} cells"):
                FeatureMap(torch.zeros(1, cells + 1, 1), (image_px, 5), (stride, 5))


def test_to() -> None:
    fm = random_map()
    half = fm.to(torch.float16)
    assert torch.equal(half.features, fm.features.half())
    assert (half.image_hw, half.stride, dict(half.meta)) == (fm.image_hw, fm.stride, dict(fm.meta))
    assert fm.to("meta").features.device.type == "meta"
    assert fm.to(torch.device("cpu")).features.data_ptr() == fm.features.data_ptr()
    with pytest.raises(BrixelError, match=r"features are torch\.int64"):
        fm.to(torch.int64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy(dtype: torch.dtype) -> None:
    fm = random_map(dtype=dtype)
    fm.features.requires_grad_()
    array = fm.numpy()
    assert array.dtype == (np.float32 if dtype == torch.bfloat16 else str(dtype).split(".")[1])
    assert array.tolist() == fm.features.tolist()


# ---- at


@pytest.mark.parametrize("name", GEOMETRIES)
def test_at_gives_back_coordinates_of_a_ramp(name: str) -> None:
    fm = ramp_map(name)
    rng = np.random.default_rng(0)
    last = [(cells - 0.5) * step for cells, step in zip(fm.grid_hw, fm.stride, strict=True)]
    points = rng.uniform(0, 1, (200, 2)) * fm.image_hw
    points = np.concatenate([points, [[0, 0], fm.image_hw, (0, fm.image_hw[1])]])
    expected = np.clip(points, 0.5 * np.array(fm.stride), last)  # interior points exactly, border clamped
    np.testing.assert_allclose(fm.at(points), expected, rtol=1e-12)


def test_at_pixel_centres_of_a_map_with_one_cell_per_pixel() -> None:
    fm = FeatureMap(torch.arange(12.0).reshape(1, 3, 4), (3, 4), (1, 1))
    for row in range(3):
        for column in range(4):
            assert fm.at([(row + 0.5, column + 0.5)]).item() == fm.features[0, row, column]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_at_agrees_with_a_weighted_mean_over_all_cells(name: str, dtype: torch.dtype) -> None:
    fm = random_map(name, dtype)
    points = np.random.default_rng(1).uniform(0, 1, (25, 2)) * fm.image_hw
    found = fm.at(points)
    assert found.dtype == dtype
    assert found.shape == (25, 3)
    expected = torch.tensor(np.stack([naive_at(fm, y, x) for y, x in points]))
    # computed in float32 and rounded once: half a unit in the last place, not the several of half arithmetic
    tolerance = {"rtol": 0.51 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(found.double(), expected, **tolerance)


def test_at_takes_any_points() -> None:
    fm = random_map()
    points = [(1.0, 2.0), (30.5, 50.0)]
    expected = fm.at(points)
    assert torch.equal(fm.at(np.array(points, dtype=np.float32)), expected)
    assert torch.equal(fm.at(torch.tensor(points, dtype=torch.float16)), expected)
    assert torch.equal(fm.at(torch.tensor(points, requires_grad=True)), expected)
    read_only = np.array(points)
    read_only.flags.writeable = False
    assert torch.equal(fm.at(read_only), expected)
    assert fm.at(np.zeros((0, 2))).shape == (0, 3)
    assert fm.at([(3, 4)]).shape == (1, 3)


def test_at_lets_gradients_through() -> None:
    fm = FeatureMap(torch.zeros(2, 2, 2, requires_grad=True), (4, 4), (2, 2))
    fm.at([(1.5, 3.0)]).sum().backward()
    assert fm.features.grad is not None
    assert fm.features.grad[0].tolist() == [[0.0, 0.75], [0.0, 0.25]]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ((1.0, 2.0), r"points have shape \(2,\); expected \(N, 2\), rows of \(y, x\) in pixels"),
        ([[1.0, 2.0, 3.0]], r"points have shape \(1, 3\); expected \(N, 2\)"),
        ([[1.0, 2.0], [3.0]], r"points are not rows of numbers \(.*\); give \(y, x\) pairs"),
        ([["a", "b"]], "points are not rows of numbers"),
        (None, r"points have shape \(\); expected"),
        (
            [[1, 1], [1, 1], [-0.5, 1], [99, 1]],
            r"point 2 is \(-0.5, 1.0\), outside the image: expected \(y, x\) from \(0, 0\) to \(43, 51\) "
            "pixels; drop or clamp such points",
        ),
        ([[43.001, 1]], r"point 0 is \(43.001, 1.0\), outside"),
        ([[1, 51.001]], r"point 0 is \(1.0, 51.001\), outside"),
        ([[1, 1], [math.nan, 1]], r"point 1 is \(nan, 1.0\), outside"),
    ],
)
def test_points_that_cannot_be_asked(points, message: str) -> None:
    with pytest.raises(BrixelError, match=message):
        random_map().at(points)


# ---- resize


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_enlarging_samples_at_the_new_centres(name: str, dtype: torch.dtype) -> None:
    fm = random_map(name, dtype)
    out_hw = (fm.grid_hw[0] * 2 + 1, fm.grid_hw[1] * 3 - 1)
    big = fm.resize(out_hw)
    assert big.grid_hw == out_hw
    assert big.features.dtype == dtype
    assert big.stride == (fm.image_hw[0] / out_hw[0], fm.image_hw[1] / out_hw[1])
    assert (big.image_hw, dict(big.meta)) == (fm.image_hw, dict(fm.meta))
    centres, found = new_centres(fm.image_hw, out_hw), big.features.double().flatten(1).T
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(fm.at(centres).double(), found, rtol=1.01 * eps, atol=3e-6)  # both round
    expected = torch.tensor(np.stack([naive_at(fm, y, x) for y, x in centres[::7]]))
    torch.testing.assert_close(found[::7], expected, rtol=0.51 * eps, atol=3e-6)


def naive_tents(cells: int, stride: float, image_px: int, out: int) -> np.ndarray:
    """Weights (out, cells) of a tent as wide as the larger cell, around each new centre, summing to one."""
    step = image_px / out
    width = max(step, stride)
    weights = np.zeros((out, cells))
    for o in range(out):
        centre = (o + 0.5) * step
        if step < stride:
            centre = min(max(centre, 0.5 * stride), (cells - 0.5) * stride)
        for i in range(cells):
            weights[o, i] = max(0.0, 1 - abs((i + 0.5) * stride - centre) / width)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("out_hw", [(2, 3), (1, 1), (3, 11), (12, 2), (4, 4), (5, 6)])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_shrinking_is_a_tent_as_wide_as_the_new_cells(name: str, out_hw: tuple[int, int]) -> None:
    fm = random_map(name)
    along_y = naive_tents(fm.grid_hw[0], fm.stride[0], fm.image_hw[0], out_hw[0])
    along_x = naive_tents(fm.grid_hw[1], fm.stride[1], fm.image_hw[1], out_hw[1])
    expected = np.einsum("oi,pj,dij->dop", along_y, along_x, fm.features.double().numpy())
    np.testing.assert_allclose(fm.resize(out_hw).features, expected, atol=3e-6)


@pytest.mark.parametrize("out_hw", [(1, 1), (2, 3), (40, 50), (2, 50)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_constant_stays_constant(name: str, dtype: torch.dtype, out_hw: tuple[int, int]) -> None:
    grid_hw, image_hw, stride = GEOMETRIES[name]
    fm = FeatureMap(torch.full((2, *grid_hw), 1.7, dtype=dtype), image_hw, stride).resize(out_hw)
    value = torch.tensor(1.7, dtype=dtype).item()
    assert fm.features.dtype == dtype
    np.testing.assert_allclose(fm.features.double(), value, rtol=1e-6)


def test_resize_to_the_same_grid_changes_nothing_but_a_partial_cell() -> None:
    exact = random_map("exact")
    assert torch.equal(exact.resize((4, 6)).features, exact.features)
    partial = random_map("partial last cell")
    same_count = partial.resize((4, 6))
    assert same_count.stride == (12.5, 95 / 6)
    expected = [naive_at(partial, y, x) for y, x in new_centres((50, 95), (4, 6))]
    np.testing.assert_allclose(same_count.features.flatten(1).T, expected, atol=3e-6)
    assert not torch.allclose(same_count.features, partial.features, atol=1e-2)


def test_resize_lets_gradients_through() -> None:
    for out_hw in ((2, 2), (9, 9)):
        features = torch.zeros(1, 4, 4, requires_grad=True)
        FeatureMap(features, (8, 8), (2, 2)).resize(out_hw).features.sum().backward()
        assert features.grad is not None
        assert features.grad.sum().item() == pytest.approx(out_hw[0] * out_hw[1], rel=1e-5)


@pytest.mark.parametrize("out_hw", [(0, 3), (2.5, 3), 3, (1, 2, 3)])
def test_resize_needs_a_size(out_hw) -> None:
    message = re.escape(f"out_hw is {out_hw!r}; expected two positive whole numbers, (y, x)")
    with pytest.raises(BrixelError, match=message):
        random_map().resize(out_hw)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_cuda_agrees_with_cpu(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    here = random_map(name, dtype)
    there = here.to("cuda")
    tolerance = {"rtol": 1.01 * torch.finfo(dtype).eps, "atol": 1e-5}
    for out_hw in ((1, 1), (2, 3), (3, 11), (12, 2), (4, 4), here.grid_hw, (20, 30)):
        resized = there.resize(out_hw).features
        assert resized.device.type == "cuda"
        torch.testing.assert_close(resized.cpu(), here.resize(out_hw).features, **tolerance)
    points = np.random.default_rng(0).uniform(0, 1, (40, 2)) * here.image_hw
    torch.testing.assert_close(there.at(torch.tensor(points).cuda()).cpu(), here.at(points), **tolerance)
    found, expected = there.similarity(points[0]).cpu(), here.similarity(points[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert np.abs(there.pca().astype(int) - here.pca()).max() <= 1
    for ending in (".safetensors", ".npy"):
        there.save(tmp_path / f"map{ending}")
        assert torch.equal(FeatureMap.load(tmp_path / f"map{ending}").features, here.features)


# ---- similarity and colours


@pytest.mark.parametrize("dtype", DTYPES)
def test_similarity_cell_by_cell(dtype: torch.dtype) -> None:
    fm = random_map("both", dtype, d=5)
    point = (20.25, 33.0)
    found = fm.similarity(point)
    assert found.dtype == torch.float32
    assert found.shape == fm.grid_hw
    target = fm.at([point])[0].double().numpy()
    for i in range(fm.grid_hw[0]):
        for j in range(fm.grid_hw[1]):
            cell = fm.features[:, i, j].double().numpy()
            expected = cell @ target / np.sqrt((cell @ cell) * (target @ target))
            assert found[i, j].item() == pytest.approx(expected, abs=1e-6)


def test_similarity_at_a_centre_is_one_there_and_never_more() -> None:
    fm = random_map("exact", d=64)
    fm = dataclasses.replace(fm, features=torch.cat([fm.features, fm.features * -1e3], dim=1)[:, 2:6])
    for i in range(4):
        for j in range(6):
            found = fm.similarity(torch.tensor([(i + 0.5) * 16, (j + 0.5) * 16]))
            assert found[i, j].item() == pytest.approx(1, abs=1e-6)
            assert found.abs().max() <= 1


def test_similarity_of_zero_vectors_is_zero() -> None:
    features = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(0))
    features[:, 0, 0] = 0
    fm = FeatureMap(features, (4, 4), (2, 2))
    assert (fm.similarity((1, 1)) == 0).all()
    assert (fm.similarity((3, 3)) == 0).tolist() == [[True, False], [False, False]]


def test_similarity_needs_one_point_in_the_image() -> None:
    with pytest.raises(BrixelError, match=r"array of shape \(1, 2\); expected \(2,\), the y and x of a point"):
        random_map().similarity([(1, 1)])
    with pytest.raises(BrixelError, match=r"point 0 is \(44.0, 1.0\), outside the image"):
        random_map().similarity((44, 1))


def test_pca_with_its_own_basis_and_with_a_given_one() -> None:
    fm, other = random_map(d=6), random_map("exact", d=6)
    np.testing.assert_array_equal(fm.pca(), PcaBasis.fit([fm.features]).project(fm.features))
    shared = PcaBasis.fit([fm.features, other.features])
    np.testing.assert_array_equal(fm.pca(shared), shared.project(fm.features))
    assert (fm.pca(shared) != fm.pca()).any()
    assert fm.pca().shape == (5, 8, 3)
    with pytest.raises(BrixelError, match="has 3 channels, the basis has 6"):
        random_map().pca(shared)


def test_to_html_writes_a_page(tmp_path: Path) -> None:
    fm = random_map(d=6)
    height, width = fm.image_hw
    for image in (None, Image.new("RGBA", (width, height)), np.zeros((height, width, 3), np.uint8)):
        fm.to_html(tmp_path / "view.html", image)
        text = (tmp_path / "view.html").read_text(encoding="utf-8")
        assert ("data:image/jpeg" in text) == (image is not None)
    for wrong in ("photo.jpg", np.zeros((height, width)), torch.zeros(3, height, width)):
        with pytest.raises(BrixelError, match=r"expected a PIL image or an array .* call brixel.view\(feature_map"):
            fm.to_html(tmp_path / "view.html", wrong)  # type: ignore[arg-type]
    with pytest.raises(BrixelError, match="expected the image that the map was made of"):
        fm.to_html(tmp_path / "view.html", Image.new("RGB", (100, 10)))
    with pytest.raises(BrixelError, match="expected a name that ends in .html"):
        fm.to_html(tmp_path / "view.txt")


def test_notebooks_show_the_colours_of_pca() -> None:
    fm = FeatureMap(random_map(d=6).features[:, :4, :6], (35, 60), (10, 10))  # the last row lies half outside
    png = fm._repr_png_()
    assert png is not None
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == (384, 224)
        shown = np.asarray(image)
    rows = (np.arange(224) + 0.5) * 35 / 224 // 10
    columns = (np.arange(384) + 0.5) * 60 / 384 // 10
    np.testing.assert_array_equal(shown, fm.pca()[rows.astype(int)[:, None], columns.astype(int)])
    text = fm._repr_html_()
    assert text is not None
    assert base64.b64encode(png).decode() in text
    assert "FeatureMap((6, 4, 6) float32 on cpu, image_hw=(35, 60), stride=(10, 10))" in text


def test_notebooks_show_some_cells_of_a_large_map_and_text_where_there_are_no_colours() -> None:
    large = FeatureMap(torch.randn(3, 40, 900), (40, 900), (1, 1))
    png = large._repr_png_()
    assert png is not None
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == (384, 17)
    broken = FeatureMap(torch.full((3, 2, 2), torch.inf), (2, 2), (1, 1))
    assert broken._repr_png_() is None
    assert broken._repr_html_() is None
