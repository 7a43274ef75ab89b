"""A segmentation probe: multinomial logistic regression on dense features, from masks or from a few clicks.

Shapes: D channels, K classes, n cells or clicks, Hf x Wf cells of a map, H x W pixels of an image.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brixel.errors import BrixelError
from brixel.feature_maps.feature_map import FeatureMap
from brixel.probe.base import COMMON_RULES, ModelInput, Probe, ProbeInput, stride_of
from brixel.probe.cells import cell_shares
from brixel.probe.metrics import IGNORE, confusion, intersection_union, mean_iou, pixel_accuracy
from brixel.probe.readouts import ChannelStatistics
from brixel.probe.solvers import softmax_readout
from brixel.probe.targets import Click, PixelTarget, check_count, check_fits, read_clicks, read_mask
from brixel.utils.fields import Rule, check_field, optional, several, table_of, text, whole_number
from brixel.utils.progress import progress_bar
from brixel.utils.torch_defaults import plain_defaults

MOST_CLASSES = 1024
_MOST_CELLS = 2**17  # that a fit keeps, in all
_MOST_BYTES = 2**28  # of their features
_LABEL = whole_number(-(2**63), 2**63)


class SegmentationProbe(Probe):
    """A linear classifier of the pixels of images, on dense features, with the manners of scikit-learn.

    Multinomial logistic regression with an L2 penalty, solved to convergence: it is the same at every fit, and works
    from three clicks a class. Features are standardised by all cells of the images that it is fitted to, labelled or
    not. Logits are interpolated bilinearly from cells to pixels.

    >>> probe = SegmentationProbe().fit(["a.jpg", "b.jpg"], ["a_mask.png", "b_mask.png"])
    >>> probe = SegmentationProbe().fit(["a.jpg"], clicks=[[(120, 88, 1), (30, 200, 0)]])
    >>> labels = probe.predict("c.jpg")  # (H, W)

    Args:
        model: A model; what ``BrixelFeatures.from_pretrained`` loads; None for the bundled model.
        ignore_label: The number in masks that means no label; None where every number is a class.
        regularisation: Weight of the penalty, see :func:`brixel.probe.solvers.softmax_readout`; 1 / C of scikit-learn.
        class_names: Names of classes, a list by number from 0, or a mapping from class to name; None for none.
        scale: Cells of a map per patch, on each axis, as for ``model.extract``.
        short_side_px: The short side that images are resized to, as for ``model.extract``.
        memory_limit: Of the model, as for ``model.extract``.
        batch_size: Images of one size that share a batch at most.
        seed: Of the choice of cells where masks have more than are kept: 131,072 in all, or 256 MiB of features.

    Attributes:
        classes_: The classes, ascending, (K,), int64.
    """

    KIND: ClassVar[str] = "segmentation"
    _RULES: ClassVar[Mapping[str, Rule]] = {
        **COMMON_RULES,
        "ignore_label": optional(_LABEL),
        "seed": _LABEL,
    }

    classes_: npt.NDArray[np.int64]

    def __init__(
        self,
        model: ModelInput = None,
        *,
        ignore_label: int | None = 255,
        regularisation: float = 0.1,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        scale: int | None = None,
        short_side_px: int | str | None = None,
        memory_limit: int | str | None = None,
        batch_size: int = 1,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.ignore_label = ignore_label
        self.regularisation = regularisation
        self.class_names = class_names
        self.scale = scale
        self.short_side_px = short_side_px
        self.memory_limit = memory_limit
        self.batch_size = batch_size
        self.seed = seed

    # -------------------------------------------------------------------------------------------- fitting

    @plain_defaults()
    def fit(
        self,
        images: Iterable[ProbeInput],
        masks: Sequence[PixelTarget] | None = None,
        *,
        clicks: Sequence[Sequence[Click]] | None = None,
    ) -> "SegmentationProbe":
        """Fit the probe to masks, or to clicks.

        Everything is checked before the first map is computed. Masks may be labelled in part.

        Args:
            images: Images of any kind, or their maps.
            masks: For each image an array (H, W) of whole numbers, or a PNG file of numbers or with a palette, of the
                size of the image, or of the image resized.
            clicks: In place of masks, for each image a list of (y, x, class) in pixels; it may be empty.

        Returns:
            The probe itself.

        Raises:
            ImageError: An image cannot be used.
            BrixelError: Masks or clicks do not fit the images, or hold fewer than two classes.
        """
        found = self._begin_fit(images)
        self._titles()
        if (masks is None) == (clicks is None):
            raise BrixelError("expected either masks or clicks, for each image one; give fit(images, masks)")
        if masks is not None:
            masks = check_count(found, masks, "masks")
            present = set().union(*(self._numbers(*pair, at) for at, pair in enumerate(zip(found, masks, strict=True))))
            what = "the masks"
        else:
            assert clicks is not None
            clicks = check_count(found, clicks, "lists of clicks")
            points = [read_clicks(*pair, at) for at, pair in enumerate(zip(clicks, found, strict=True))]
            present, what = {label for _, labels in points for label in labels}, "the clicks"
            if self.ignore_label in present:
                raise BrixelError(f"a click has the class {self.ignore_label}, which is ignore_label; give another")
        classes = self._checked_classes(present, what)
        self._take_model(found)
        statistics, rows, shares = ChannelStatistics(), [], []
        generator = torch.Generator().manual_seed(self.seed)
        for at, feature_map in enumerate(progress_bar(self._maps(found), "maps", total=len(found))):
            statistics.add(feature_map.features[None])
            if masks is not None:
                own_rows, own_shares = self._labelled_cells(
                    feature_map, masks[at], classes, _cells_per_image(len(found), feature_map.embed_dim), generator
                )
            else:
                own_rows = feature_map.at(points[at][0]).float()
                own_shares = torch.eye(len(classes))[np.searchsorted(classes, points[at][1])]
            rows.append(own_rows)
            shares.append(own_shares)
        self.readout_ = softmax_readout(
            statistics.standardised(), torch.cat(rows), torch.cat(shares), self.regularisation
        )
        self.classes_ = classes
        return self

    def _numbers(self, image: ProbeInput, mask: PixelTarget, at: int) -> set[int]:
        """The classes in a mask, which must fit its image."""
        numbers = read_mask(mask)
        check_fits(image, mask, numbers.shape, at)
        return set(numbers.unique().tolist()) - {self.ignore_label}

    def _checked_classes(self, present: set[int], what: str) -> npt.NDArray[np.int64]:
        classes = np.array(sorted(present), dtype=np.int64)
        if len(classes) < 2:
            found = f"only the class {classes[0]}" if len(classes) else "no class"
            hint = f" ({self.ignore_label} is ignore_label)" if self.ignore_label is not None else ""
            raise BrixelError(
                f"{what} hold {found}{hint}; expected two or more: label some of what is not of the class as well, as "
                "another number"
            )
        if len(classes) > MOST_CLASSES:
            raise BrixelError(
                f"{what} hold {len(classes)} different numbers; expected at most {MOST_CLASSES} classes: these look "
                "like numbers of instances, or values for a RegressionProbe"
            )
        return classes

    def _labelled_cells(
        self,
        feature_map: FeatureMap,
        mask: PixelTarget,
        classes: npt.NDArray[np.int64],
        most: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Features (n, D) and shares of classes (n, K) of the cells with a label, or of so many of them."""
        labels = self._indices(read_mask(mask), classes)
        shares = cell_shares(labels, len(classes), feature_map.grid_hw, stride_of(feature_map, labels.shape))  # K Hf*Wf
        chosen = (shares.sum(0) > 0).nonzero()[:, 0]
        if len(chosen) > most:
            chosen = chosen[torch.randperm(len(chosen), generator=generator)[:most].sort().values]
        rows = feature_map.features.detach().flatten(1)[:, chosen].T.float().cpu()
        return rows, shares[:, chosen].T

    def _indices(self, numbers: Tensor, classes: npt.NDArray[np.int64]) -> Tensor:
        """Numbers of a mask as places in ``classes``; IGNORE for the ignored one."""
        known = torch.from_numpy(classes)
        places = torch.searchsorted(known, numbers).clamp(max=len(known) - 1)
        return torch.where(known[places] == numbers, places, IGNORE)

    # -------------------------------------------------------------------------------------------- prediction

    def predict(self, image: ProbeInput) -> npt.NDArray[np.int64]:
        """Classify the pixels of an image.

        Args:
            image: An image of any kind, or its map.

        Returns:
            The class of every pixel, (H, W), at the size of the image, turned upright by its EXIF data.

        Raises:
            NotFittedError: The probe is not fitted.
            ImageError: The image cannot be used.
        """
        return next(self.stream([image]))

    def _predicted(self, feature_map: FeatureMap) -> npt.NDArray[np.int64]:
        return self.classes_[self._places(feature_map, feature_map.image_hw).numpy()]

    @plain_defaults()
    def predict_proba(self, image: ProbeInput) -> npt.NDArray[np.float32]:
        """The probabilities of classes at the pixels of an image.

        Args:
            image: As for :meth:`predict`.

        Returns:
            (K, H, W), float32, in the order of ``classes_``; they sum to one.

        Raises:
            NotFittedError: The probe is not fitted.
            ImageError: The image cannot be used.
        """
        self._check_fitted()
        feature_map = next(self._maps([image]))
        found = torch.empty(len(self.classes_), *feature_map.image_hw, dtype=torch.float32)
        for rows, logits in self._bands(feature_map, feature_map.image_hw):
            found[:, rows] = logits.softmax(-1).permute(2, 0, 1)
        return found.numpy()

    @plain_defaults()
    def _places(self, feature_map: FeatureMap, size_hw: Sequence[int]) -> Tensor:
        """The place in ``classes_`` of every pixel, (H, W)."""
        return torch.cat([logits.argmax(-1) for _, logits in self._bands(feature_map, size_hw)])

    # -------------------------------------------------------------------------------------------- evaluation

    def score(self, images: Iterable[ProbeInput], masks: Sequence[PixelTarget]) -> float:
        """The mean IoU: of the classes that occur in masks or predictions, with pixels counted over all images.

        Args:
            images: As for :meth:`fit`.
            masks: As for :meth:`fit`; a class that the probe does not know counts as 0.

        Raises:
            NotFittedError: The probe is not fitted.
            ImageError: An image cannot be used.
            BrixelError: Masks do not fit the images, or hold no label.
        """
        return float(self.evaluate(images, masks)["mean_iou"])

    def evaluate(self, images: Iterable[ProbeInput], masks: Sequence[PixelTarget]) -> dict[str, Any]:
        """Compare predictions with masks.

        Args:
            images: As for :meth:`score`.
            masks: As for :meth:`score`.

        Returns:
            "mean_iou", "pixel_accuracy", "iou_by_class" (by class; None for one that occurs in neither) and "images".

        Raises:
            BrixelError: As for :meth:`score`.
        """
        self._check_fitted()
        found: list[ProbeInput] = list(images)
        masks = check_count(found, masks, "masks")
        present = set().union(*(self._numbers(*pair, at) for at, pair in enumerate(zip(found, masks, strict=True))))
        if not present:
            raise BrixelError(f"{len(found)} masks hold no label to compare with")
        classes = np.array([*self.classes_, *sorted(present - set(self.classes_.tolist()))], dtype=np.int64)
        order = np.argsort(classes)
        counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)
        for mask, feature_map in zip(masks, progress_bar(self._maps(found), "maps", total=len(found)), strict=True):
            labels = self._indices(read_mask(mask), classes[order])
            predicted = torch.from_numpy(np.argsort(order))[self._places(feature_map, labels.shape)]
            counts += confusion(predicted, labels, len(classes))
        areas = intersection_union(counts)
        pairs = zip(classes[order].tolist(), *areas.tolist(), strict=True)
        return {
            "mean_iou": float(mean_iou(areas)),
            "pixel_accuracy": pixel_accuracy(counts),
            "iou_by_class": {label: both / either if either else None for label, both, either in pairs},
            "images": len(found),
        }

    # -------------------------------------------------------------------------------------------- names and files

    def name_of(self, label: int) -> str:
        """The name of a class; its number where it has none."""
        return self._titles().get(label, str(label))

    def _titles(self) -> dict[int, str]:
        """Names by class, checked."""
        names = self.class_names
        if names is None:
            return {}
        if not isinstance(names, Mapping):
            return dict(enumerate(check_field("class_names", names, several(text(), "a list of names", single=False))))
        found = check_field(
            "class_names", {str(label): name for label, name in names.items()}, table_of(text(), "names by class")
        )
        return {
            check_field("a class in class_names", int(label) if label.lstrip("-").isdecimal() else label, _LABEL): name
            for label, name in found.items()
        }

    def _saved_params(self) -> dict[str, Any]:
        titles = {str(label): name for label, name in self._titles().items()}
        return {**super()._saved_params(), "class_names": titles or None}

    def _learned(self) -> dict[str, Any]:
        return {"classes": self.classes_.tolist()}

    def _set_learned(self, learned: Mapping[str, Any], outputs: int) -> None:
        rule = several(_LABEL, "whole numbers, ascending, one for each output", single=False)
        classes = check_field("classes", learned.get("classes"), rule)
        if list(classes) != sorted(set(classes)) or len(classes) != outputs:
            raise BrixelError(f"classes are {list(classes)[:9]} for {outputs} outputs; expected {rule.expected}")
        self.classes_ = np.array(classes, dtype=np.int64)
        self.class_names = self._titles() or None


def _cells_per_image(images: int, width: int) -> int:
    return max(1, min(_MOST_CELLS, _MOST_BYTES // (4 * width)) // images)
