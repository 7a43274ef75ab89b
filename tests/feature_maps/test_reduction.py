"""Reductions of maps: what each step gives, what is undone exactly, and what is refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.decomposition import TruncatedSVD

from brixel import BrixelError, FeatureMap, FeatureTable, Reduce
from brixel.errors import DamagedFileError, MissingFileError
from brixel.feature_maps.channel_basis import ChannelBasis


def random_map(
    channels: int = 6,
    grid_hw: tuple[int, int] = (6, 9),
    image_hw: tuple[int, int] = (47, 70),
    stride: tuple[float, float] = (8.0, 8.0),
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> FeatureMap:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(channels, *grid_hw, generator=generator) + torch.arange(channels)[:, None, None]
    return FeatureMap(features.to(dtype), image_hw, stride, {"backbone": "tiny", "dtype": "float32"})


def area_means(feature_map: FeatureMap, step_yx: tuple[float, float], grid_hw: tuple[int, int]) -> np.ndarray:
    """The naive twin, in float64: every old cell counts by the area that a new cell and the image have of it."""
    features, image_hw = feature_map.features.double().numpy(), feature_map.image_hw
    out = np.zeros((len(features), *grid_hw))
    for i, j in np.ndindex(*grid_hw):
        area = np.zeros(feature_map.grid_hw)
        for k, m in np.ndindex(*feature_map.grid_hw):
            sides = []
            for axis, (new, old) in enumerate(((i, k), (j, m))):
                step, stride = step_yx[axis], feature_map.stride[axis]
                start, stop = max(new * step, old * stride), min((new + 1) * step, (old + 1) * stride, image_hw[axis])
                sides.append(max(0.0, stop - start))
            area[k, m] = sides[0] * sides[1]
        out[:, i, j] = (features * area).sum((1, 2)) / area.sum()
    return out


# ---------------------------------------------------------------- cells


@pytest.mark.parametrize("px", [8.0, 12.0, 20.0, 16.5, 100.0])
def test_a_stride_averages_the_area_of_each_new_cell(px):
    source = random_map()
    reduced = Reduce(f"stride:{px:g}")(source)
    assert reduced.stride == (px, px)
    assert reduced.grid_hw == (int(np.ceil(47 / px)), int(np.ceil(70 / px)))
    expected = area_means(source, (px, px), reduced.grid_hw)
    np.testing.assert_allclose(reduced.features.numpy(), expected, rtol=0, atol=2e-6)
    assert dict(reduced.meta) == {**source.meta, "reduce": f"stride:{px:g}"}


def test_a_stride_is_exact_where_new_cells_are_whole_old_ones():
    source = random_map(grid_hw=(6, 8), image_hw=(48, 64))
    reduced = Reduce("stride:16")(source)
    expected = source.features.view(6, 3, 2, 4, 2).mean((2, 4))
    torch.testing.assert_close(reduced.features, expected, rtol=0, atol=1e-6)


def test_a_stride_never_makes_cells_finer():
    source = random_map(grid_hw=(6, 14), stride=(8.0, 5.0))
    along_x = Reduce("stride:7")(source)
    assert (along_x.stride, along_x.grid_hw) == ((8.0, 7.0), (6, 10))
    same = Reduce("stride:4")(source)
    assert same.features.data_ptr() == source.features.data_ptr()
    assert same.stride == source.stride


@pytest.mark.parametrize("spec", ["stride:20", "stride:9.25", "regions:3x4", "regions:16x16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constant_maps_stay_constant(spec, dtype):
    source = FeatureMap(torch.full((3, 6, 9), 1.5, dtype=dtype), (47, 70), (8.0, 8.0))
    reduced = Reduce(spec)(source)
    assert reduced.features.dtype == dtype
    torch.testing.assert_close(reduced.features, torch.full_like(reduced.features, 1.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid_hw", [(1, 1), (3, 4), (6, 9), (16, 20)])
def test_a_grid_covers_the_image_exactly_whatever_its_size(grid_hw):
    source = random_map()
    reduced = Reduce(f"regions:{grid_hw[0]}x{grid_hw[1]}")(source)
    assert reduced.grid_hw == grid_hw
    assert reduced.stride == (47 / grid_hw[0], 70 / grid_hw[1])
    expected = area_means(source, reduced.stride, grid_hw)
    np.testing.assert_allclose(reduced.features.numpy(), expected, rtol=0, atol=2e-6)
    whole = Reduce("regions:1x1")(source).features
    torch.testing.assert_close(reduced.features.mean((1, 2)), whole[:, 0, 0], rtol=0, atol=2e-6)


# ---------------------------------------------------------------- channels


def low_rank_maps(rank: int, channels: int = 12) -> list[FeatureMap]:
    mix = torch.randn(channels, rank, generator=torch.Generator().manual_seed(9))
    maps = [random_map(rank, seed=seed) for seed in range(3)]
    return [
        FeatureMap(torch.einsum("dr,rhw->dhw", mix, found.features), found.image_hw, found.stride, found.meta)
        for found in maps
    ]


def test_pca_with_all_components_gives_the_map_back():
    source = random_map()
    reduce = Reduce("pca:6").fit([source])
    torch.testing.assert_close(reduce(source).restored().features, source.features, rtol=0, atol=1e-5)
    assert reduce.basis.kept_variance == pytest.approx(1.0, abs=1e-9)


def test_pca_of_maps_with_few_directions_loses_nothing_and_keeps_similarities():
    maps = low_rank_maps(4)
    reduce = Reduce("pca:4").fit(maps)
    reduced = reduce(maps[1])
    assert reduced.embed_dim == 4
    restored = reduced.restored()
    assert (restored.embed_dim, restored.stride, restored.grid_hw) == (12, maps[1].stride, maps[1].grid_hw)
    torch.testing.assert_close(restored.features, maps[1].features, rtol=0, atol=1e-4)
    torch.testing.assert_close(reduced.similarity((20, 30)), maps[1].similarity((20, 30)), rtol=0, atol=1e-5)
    assert "basis" not in restored.meta
    assert restored.meta["reduce"] == "pca:4"


def test_directions_are_those_of_a_truncated_singular_value_decomposition():
    maps = [random_map(seed=seed) for seed in range(4)]
    basis = Reduce("pca:3").fit(maps).basis
    cells = torch.cat([found.features.flatten(1).T for found in maps]).double().numpy()
    theirs = TruncatedSVD(3, algorithm="arpack", random_state=0).fit(cells)
    signs = np.sign((basis.components.numpy() * theirs.components_).sum(1, keepdims=True))
    np.testing.assert_allclose(basis.components.numpy(), theirs.components_ * signs, atol=1e-6)
    left = ((cells - theirs.inverse_transform(theirs.transform(cells))) ** 2).sum()
    assert basis.kept_variance == pytest.approx(1 - left / ((cells - cells.mean(0)) ** 2).sum(), abs=1e-9)
    expected = np.einsum("kd,dhw->khw", theirs.components_ * signs, maps[0].features.double().numpy())
    np.testing.assert_allclose(Reduce.pca(basis)(maps[0]).features.numpy(), expected, atol=1e-5)


def test_a_fit_looks_at_maps_one_by_one_and_is_the_same_again():
    maps = [random_map(seed=seed) for seed in range(3)]
    once = Reduce("pca:2").fit(iter(maps))
    assert (
        once.basis.digest == Reduce("pca:2,int8").fit((f"{i}.png", found) for i, found in enumerate(maps)).basis.digest
    )
    assert once.identity == f"pca:2 (basis {once.basis.digest})"
    assert Reduce("stride:8").fit(maps).spec == "stride:8"


def test_steps_before_pca_run_before_the_fit():
    maps = [random_map(seed=seed) for seed in range(3)]
    ours = Reduce("regions:2x3,pca:2").fit(maps).basis
    theirs = Reduce("pca:2").fit([Reduce("regions:2x3")(found) for found in maps]).basis
    assert torch.equal(ours.components, theirs.components)


@pytest.mark.parametrize("order", ["stride:20,pca:3", "pca:3,stride:20"])
def test_averages_and_projections_commute(order):
    source = random_map()
    basis = Reduce("pca:3").fit([source]).basis
    twin = FeatureMap(Reduce("stride:20")(source).features, source.image_hw, (20.0, 20.0))
    ours = Reduce(order).with_basis(basis)(source)
    torch.testing.assert_close(ours.features, basis.project(twin.features), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        ours.restored().features, basis.restored(basis.project(twin.features)), rtol=0, atol=1e-5
    )


def test_a_large_map_is_projected_in_parts_as_a_small_one(monkeypatch):
    source = random_map()
    reduce = Reduce("pca:3").fit([source])
    expected = reduce(source).features
    monkeypatch.setattr("brixel.feature_maps.channel_basis._VALUES_AT_ONCE", 60)
    torch.testing.assert_close(reduce(source).features, expected, rtol=0, atol=1e-6)


def test_a_basis_of_another_model_or_width_is_refused():
    reduce = Reduce("pca:2").fit([random_map()])
    other = FeatureMap(torch.ones(6, 2, 2), (4, 4), (2.0, 2.0), {"backbone": "large"})
    with pytest.raises(BrixelError, match="the basis was fitted to maps of tiny, and this one is of large"):
        reduce(other)
    wide = FeatureMap(torch.ones(7, 2, 2), (4, 4), (2.0, 2.0))
    with pytest.raises(BrixelError, match="the features have 7 channels, and the basis 6 channels"):
        reduce(wide)
    with pytest.raises(BrixelError, match="the maps are of large, tiny; fit a basis to maps of one model"):
        Reduce("pca:2").fit([random_map(), other])
    with pytest.raises(BrixelError, match="a map of the sample has 7 channels, the first one has 6"):
        Reduce("pca:2").fit([random_map(), wide])


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([], "no maps to fit a basis to"),
        (random_map(), "a basis is fitted to several maps, not to FeatureMap"),
        ([3], "a basis is fitted to feature maps, not to a int"),
        ([random_map(2)], "3 components of 54 cells with 2 channels"),
        ([random_map(5, (1, 2), (8, 16))], "3 components of 2 cells with 5 channels"),
        ([FeatureMap(torch.full((4, 2, 2), torch.nan), (4, 4), (2.0, 2.0))], "values that are not finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(maps, message):
    with pytest.raises(BrixelError, match=message):
        Reduce("pca:3").fit(maps)


def test_a_map_without_its_basis_is_not_restored(tmp_path):
    reduce = Reduce("pca:2").fit([random_map()])
    reduce(random_map()).save(tmp_path / "map.safetensors")
    loaded = FeatureMap.load(tmp_path / "map.safetensors")
    with pytest.raises(BrixelError, match=rf"coordinates in basis {reduce.basis.digest}, and it is not at hand"):
        loaded.restored()
    other = Reduce("pca:2").fit([random_map(seed=5)]).basis
    with pytest.raises(BrixelError, match=rf"not in {other.digest}; give that basis"):
        loaded.restored(other)
    with pytest.raises(BrixelError, match="3 is none"):
        loaded.restored(3)
    assert torch.equal(loaded.restored(reduce.basis).features, reduce(random_map()).restored().features)
    assert torch.equal(random_map().restored().features, random_map().features)


def test_a_reduced_map_is_not_reduced_by_pca_again():
    reduce = Reduce("pca:2").fit([random_map()])
    with pytest.raises(BrixelError, match="reduced by pca already"):
        Reduce.pca(ChannelBasis(torch.eye(2)))(reduce(random_map()))
    again = Reduce("stride:20")(reduce(random_map()))
    assert again.meta["reduce"] == "pca:2,stride:20"
    assert again.restored().embed_dim == 6


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_int8_is_within_half_a_step_of_every_channel(dtype, tmp_path):
    source = random_map(dtype=dtype)
    source.features[2] = 0
    reduced = Reduce("int8")(source)
    assert reduced.features.dtype == torch.float32
    error = (reduced.features - source.features.float()).abs().amax((1, 2))
    assert (error <= reduced.scales * 0.5001).all()
    assert torch.equal(reduced.scales[2], torch.tensor(1.0))
    torch.testing.assert_close(reduced.features.abs().amax((1, 2))[3:], source.features[3:].float().abs().amax((1, 2)))

    reduced.save(tmp_path / "map.safetensors")
    stored = load_file(tmp_path / "map.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {"features": torch.int8, "scales": torch.float32}
    loaded = FeatureMap.load(tmp_path / "map.safetensors")
    assert torch.equal(loaded.features, reduced.features)
    assert torch.equal(loaded.scales, reduced.scales)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "map.safetensors").read_bytes()


def test_what_changes_the_values_drops_the_scales():
    reduced = Reduce("int8")(random_map())
    for changed in (
        reduced.to("float16"),
        reduced.resize((3, 4)),
        Reduce("stride:20")(reduced),
        Reduce("float16")(reduced),
    ):
        assert changed.scales is None
    assert reduced.to("cpu").scales is reduced.scales
    assert torch.equal(pickle.loads(pickle.dumps(reduced)).scales, reduced.scales)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_dtypes(name):
    source = random_map()
    assert torch.equal(Reduce(name)(source).features, source.features.to(getattr(torch, name)))


def test_values_that_do_not_fit_the_dtype_are_refused():
    large = FeatureMap(torch.full((1, 2, 2), 1e6), (4, 4), (2.0, 2.0))
    with pytest.raises(BrixelError, match="do not fit float16"):
        Reduce("float16")(large)
    for value in (torch.nan, torch.inf):
        bad = FeatureMap(torch.full((1, 2, 2), value), (4, 4), (2.0, 2.0))
        with pytest.raises(BrixelError, match="not finite cannot become int8"):
            Reduce("int8")(bad)


def test_npy_has_no_place_for_scales(tmp_path):
    with pytest.raises(BrixelError, match="npy has no place for the scales"):
        Reduce("int8")(random_map()).save(tmp_path / "map.npy")
    assert not list(tmp_path.iterdir())


def rewritten(path: Path, **changes: object) -> Path:
    """The file of a map with other fields in its description."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        (key, text), *_ = file.metadata().items()
    save_file(load_file(path), path, {key: json.dumps({**json.loads(text), **changes})})
    return path


