"""Mean and standard deviation of images, brought to pixels in [0, 1], whichever way a model's files state them."""

from collections.abc import Iterable, Mapping
from typing import Any

from brixel.errors import BrixelError
from brixel.utils.fields import boolean, check_field, number, several

COLOURS = "three numbers, for red, green and blue in [0, 1]"
Colours = tuple[float, float, float]

_LARGEST = 255.0  # of a pixel in an image file
_TELL = "give mean=(...) and std=(...), for pixels in [0, 1]"
# steps of an image processor that brixel's normalisation cannot express
_OTHER_STEPS = ("do_flip_channel_order", "do_convert_bgr", "do_grayscale", "rescale_offset", "offset")
_OTHER_NAMES = ("mean", "std", "norm_mean", "norm_std", "pixel_mean", "pixel_std")  # of other libraries


def unit_normalisation(mean: Any, std: Any, owner: str) -> tuple[Colours, Colours]:
    """Mean and deviation as three numbers each, for pixels in [0, 1]; one number stands for three.

    ``owner`` opens the names in errors, such as "ViTConfig.". Raises BrixelError for what is neither, and for numbers
    on another scale: it says what they are on this one.
    """
    means: Colours = check_field(f"{owner}mean", _three(mean), several(number(), COLOURS, count=3))
    deviations: Colours = check_field(
        f"{owner}std", _three(std), several(number(above=0), f"{COLOURS}, above 0", count=3)
    )
    if all(0 <= value <= 1 for value in means) and max(deviations) <= 1:
        return means, deviations
    found = f"{owner}mean is {_text(means)} and {owner}std is {_text(deviations)}"
    if all(0 <= value <= _LARGEST for value in means) and max(deviations) <= _LARGEST:
        small, narrow = _scaled(means, _LARGEST), _scaled(deviations, _LARGEST)
        raise BrixelError(
            f"{found}, for pixels from 0 to 255; expected for pixels from 0 to 1: give mean={_text(small)}, "
            f"std={_text(narrow)}"
        )
    raise BrixelError(f"{found}; expected {COLOURS}, above 0 for std")


def of_processor(stated: Mapping[str, Any], owner: str) -> tuple[Colours, Colours] | None:
    """What an image processor of `transformers` does to pixels in [0, 1]; None where it states nothing about it.

    It multiplies pixels from 0 to 255 by ``rescale_factor``, subtracts ``image_mean`` and divides by ``image_std``.
    ``stated``: its settings. Raises BrixelError, which ``owner`` opens, where they are contradictory or something else.
    """
    normalises = _is_on(stated, "do_normalize", owner)
    mean, std = stated.get("image_mean"), stated.get("image_std")
    telling = {"image_mean", "image_std", "do_normalize", "do_rescale", *_OTHER_NAMES}
    if normalises and mean is None and std is None and not telling & stated.keys():
        return None
    others = [name for name in _OTHER_STEPS if stated.get(name)]
    if others:
        raise BrixelError(f"{owner}{others[0]} is {stated[others[0]]!r}, which brixel does not do: {_TELL}")
    odd = [name for name in _OTHER_NAMES if name in stated]
    if odd and mean is None and std is None:
        raise BrixelError(f"{owner}{odd[0]} is {stated[odd[0]]!r}; expected image_mean and image_std: {_TELL}")
    factor = 1.0
    if _is_on(stated, "do_rescale", owner):
        factor = check_field(f"{owner}rescale_factor", stated.get("rescale_factor", 1 / _LARGEST), number(above=0))
    if not normalises:
        mean, std = 0.0, 1.0
    elif mean is None and std is None:
        return None
    elif mean is None or std is None:
        raise BrixelError(f"{owner}image_mean is {mean!r} and {owner}image_std is {std!r}; expected both: {_TELL}")
    largest = _LARGEST * factor  # of a pixel, when the mean is subtracted
    if abs(largest - 1) < 1e-6:
        return unit_normalisation(mean, std, f"{owner}image_")
    rule = several(number(), COLOURS, count=3)
    means = check_field(f"{owner}image_mean", _three(mean), rule)
    deviations = check_field(f"{owner}image_std", _three(std), rule)
    if normalises and largest == _LARGEST and max(deviations) <= 1:
        raise BrixelError(
            f"{owner}image_std is {_text(deviations)} and pixels are not rescaled, which leaves open whether they are "
            f"from 0 to 255 or to 1: {_TELL}"
        )
    return unit_normalisation(_scaled(means, largest), _scaled(deviations, largest), f"{owner}image_")


def _is_on(stated: Mapping[str, Any], name: str, owner: str) -> bool:
    """Whether a step is done, as it is where the settings do not say."""
    value = stated.get(name)
    return value is None or bool(check_field(f"{owner}{name}", value, boolean()))


def _three(values: Any) -> Any:
    """One number three times; everything else as it is."""
    return (values,) * 3 if hasattr(values, "__float__") and not getattr(values, "ndim", 0) else values


def _scaled(values: Iterable[float], largest: float) -> Colours:
    """Values for pixels up to ``largest`` as those for pixels up to 1, without the digits that rounding adds."""
    red, green, blue = (float(f"{value / largest:.7g}") for value in values)
    return red, green, blue


def _text(values: Iterable[float]) -> str:
    return f"({', '.join(f'{value:.6g}' for value in values)})"
