"""Training of the second generation: several sizes, the universal upsampler below it, own crops."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import records_of, state_of
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

from brixel import BrixelError, BrixelFeatures
from brixel.checkpoints.bundled_universal import load_universal
from brixel.model.losses import FeatureScale, LossWeights, cosine_loss, l1_loss, total_loss
from brixel.train import TrainConfig, distill
from brixel.train.dry_run import plan
from brixel.train.validation import Validator

figures = Validator._figures
SIZES = (28, 42)  # 2 x 2 and 3 x 3 patches


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(5):
        image = Image.new("RGB", (170 + number, 180), (40 * number, 90, 200 - 30 * number))
        draw = ImageDraw.Draw(image)
        draw.ellipse((20, 30 + number, 110, 120), fill=(250, 20 * number, 0))
        draw.rectangle((90, 20, 160, 60 + 10 * number), fill=(0, 120, 10 * number))
        image.save(folder / f"{number}.png")
    return folder


def run_of(backbone: Path, images: Path, out: Path, **settings: object) -> TrainConfig:
    return TrainConfig(
        **{
            **{"backbone": str(backbone), "images": str(images), "val": str(images), "out": str(out), "sizes": SIZES},
            **{"steps": 6, "batch_size": 4, "warmup": 1, "val_every": 3, "save_every": 2, "val_images": 3},
            **{"log_every": 1, "workers": 0, "device": "cpu", "fit": 20, "cache": 9, **settings},
        }
    )


@pytest.fixture(scope="module")
def trained(backbone_folder, images, tmp_path_factory) -> tuple[TrainConfig, BrixelFeatures]:
    config = run_of(backbone_folder, images, tmp_path_factory.mktemp("run") / "out", steps=24, val_every=12, lr=3e-3)
    return config, distill(config)


@pytest.mark.slow
def test_it_gets_nearer_to_the_teacher_at_every_size(trained):
    checks = [record for record in records_of(trained[0].out) if "cosine" in record]
    for size in SIZES:
        name = f"centred_cosine_{size}px"
        assert checks[-1][name] > checks[-1][f"bilinear_{name}"] + 0.05


@pytest.mark.slow
def test_figures_are_means_over_the_sizes_and_choose_the_best_model(trained):
    config, _ = trained
    checks = [record for record in records_of(config.out) if "cosine" in record]
    for record in checks:
        for name in ("cosine", "centred_cosine", "bilinear_r2", "better_than_bilinear"):
            assert record[name] == pytest.approx(sum(record[f"{name}_{size}px"] for size in SIZES) / 2)
    assert state_of(config.out)["progress"]["best"] == max(record["centred_cosine"] for record in checks)


@pytest.mark.slow
def test_a_given_model_comes_back_with_the_facts_of_its_best_validation(backbone_folder, images, tmp_path, monkeypatch):
    scores = iter((0.3, 0.4, 0.2, 0.1))  # the second is the best
    monkeypatch.setattr(Validator, "_figures", lambda self: figures(self) | {"centred_cosine": next(scores)})
    config = run_of(backbone_folder, images, tmp_path / "out", steps=4, val_every=1)
    model = distill(config, model=BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu"))
    assert model.config.training["steps"].startswith("2 of 4,")
    saved = load_file(Path(config.out) / "adapter.safetensors")
    for name, value in model.upsampler.state_dict().items():
        assert torch.equal(value, saved[name]), name


@pytest.mark.slow
def test_the_model_says_what_it_was_trained_for_and_comes_back(trained, images):
    config, given = trained
    again = BrixelFeatures.from_pretrained(config.out, device="cpu")
    adapter = again.config.adapter
    assert (adapter.generation, adapter.grids, adapter.short_side_px) == (2, (2, 3), 42)
    image = images / "0.png"
    assert torch.equal(given.extract(image).features, again.extract(image).features)
    assert given.extract(image, scale=8).features.shape[1] == 2 * given.extract(image).features.shape[1]
    assert again.config.training["loss"] == "1 L1 + 1 cosine"
    assert "28, 42 px for the student" in again.config.training["images"]


@pytest.mark.slow
def test_sizes_have_caches_of_their_own_with_about_as_many_cells(trained):
    out = Path(trained[0].out)
    for size, count in zip(SIZES, (9, 4), strict=True):
        header = json.loads((out / "cache" / str(size) / "header.json").read_text())["fingerprint"]
        assert (header["count"], header["crops"]["teacher_px"]) == (count, 4 * size)
        assert (out / "val" / str(size) / "header.json").exists()


@pytest.mark.slow
def test_the_universal_upsampler_stays_as_it_is_unless_it_is_trained(trained, backbone_folder, images, tmp_path):
    def universal(out: str) -> dict[str, Tensor]:
        state = load_file(Path(out) / "adapter.safetensors")
        return {name.removeprefix("universal."): state[name] for name in state if name.startswith("universal.")}

    bundled = dict(load_universal(torch.float32).state_dict())
    torch.testing.assert_close(universal(trained[0].out), bundled, rtol=0, atol=0)
    config = run_of(backbone_folder, images, tmp_path / "out", steps=2, val_every=2, train_universal=True)
    distill(config)
    assert any(not torch.equal(value, bundled[name]) for name, value in universal(config.out).items())


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_run_goes_on_to_the_same_weights(backbone_folder, images, tmp_path, stop, monkeypatch):
    settings = {"accumulate": 2, "ema": 0.5}
    whole, parts = (run_of(backbone_folder, images, tmp_path / name, **settings) for name in ("whole", "parts"))
    distill(whole)

    class StopError(Exception):
        pass

    from brixel.train.trainer import Trainer

    step = Trainer.step

    def stopping(self, *arguments):
        if self.state.step == 2 * stop - 1:
            raise StopError
        return step(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stopping)
        with pytest.raises(StopError):
            distill(parts)
    distill(parts)
    ours, theirs = state_of(parts.out), state_of(whole.out)
    for part in ("progress", "module", "average", "optimizer"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)


@pytest.mark.slow
def test_crops_of_ones_own(backbone_folder, images, tmp_path):
    class Pairs:
        def __init__(self, size: int) -> None:
            self.size, self.read = size, 0

        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            self.read += 1
            generator = torch.Generator().manual_seed(index)
            cells = 4 * self.size // 14
            pixels = torch.randn(3, self.size, self.size, generator=generator)
            return pixels, torch.randn(64, cells, cells, generator=generator)

    crops = [Pairs(size) for size in SIZES]
    config = run_of(backbone_folder, images, tmp_path / "out", steps=3, val=(), cache=0)
    model = distill(config, crops=crops)
    assert model.config.training["images"].startswith("5 and 5 crops given in code; crops of 112, 168 px")
    assert all(pairs.read > 0 for pairs in crops)
    with pytest.raises(BrixelError, match="1 datasets of crops for 2 sizes; expected one for each"):
        distill(dataclasses.replace(config, out=str(tmp_path / "other")), crops=crops[:1])


def test_a_size_that_is_not_whole_patches_is_refused(backbone_folder, images, tmp_path):
    with pytest.raises(BrixelError, match="teacher_px is 120; expected a multiple of 56"):
        distill(run_of(backbone_folder, images, tmp_path / "out", sizes=(28, 30)))


def test_losses_do_not_depend_on_the_scale_of_the_features():
    student, teacher = torch.randn(2, 6, 5, 5), torch.randn(2, 6, 5, 5)
    mean, std, weights = torch.randn(6), torch.rand(6) + 0.5, LossWeights(1.0, 0.5, 0.1, True, 1.0)
    plain, _ = total_loss(student, teacher, weights, FeatureScale(mean, std))
    factor, shift = 100.0, torch.randn(6, 1, 1)
    scaled, parts = total_loss(
        factor * student + shift,
        factor * teacher + shift,
        weights,
        FeatureScale(factor * mean + shift[:, 0, 0], factor * std),
    )
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-4)
    normal = [(maps - mean[:, None, None]) / std[:, None, None] for maps in (student, teacher)]
    centred = [maps - mean[:, None, None] for maps in (student, teacher)]
    torch.testing.assert_close(parts["l1"], l1_loss(*normal), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts["cosine_loss"], cosine_loss(*centred), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_dry_run_measures_every_size(backbone_folder, images, tmp_path):
    facts = plan(run_of(backbone_folder, images, tmp_path / "out"))
    assert facts["maps"] == "(64, 8, 8) and (64, 12, 12), from blocks 0, 1, 2, 3"
    assert facts["crops"] == "112, 168 px for the teacher, 28, 42 px for the student"
    assert facts["steps"].startswith("6 of 3 images: 13 crops")
    assert not (tmp_path / "out").exists()