def test_the_format_of_int8_maps_is_another_one(tmp_path):
    path = tmp_path / "map.safetensors"
    random_map().save(path)
    assert FeatureMap.load(rewritten(path)).scales is None
    with pytest.raises(BrixelError, match="format '3', this brixel reads '1', '2'; update brixel"):
        FeatureMap.load(rewritten(path, brixel_feature_map="3"))
    Reduce("int8")(random_map()).save(path)
    with pytest.raises(DamagedFileError, match="the array holds int8, its description says float32"):
        FeatureMap.load(rewritten(path, brixel_feature_map="1"))  # as a version reads it that knows no scales
    with pytest.raises(DamagedFileError, match="damaged"):
        FeatureMap.load(rewritten(path, brixel_feature_map="2", shape=[6, 6, 8]))


@pytest.mark.parametrize(
    "scales", [torch.ones(5), torch.ones(6, dtype=torch.float16), -torch.ones(6), torch.ones(6, 1)]
)
def test_damaged_scales_are_refused(tmp_path, scales):
    path = tmp_path / "map.safetensors"
    Reduce("int8")(random_map()).save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "scales": scales}, path, metadata)
    with pytest.raises(DamagedFileError, match="scales"):
        FeatureMap.load(path)


# ---------------------------------------------------------------- points and regions


