"""The sizes of an image on the patch grid of a vision transformer, in whole pixels and cells.

    image as given  --resize, aspect kept-->  resized  --pad at bottom and right-->  padded, whole patches
      image_hw                                  resized_hw                             padded_hw

All pairs are (height, width). A feature map has `upscale` cells along the side of a patch.
"""

from dataclasses import dataclass

from brixel.errors import BrixelError, ImageError

MAX_PIXELS = 178_956_970
"""Pixels of the largest image that is read; Pillow's own default limit."""

MOST_ENLARGED = 64
"""Longest side of an image that is enlarged, in short sides: 1 x 5000 px would become 256 x 1,280,000."""

NATIVE = "native"
"""The `short_side_px` that keeps the size of the image."""


@dataclass(frozen=True)
class PatchGrid:
    """The sizes of one image on the patch grid, in pixels; made by `plan_patch_grid`."""

    image_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    padded_hw: tuple[int, int]
    patch_px: int

    def __post_init__(self) -> None:
        assert self.patch_px > 0, self
        assert min(*self.image_hw, *self.resized_hw) > 0, self
        for resized_px, padded_px in zip(self.resized_hw, self.padded_hw, strict=True):
            assert resized_px <= padded_px < resized_px + self.patch_px, self
            assert padded_px % self.patch_px == 0, self

    def map_hw(self, upscale: int) -> tuple[int, int]:
        """Cells that cover the resized image, `upscale` per side of a patch; none is only padding."""
        height_px, width_px = self.resized_hw
        return _ceil_div(height_px * upscale, self.patch_px), _ceil_div(width_px * upscale, self.patch_px)

    def map_stride(self, upscale: int) -> tuple[float, float]:
        """Height and width of a cell in pixels of the image as given; they differ if the long side was rounded."""
        height_px, width_px = (
            self.patch_px * image_px / (upscale * resized_px)
            for image_px, resized_px in zip(self.image_hw, self.resized_hw, strict=True)
        )
        return height_px, width_px


def plan_patch_grid(image_hw: tuple[int, int], patch_px: int, short_side_px: int | str) -> PatchGrid:
    """Plan how an image is resized, keeping its aspect, and padded to whole patches.

    Args:
        image_hw: Height and width of the image in pixels.
        patch_px: Side of a patch in pixels.
        short_side_px: Length of the short side after resizing, in pixels, or "native" to keep the size. The long side
            is rounded to whole pixels (a half is rounded up).

    Raises:
        BrixelError: `short_side_px` is something else.
        ImageError: The image would be enlarged and is longer than `MOST_ENLARGED` short sides.
    """
    resized_hw = _resized(image_hw, short_side_px)
    short_px, long_px = min(image_hw), max(image_hw)
    if max(resized_hw) > long_px > MOST_ENLARGED * short_px:
        raise ImageError(
            f"an image of {image_hw[0]}x{image_hw[1]} pixels (height x width) would be enlarged to "
            f"{resized_hw[0]}x{resized_hw[1]}; expected a long side of at most {MOST_ENLARGED} short ones where it is "
            f"enlarged: cut it into shorter ones, or give a short_side_px of at most {short_px} or {NATIVE!r}"
        )
    padded_hw = _ceil_div(resized_hw[0], patch_px) * patch_px, _ceil_div(resized_hw[1], patch_px) * patch_px
    return PatchGrid(image_hw, resized_hw, padded_hw, patch_px)


def _resized(image_hw: tuple[int, int], short_side_px: int | str) -> tuple[int, int]:
    if short_side_px == NATIVE:
        return image_hw
    if isinstance(short_side_px, bool) or not isinstance(short_side_px, int) or short_side_px <= 0:
        raise BrixelError(
            f"short_side_px is {short_side_px!r}; expected a whole number of pixels above zero, such as 512, "
            f"or {NATIVE!r} to keep the image's own size"
        )
    height_px, width_px = image_hw
    short_px, long_px = min(image_hw), max(image_hw)
    long_side_px = (2 * long_px * short_side_px + short_px) // (2 * short_px)  # to the nearest, a half up
    return (short_side_px, long_side_px) if height_px <= width_px else (long_side_px, short_side_px)


def whole_patches(side_px: int, patch_px: int) -> int:
    """The multiple of the patch, in pixels, that is nearest to a side, at least one patch."""
    return max(1, round(side_px / patch_px)) * patch_px


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
