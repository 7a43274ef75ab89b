"""Mean and deviation come to pixels in [0, 1] from any scale, or are refused; of a processor they are what it does."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from brixel.backbones.normalisation import of_processor, unit_normalisation
from brixel.backbones.vit_config import IMAGENET_MEAN, IMAGENET_STD, ForeignConfig, ViTConfig
from brixel.errors import BrixelError

BIG_MEAN, BIG_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.5, (0.5, 0.5, 0.5)),
        (1, (1.0, 1.0, 1.0)),
        ([0.1, 0.2, 0.3], (0.1, 0.2, 0.3)),
        (np.float32(0.5), (0.5, 0.5, 0.5)),
        (np.array([0.25, 0.5, 0.75]), (0.25, 0.5, 0.75)),
        (torch.tensor(0.5), (0.5, 0.5, 0.5)),
        (torch.tensor([0.25, 0.5, 0.75]), (0.25, 0.5, 0.75)),
    ],
)
def test_one_number_or_three(given: Any, expected: tuple[float, ...]) -> None:
    assert unit_normalisation(given, given, "") == (expected, expected)


@pytest.mark.parametrize("wrong", [(0.5,), (0.5,) * 4, "0.5", None, True, [None] * 3, float("nan"), {}, [[0.5] * 3]])
def test_neither_one_nor_three(wrong: Any) -> None:
    with pytest.raises(BrixelError, match=r"X.mean is .*; expected three numbers, for red, green and blue"):
        unit_normalisation(wrong, 0.5, "X.")
    with pytest.raises(BrixelError, match=r"X.std is .*; expected three numbers, for red, green and blue"):
        unit_normalisation(0.5, wrong, "X.")


@pytest.mark.parametrize(
    ("mean", "std", "tell"),
    [
        (BIG_MEAN, BIG_STD, r"give mean=\(0.485, 0.456, 0.406\), std=\(0.229, 0.224, 0.225\)"),
        (127.5, 127.5, r"give mean=\(0.5, 0.5, 0.5\), std=\(0.5, 0.5, 0.5\)"),
        (BIG_MEAN, (1, 1, 1), r"for pixels from 0 to 255; .*give mean=\(0.485, 0.456, 0.406\)"),
        (0, 255, r"give mean=\(0, 0, 0\), std=\(1, 1, 1\)"),
        (-0.5, 0.5, "expected three numbers"),
        (500, 1, "expected three numbers"),
    ],
)
def test_another_scale_is_refused_with_the_numbers_to_give(mean: Any, std: Any, tell: str) -> None:
    with pytest.raises(BrixelError, match=tell):
        unit_normalisation(mean, std, "")
    with pytest.raises(BrixelError, match=tell):
        ForeignConfig("Own", 64, 4, 14, mean, std)
    sizes: dict[str, Any] = {"width": 32, "depth": 1, "heads": 1, "patch_px": 4, "ffn": "mlp", "ffn_width": 8}
    with pytest.raises(BrixelError, match=tell):
        ViTConfig(**sizes, positions="rotary", norm_eps=1e-5, mean=mean, std=std)


PROCESSORS: list[dict[str, Any]] = [
    {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD},
    {"image_mean": BIG_MEAN, "image_std": BIG_STD, "do_rescale": False},
    {"image_mean": [1.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 1 / 127.5},
    {"image_mean": 0.5, "image_std": 0.25},
    {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "do_normalize": False},
    {"do_normalize": False, "do_rescale": False},
    {"image_mean": [0.2, 0.3, 0.4], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 1 / 200},
]


@pytest.mark.parametrize("stated", PROCESSORS)
def test_as_the_processor_of_transformers_does(stated: dict[str, Any]) -> None:
    size = {"height": 6, "width": 5}
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    processor = transformers.ViTImageProcessor(**stated, do_resize=False, size=size)
    expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0]).float()
    found = of_processor(stated, "")
    assert found is not None
    mean, std = (torch.tensor(values)[:, None, None] for values in found)
    ours = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stated", [{}, {"size": 224}, {"do_normalize": True}, {"do_rescale": True}])
def test_what_states_nothing(stated: dict[str, Any]) -> None:
    assert of_processor(stated, "") is None


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"image_mean": BIG_MEAN, "image_std": BIG_STD}, r"P.image_mean is \(123.675.* give mean=\(0.485"),
        ({"image_mean": 0.5}, "P.image_mean is 0.5 and P.image_std is None; expected both"),
        ({"image_mean": 0.5, "image_std": 0.5, "do_rescale": False}, "leaves open whether they are from 0 to 255"),
        ({"image_mean": 0.5, "image_std": 0.5, "rescale_factor": 0}, "P.rescale_factor is 0; expected"),
        ({"image_mean": 0.5, "image_std": 0.5, "rescale_factor": "1/255"}, "P.rescale_factor is '1/255'; expected"),
        ({"image_mean": 0.5, "image_std": 0.5, "rescale_factor": 1.0}, "leaves open whether they are"),
        ({"image_mean": 0.5, "image_std": 0.5, "do_rescale": "no"}, "P.do_rescale is 'no'; expected True or False"),
        ({"image_mean": 0.5, "image_std": 0.5, "do_flip_channel_order": True}, "which brixel does not do: give mean="),
        ({"image_mean": 0.5, "image_std": 0.5, "rescale_offset": True}, "which brixel does not do: give mean="),
        ({"image_mean": [0.5], "image_std": [0.5]}, r"P.image_mean is \[0.5\]; expected three numbers"),
    ],
)
def test_what_cannot_be_brought_to_unit_pixels_is_refused(stated: dict[str, Any], message: str) -> None:
    with pytest.raises(BrixelError, match=message):
        of_processor(stated, "P.")


@pytest.mark.parametrize(
    "stated",
    [{"mean": [0.5] * 3, "std": [0.5] * 3}, {"norm_mean": 0.5}, {"pixel_mean": [1, 2, 3], "do_normalize": True}],
)
def test_means_by_other_names_are_refused(stated):
    with pytest.raises(BrixelError, match="expected image_mean and image_std"):
        of_processor(stated, "")


@pytest.mark.parametrize("step", ["do_grayscale", "do_convert_bgr"])
def test_other_steps_of_processors_are_refused(step):
    with pytest.raises(BrixelError, match=f"{step} is True, which brixel does not do"):
        of_processor({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, step: True}, "")