def test_points_read_the_map_and_are_saved(tmp_path):
    source = random_map()
    points = [(3.0, 4.5), (47, 70), (0, 0)]
    table = Reduce.points(points)(source)
    assert torch.equal(table.features, source.at(points))
    assert torch.equal(table.points_yx, torch.tensor(points, dtype=torch.float64))
    assert table.labels.tolist() == [0, 1, 2]
    assert (len(table), table.embed_dim, table.image_hw) == (3, 6, (47, 70))
    assert table.meta["reduce"] == "points"
    table.save(tmp_path / "table.safetensors")
    loaded = FeatureTable.load(tmp_path / "table.safetensors")
    for name in ("features", "points_yx", "labels"):
        assert torch.equal(getattr(loaded, name), getattr(table, name))
    assert (loaded.image_hw, dict(loaded.meta)) == (table.image_hw, dict(table.meta))
    with pytest.raises(BrixelError, match=r"holds features of points or regions, not a map"):
        FeatureMap.load(tmp_path / "table.safetensors")
    source.save(tmp_path / "map.safetensors")
    with pytest.raises(DamagedFileError, match="lacks 'brixel_feature_table'"):
        FeatureTable.load(tmp_path / "map.safetensors")


def test_points_go_through_the_steps_after_them(tmp_path):
    source = random_map()
    reduce = (Reduce.points([(3, 4), (20, 30), (40, 60)]) + "pca:2,int8").fit([source, random_map(seed=1)])
    table = reduce(source)
    assert table.embed_dim == 2
    projected = reduce.basis.project(source.at([(3, 4), (20, 30), (40, 60)]).T).T
    assert ((table.features - projected).abs() <= table.scales * 0.5001).all()
    assert table.restored().embed_dim == 6
    table.save(tmp_path / "table.safetensors")
    assert load_file(tmp_path / "table.safetensors")["features"].dtype == torch.int8
    loaded = FeatureTable.load(tmp_path / "table.safetensors")
    assert torch.equal(loaded.features, table.features)
    assert torch.equal(loaded.restored(reduce.basis).features, table.restored().features)
    assert torch.equal(pickle.loads(pickle.dumps(reduce))(source).features, table.features)


