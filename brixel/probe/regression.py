"""A regression probe: ridge regression on dense features, for depth, heights and other values of pixels.

Shapes: D channels, n cells, Hf x Wf cells of a map, H x W pixels of an image.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from brixel.errors import BrixelError
from brixel.feature_maps.feature_map import FeatureMap
from brixel.probe.base import COMMON_RULES, ModelInput, Probe, ProbeInput, stride_of
from brixel.probe.cells import POINTS, points_of_cells
from brixel.probe.readouts import ChannelStatistics
from brixel.probe.solvers import RidgeSums
from brixel.probe.targets import PixelTarget, check_count, check_fits, read_values
from brixel.utils.fields import Rule, boolean, number, optional
from brixel.utils.progress import progress_bar
from brixel.utils.torch_defaults import plain_defaults


class RegressionProbe(Probe):
    """A linear readout of a value for every pixel, on dense features, with the manners of scikit-learn.

    Ridge regression in closed form, from sums over all cells with a value: it is the same at every fit, and its memory
    does not grow with the images. A cell's value is the mean of its pixels that have one. Values are interpolated
    bilinearly from cells to pixels.

    >>> probe = RegressionProbe(log=True).fit(["a.jpg", "b.jpg"], ["a_depth.png", "b_depth.npy"])
    >>> depth = probe.predict("c.jpg")  # (H, W)

    Args:
        model: A model; what ``BrixelFeatures.from_pretrained`` loads; None for the bundled model.
        log: Whether the logarithm is fitted, as suits depth. Pixels at 0 and below then have no value.
        ignore_value: A number that means no value, such as 0; NaN and infinities always do.
        png_unit: The value of 1 in PNG files of 16 bits, where 0 means no value; 0.001 for millimetres to metres.
        regularisation: Weight of the penalty, see :meth:`brixel.probe.solvers.RidgeSums.readout`.
        scale: Cells of a map per patch, on each axis, as for ``model.extract``.
        short_side_px: The short side that images are resized to, as for ``model.extract``.
        memory_limit: Of the model, as for ``model.extract``.
        batch_size: Images of one size that share a batch at most.
    """

    KIND: ClassVar[str] = "regression"
    _RULES: ClassVar[Mapping[str, Rule]] = {
        **COMMON_RULES,
        "log": boolean(),
        "ignore_value": optional(number()),
        "png_unit": number(above=0),
    }

    def __init__(
        self,
        model: ModelInput = None,
        *,
        log: bool = False,
        ignore_value: float | None = None,
        png_unit: float = 0.001,
        regularisation: float = 0.003,
        scale: int | None = None,
        short_side_px: int | str | None = None,
        memory_limit: int | str | None = None,
        batch_size: int = 1,
    ) -> None:
        self.model = model
        self.log = log
        self.ignore_value = ignore_value
        self.png_unit = png_unit
        self.regularisation = regularisation
        self.scale = scale
        self.short_side_px = short_side_px
        self.memory_limit = memory_limit
        self.batch_size = batch_size

    @plain_defaults()
    def fit(self, images: Iterable[ProbeInput], values: Sequence[PixelTarget]) -> "RegressionProbe":
        """Fit the probe to values of pixels. Everything is checked before the first map is computed.

        Args:
            images: Images of any kind, or their maps.
            values: For each image an array (H, W) of numbers, a `.npy` file of floats, or a PNG file of 16 bits, of the
                size of the image, or of the image resized.

        Returns:
            The probe itself.

        Raises:
            ImageError: An image cannot be used.
            BrixelError: Values do not fit the images, or no pixel has one.
        """
        found = self._begin_fit(images)
        self._check_all(found, values)
        self._take_model(found)
        statistics, sums = ChannelStatistics(), RidgeSums()
        for target, feature_map in zip(values, progress_bar(self._maps(found), "maps", total=len(found)), strict=True):
            statistics.add(feature_map.features[None])
            means, weights = self._cell_values(feature_map, target)
            known = weights > 0
            if known.any():
                rows = feature_map.features.detach().flatten(1).T.cpu()[known]
                sums.add(rows, means[known], weights[known])
        if not sums.count:
            raise BrixelError(
                "no cell of the images has a value: their few pixels with one lie between the points read"
            )
        self.readout_ = sums.readout(statistics.standardised(), self.regularisation)
        return self

    def _check_all(self, images: Sequence[ProbeInput], values: Sequence[PixelTarget]) -> None:
        """Raise BrixelError where values do not fit the images, or no pixel has one."""
        known = 0
        for at, (image, target) in enumerate(zip(images, check_count(images, values, "arrays of values"), strict=True)):
            own = self._values(target)
            check_fits(image, target, own.shape, at)
            known += int(own.isfinite().sum())
        if not known:
            hint = ", and with log also those at 0 and below" if self.log else ""
            raise BrixelError(f"no pixel of {len(images)} images has a value: all are NaN or ignored{hint}")

    def _values(self, target: PixelTarget) -> Tensor:
        """What is fitted, (H, W): values or their logarithms, NaN for none."""
        values = read_values(target, self.png_unit, self.ignore_value)
        if not self.log:
            return values
        return torch.where(values > 0, values, torch.nan).log()

    def _cell_values(self, feature_map: FeatureMap, target: PixelTarget) -> tuple[Tensor, Tensor]:
        """The mean of each cell's points with a value, and their share of its points, (Hf*Wf,)."""
        values = self._values(target)
        points = points_of_cells(values, feature_map.grid_hw, stride_of(feature_map, values.shape))
        points = rearrange(points, "(h rows) (w columns) -> (h w) (rows columns)", rows=POINTS, columns=POINTS)
        shares = points.isfinite().double().mean(1)
        return points.double().nanmean(1), shares

    def predict(self, image: ProbeInput) -> npt.NDArray[np.float32]:
        """Predict the values of the pixels of an image.

        Args:
            image: An image of any kind, or its map.

        Returns:
            (H, W), float32, at the size of the image, turned upright by its EXIF data.

        Raises:
            NotFittedError: The probe is not fitted.
            ImageError: The image cannot be used.
        """
        return next(self.stream([image]))

    def _predicted(self, feature_map: FeatureMap) -> npt.NDArray[np.float32]:
        return self._pixels(feature_map, feature_map.image_hw).numpy()

    @plain_defaults()
    def _pixels(self, feature_map: FeatureMap, size_hw: Sequence[int]) -> Tensor:
        found = torch.cat([values[..., 0] for _, values in self._bands(feature_map, size_hw)])
        return found.exp() if self.log else found

    def score(self, images: Iterable[ProbeInput], values: Sequence[PixelTarget]) -> float:
        """R2 over all pixels with a value: 1 - the sum of squared errors / that of differences to their mean.

        Args:
            images: As for :meth:`fit`.
            values: As for :meth:`fit`.

        Raises:
            NotFittedError: The probe is not fitted.
            ImageError: An image cannot be used.
            BrixelError: Values do not fit the images, or no pixel has one.
        """
        return self.evaluate(images, values)["r2"]

    def evaluate(self, images: Iterable[ProbeInput], values: Sequence[PixelTarget]) -> dict[str, float]:
        """Compare predictions with values, over all pixels that have one, in their own unit.

        Args:
            images: As for :meth:`score`.
            values: As for :meth:`score`.

        Returns:
            "r2", "rmse", "mean_absolute_error", "pixels" and "images".

        Raises:
            BrixelError: As for :meth:`score`.
        """
        self._check_fitted()
        found: list[ProbeInput] = list(images)
        self._check_all(found, values)
        around, total, squares, errors, absolute, count = None, 0.0, 0.0, 0.0, 0.0, 0
        for target, feature_map in zip(values, progress_bar(self._maps(found), "maps", total=len(found)), strict=True):
            truth = read_values(target, self.png_unit, self.ignore_value)
            predicted = self._pixels(feature_map, truth.shape)
            known = truth.isfinite() & (truth > 0 if self.log else True)
            if not known.any():
                continue
            ours, theirs = predicted[known].double(), truth[known].double()
            around = float(theirs.mean()) if around is None else around
            total += float((theirs - around).sum())
            squares += float((theirs - around).square().sum())
            errors += float((ours - theirs).square().sum())
            absolute += float((ours - theirs).abs().sum())
            count += len(theirs)
        spread = squares - total**2 / count
        return {
            "r2": 1 - errors / spread if spread > 0 else math.nan,
            "rmse": math.sqrt(errors / count),
            "mean_absolute_error": absolute / count,
            "pixels": count,
            "images": len(found),
        }