@pytest.mark.parametrize("steps", ["", "int8", "float16"])
def test_no_points_give_an_empty_table(tmp_path, steps):
    reduce = Reduce.points([])
    table = (reduce + steps if steps else reduce)(random_map())
    assert (tuple(table.features.shape), tuple(table.points_yx.shape)) == ((0, 6), (0, 2))
    table.save(tmp_path / "table.safetensors")
    assert len(FeatureTable.load(tmp_path / "table.safetensors")) == 0


def test_points_by_name(tmp_path):
    source, by_name = random_map(), {"a.png": [[3, 4]], "b.png": []}
    (tmp_path / "points.json").write_text(json.dumps(by_name))
    for reduce in (Reduce.points(by_name), Reduce.points(by_name.get), Reduce(f"points:{tmp_path / 'points.json'}")):
        assert len(reduce(source, "a.png")) == 1
        assert len(reduce(source, "b.png")) == 0
        assert len(reduce.for_images({"photos/a.png": "a.png"})(source, "photos/a.png")) == 1
    with pytest.raises(
        BrixelError, match=r"points by name, and none for c\.png; expected one of \['a\.png', 'b\.png'\]"
    ):
        Reduce.points(by_name)(source, "c.png")
    with pytest.raises(BrixelError, match="no name of the image"):
        Reduce.points(by_name)(source)


def test_points_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(BrixelError, match=r"point 0 is \(48.0, 3.0\), outside the image"):
        Reduce.points([(48, 3)])(random_map())
    with pytest.raises(BrixelError, match="rows of different lengths"):
        Reduce.points([(48, 3), (1,)])
    with pytest.raises(BrixelError, match=r"points have shape \(2, 3\)"):
        Reduce.points([(1, 2, 3), (1, 2, 3)])(random_map())
    (tmp_path / "points.json").write_text("3")
    with pytest.raises(BrixelError, match="points are 3; expected rows"):
        Reduce(f"points:{tmp_path / 'points.json'}")
    with pytest.raises(MissingFileError):
        Reduce("points:nowhere.json")


def test_regions_are_means_over_the_pixels_of_their_masks():
    source = random_map(image_hw=(47, 70))
    mask = np.zeros((47, 70), np.uint8)
    mask[3:30, 10:25] = 7
    mask[40:, 60:] = 2
    table = Reduce.regions(mask)(source)
    pixelwise = source.features.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :47, :70]
    assert table.labels.tolist() == [2, 7]
    for row, label in zip(table.features, (2, 7), strict=True):
        torch.testing.assert_close(row, pixelwise[:, torch.from_numpy(mask == label)].mean(1), rtol=0, atol=1e-5)
    assert table.points_yx.tolist() == [[43.5, 65.0], [16.5, 17.5]]
    layers = Reduce.regions(np.stack([mask == 2, mask == 7]))(source)
    assert torch.equal(layers.features, table.features)
    assert layers.labels.tolist() == [0, 1]
    assert len(Reduce.regions(np.zeros((47, 70), int))(source)) == 0


def test_masks_in_a_folder(tmp_path):
    mask = np.zeros((47, 70), np.uint8)
    mask[:5] = 1
    (tmp_path / "masks/cats").mkdir(parents=True)
    Image.fromarray(mask).save(tmp_path / "masks/cats/7.png")
    reduce = Reduce(f"regions:{tmp_path / 'masks'}")
    assert torch.equal(reduce(random_map(), "cats/7.jpg").features, Reduce.regions(mask)(random_map()).features)
    with pytest.raises(BrixelError, match=r"no mask .*8\.png for cats/8\.jpg"):
        reduce(random_map(), "cats/8.jpg")
    with pytest.raises(BrixelError, match="need the name of the image"):
        reduce(random_map())
    with pytest.raises(BrixelError, match="outside of its folder"):
        reduce(random_map(), "../7.jpg")
    (tmp_path / "masks/cats/8.png").write_bytes(b"not an image")
    with pytest.raises(BrixelError, match="cannot be read as a PNG file"):
        reduce(random_map(), "cats/8.jpg")
    Image.new("RGB", (70, 47)).save(tmp_path / "masks/cats/8.png")
    with pytest.raises(BrixelError, match="is a mask in colour"):
        reduce(random_map(), "cats/8.jpg")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((70, 47), int), "the mask has 70 x 47 pixels, the image 47 x 70; expected the same"),
        (np.zeros((47, 70)), r"the mask is \(47, 70\) float64; expected"),
        (np.zeros(47, int), r"the mask is \(47,\) int64; expected"),
        (np.zeros((2, 47, 70), bool), "region 0 of the mask has no pixels"),
        (3.5, r"the mask is \(\) float64"),
    ],
)
def test_masks_of_another_kind_are_refused(mask, message):
    with pytest.raises(BrixelError, match=message):
        Reduce.regions(mask)(random_map())


# ---------------------------------------------------------------- specifications and files


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "the reduction has a step ''; expected one of pca:K"),
        ("pca", "has a step 'pca'"),
        ("pca:", "has a step 'pca:'"),
        ("pca:0", "pca:0; expected a positive number of components"),
        ("pca:1.5", "pca:1.5; expected a positive number of components"),
        ("stride:0", "stride:0; expected a positive number of pixels"),
        ("stride:-1", "stride:-1; expected a positive number of pixels"),
        ("regions:0x3", "regions:0x3: no such folder; expected one of masks, or a grid such as 16x16"),
        ("int4", "has a step 'int4'"),
        ("int8:2", "has a step 'int8:2'"),
        ("int8,pca:3", "pca:3 follows int8; the dtype comes last, and there is one at most"),
        ("int8,float16", "float16 follows int8"),
        ("pca:3,pca:2", "pca twice"),
        (3, "a reduction is 3; expected steps such as 'pca:32,int8'"),
        (None, "a reduction is None"),
        ("nowhere.safetensors", "nowhere.safetensors"),
    ],
)
def test_wrong_specifications_say_what_is_expected(spec, message):
    with pytest.raises(BrixelError, match=message):
        Reduce(spec)


def test_steps_that_need_cells_do_not_follow_points():
    with pytest.raises(BrixelError, match="stride:8 needs a map, and points before it leaves none"):
        Reduce.points([(1, 2)]) + "stride:8"


def test_a_reduction_without_a_basis_is_not_called_or_saved(tmp_path):
    with pytest.raises(BrixelError, match=r"pca:3 has no basis yet: fit it to some maps, as in Reduce\('pca:3'\)"):
        Reduce("pca:3")(random_map())
    with pytest.raises(BrixelError, match="no basis to save: fit it first"):
        Reduce("pca:3").save(tmp_path / "reduce.safetensors")
    with pytest.raises(BrixelError, match="no basis to save: its steps say all of it"):
        Reduce("int8").save(tmp_path / "reduce.safetensors")
    with pytest.raises(BrixelError, match="cannot be reduced; expected a FeatureMap"):
        Reduce("int8")(torch.ones(2, 3, 4))


def test_a_fitted_reduction_is_saved_and_loaded(tmp_path):
    reduce = Reduce("stride:20,pca:3,int8").fit([random_map()])
    path = tmp_path / "reduce.safetensors"
    reduce.save(path)
    loaded = Reduce(str(path))
    assert (loaded.spec, loaded.identity, loaded.basis.backbone) == (reduce.spec, reduce.identity, "tiny")
    assert loaded.basis.kept_variance == reduce.basis.kept_variance
    assert torch.equal(loaded(random_map()).features, reduce(random_map()).features)
    with pytest.raises(BrixelError, match="reduce.bin ends in '.bin'; a reduction is a file"):
        reduce.save(tmp_path / "reduce.bin")
    with pytest.raises(BrixelError, match="its folder does not exist"):
        reduce.save(tmp_path / "nowhere/reduce.safetensors")
    random_map().save(path)
    with pytest.raises(DamagedFileError, match="lacks 'brixel_reduction'"):
        Reduce.load(path)
    reduce.save(path)
    with pytest.raises(BrixelError, match="format '2', this brixel reads '1'; update brixel"):
        Reduce.load(rewritten(path, brixel_reduction="2"))


def test_a_reduction_is_pickled_with_its_basis():
    reduce = Reduce("pca:3,int8").fit([random_map()])
    twin = pickle.loads(pickle.dumps(reduce))
    assert torch.equal(twin(random_map()).features, reduce(random_map()).features)
    assert len(pickle.dumps(reduce)) < 4000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.ones(3, 4, 2)}, "expected .N, D., .N, 2. and .N,."),
        ({"features": torch.ones(3, 4, dtype=torch.int8)}, "features are torch.int8"),
        ({"points_yx": torch.ones(2, 2, dtype=torch.float64)}, "have shapes"),
        ({"points_yx": torch.ones(3, 2)}, "expected torch.float64 and torch.int64"),
        ({"labels": [1, 2, 3]}, "expected tensors"),
        ({"image_hw": (0, 3)}, "image_hw is"),
        ({"meta": {"a": 1}}, "meta is"),
        ({"scales": torch.ones(3)}, "scales are"),
        ({"basis": 3}, "the basis is 3"),
    ],
)
def test_tables_check_themselves(change, message):
    fields = {
        **{"features": torch.ones(3, 4), "points_yx": torch.ones(3, 2, dtype=torch.float64)},
        **{"labels": torch.arange(3), "image_hw": (8, 8)},
    }
    assert repr(FeatureTable(**fields)) == "FeatureTable((3, 4) float32 on cpu, image_hw=(8, 8))"
    with pytest.raises(BrixelError, match=message):
        FeatureTable(**{**fields, **change})
