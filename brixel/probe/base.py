"""What probes of both kinds share: parameters as in scikit-learn, the model, maps of images, saving and loading.

Shapes: D channels, C outputs, Hf x Wf cells of a map, H x W pixels of an image.
"""

import importlib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

import numpy.typing as npt
import torch
from torch import Tensor, nn

from brixel.brixel_features import BrixelFeatures
from brixel.checkpoints.locate_files import DEFAULT
from brixel.errors import BrixelError, NotFittedError
from brixel.feature_maps.feature_map import FeatureMap
from brixel.images.load import ImageInput
from brixel.inference.stream import raise_errors, several_images
from brixel.probe.pixels import bands
from brixel.probe.probe_folder import MODEL, ModelRecord, check_is_probe_folder, read_probe, write_probe
from brixel.probe.readouts import Standardised, standardised_readout
from brixel.utils.fields import Rule, check_field, check_names, number, optional, path_like, short_repr, whole_number

ProbeInput: TypeAlias = ImageInput | FeatureMap
"""What probes take: an image of any kind, or the map of one, which is then not computed again."""

ModelInput: TypeAlias = BrixelFeatures | str | os.PathLike[str] | None
"""A model, what ``BrixelFeatures.from_pretrained`` loads, or None for the bundled model."""

_READOUT_VALUES = 2**24  # of a map that the readout takes at a time, about

COMMON_RULES: Mapping[str, Rule] = {
    "regularisation": number(above=0),
    "scale": optional(whole_number(1)),
    "batch_size": whole_number(1),
}


class Probe:
    """A linear readout of dense features that is fitted, kept and used; see :class:`SegmentationProbe`.

    Attributes:
        model_: The model whose features it reads; None where it was fitted on maps without one.
        readout_: From maps (B, D, h, w) to (B, C, h, w).
    """

    KIND: ClassVar[str]
    _RULES: ClassVar[Mapping[str, Rule]]

    model: ModelInput
    regularisation: float
    scale: int | None
    short_side_px: int | str | None
    memory_limit: int | str | None
    batch_size: int
    model_: BrixelFeatures | None
    readout_: nn.Sequential

    @classmethod
    def _names(cls) -> list[str]:
        return list(inspect.signature(cls).parameters)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters of the constructor, by name.

        Args:
            deep: As scikit-learn passes it; probes hold no estimators.
        """
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> Self:
        """Set parameters of the constructor. BrixelError for an unknown name."""
        check_names(params, self._names(), f"{type(self).__name__} has no parameter")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self)).parameters
        given = self.get_params()
        changed = {name: given[name] for name in given if name == "model" or given[name] != parameters[name].default}
        if isinstance(self.model, BrixelFeatures):
            changed["model"] = self.model.config.backbone.title
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "readout_")

    def __sklearn_tags__(self) -> Any:
        # only scikit-learn calls it; no estimator_type, since a mask is no label to stratify by
        found = importlib.import_module("sklearn.utils")
        return found.Tags(estimator_type=None, target_tags=found.TargetTags(required=True))

    # -------------------------------------------------------------------------------------------- fitting

    def _check_params(self) -> None:
        """Raise BrixelError for a parameter that is not allowed."""
        for name, rule in self._RULES.items():
            check_field(name, getattr(self, name), rule)

    def _begin_fit(self, images: Iterable[ProbeInput]) -> list[ProbeInput]:
        """The images of a fit as a list, once the parameters are checked; an earlier fit is forgotten."""
        self._check_params()
        vars(self).pop("readout_", None)
        found: list[ProbeInput] = list(images if _are_maps(images) else several_images(images))  # type: ignore[arg-type]
        if not found:
            raise BrixelError("no images to fit a probe to; expected at least one")
        return found

    def _take_model(self, images: Sequence[ProbeInput]) -> None:
        """Set ``model_`` for a fit to these images."""
        if isinstance(self.model, BrixelFeatures):
            self.model_ = self.model
        elif self.model is None:
            self.model_ = None if isinstance(images[0], FeatureMap) else BrixelFeatures.from_pretrained()
        else:
            self.model_ = BrixelFeatures.from_pretrained(self.model)

    # -------------------------------------------------------------------------------------------- prediction

    def stream(self, images: Iterable[ProbeInput]) -> Iterator[npt.NDArray[Any]]:
        """Predict many images, lazily and in order; see ``predict``.

        Args:
            images: Images of any kind, or their maps.

        Yields:
            What ``predict`` returns, for every image.

        Raises:
            NotFittedError: The probe is not fitted.
            ImageError: An image cannot be used; raised after the results of those before it.
        """
        return raise_errors(self.stream_all(images))

    def stream_all(self, images: Iterable[ProbeInput]) -> Iterator[npt.NDArray[Any] | Exception]:
        """Do what :meth:`stream` does, but go on after an image that cannot be used.

        Args:
            images: As for :meth:`stream`.

        Yields:
            What ``predict`` returns, or the error in its place.

        Raises:
            NotFittedError: The probe is not fitted.
        """
        self._check_fitted()
        results = self._maps_or_errors(images)
        return (each if isinstance(each, Exception) else self._predicted(each) for each in results)

    def _predicted(self, feature_map: FeatureMap) -> npt.NDArray[Any]:
        """The prediction for the pixels of a map's image."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------- maps

    def _maps(self, images: Iterable[ProbeInput]) -> Iterator[FeatureMap]:
        """The map of every image, in order; a map is its own."""
        return raise_errors(self._maps_or_errors(images))

    def _maps_or_errors(self, images: Iterable[ProbeInput]) -> Iterator[FeatureMap | Exception]:
        """The map of every image, or the error in its place."""
        if _are_maps(images):
            return map(_check_map, images)
        if self.model_ is None:
            raise BrixelError(
                "this probe was fitted on maps, without a model: give maps, or load it with model= to give images"
            )
        return self.model_.stream_all(
            several_images(images),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            scale=self.scale,
            short_side_px=self.short_side_px,
            memory_limit=self.memory_limit,
        )

    def _cells(self, feature_map: FeatureMap) -> Tensor:
        """What the readout gives for the cells of a map, (C, Hf, Wf), some rows at a time."""
        width = len(self.readout_[0].get_buffer("mean"))
        if feature_map.embed_dim != width:
            raise BrixelError(
                f"the map has {feature_map.embed_dim} channels, and the probe reads {width}; expected a map of the "
                "model that it was fitted with"
            )
        rows = max(1, _READOUT_VALUES // (width * feature_map.grid_hw[1]))
        with torch.no_grad():
            parts = feature_map.features.detach().cpu().split(rows, dim=1)
            return torch.cat([self.readout_(part.float()[None])[0] for part in parts], dim=1)

    def _bands(self, feature_map: FeatureMap, size_hw: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
        """The readout at the pixels of the image, or of the image resized to ``size_hw``; see :func:`bands`."""
        return bands(self._cells(feature_map), stride_of(feature_map, size_hw), size_hw)

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit, or load one with load")

    # -------------------------------------------------------------------------------------------- files

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the probe into a folder: `probe.safetensors`, and last `probe.json`, each whole or not at all.

        A model that was given by its name is named; of a model that was given as an object, `model/` holds what
        ``save_pretrained`` writes, which names the backbone and does not copy it.

        Args:
            folder: Where to write; made if it is missing. A probe that is there is replaced.

        Raises:
            NotFittedError: The probe is not fitted.
            BrixelError: ``folder`` is a file, or holds something else.
        """
        self._check_fitted()
        path: Path = check_field("folder", folder, path_like())
        check_is_probe_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        names = {"mean": "0.mean", "deviation": "0.deviation", "weight": "1.weight", "bias": "1.bias"}
        state = self.readout_.state_dict()
        flat = {name: state[key].flatten(1 if name == "weight" else 0) for name, key in names.items()}
        record = None if self.model_ is None else ModelRecord.of(self.model_, self._model_name())
        if self.model_ is not None and self._model_name() is None:
            self.model_.save_pretrained(path / MODEL)
        write_probe(path, flat, self.KIND, self._saved_params(), self._learned(), record)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        model: BrixelFeatures | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
    ) -> Self:
        """Read a probe that :meth:`save` wrote, with its model.

        Args:
            folder: The folder.
            model: The model, where it is loaded already, or is no longer where the probe was saved with.
            device: Of the model, where none is given, as for ``BrixelFeatures.from_pretrained``.
            dtype: As ``device``.

        Returns:
            The fitted probe.

        Raises:
            MissingFileError: A file is not there.
            DamagedFileError: A file is damaged, or not of this probe.
            CheckpointError: The model is another one than the probe was fitted with, or the probe of another kind.
            BrixelError: ``folder`` is no path.
        """
        path: Path = check_field("folder", folder, path_like())
        saved = read_probe(path, cls.KIND)
        with saved.checking():
            check_names(saved.params, cls._names(), "unknown parameter")
            probe = cls(**saved.params)
            probe._check_params()
            probe._set_learned(saved.learned, outputs=len(saved.tensors["weight"]))
        probe.model = probe.model_ = saved.find_model(model, device=device, dtype=dtype)
        if saved.model is not None and saved.model.name is not None and model is None:
            probe.model = saved.model.name
        scale = Standardised(saved.tensors["mean"], saved.tensors["deviation"])
        probe.readout_ = standardised_readout(scale, saved.tensors["weight"], saved.tensors["bias"])
        return probe

    def _model_name(self) -> str | None:
        """What loads the model again: a name, or an absolute path; None for one that was given as an object."""
        if self.model is None:
            return DEFAULT
        if isinstance(self.model, BrixelFeatures):
            return None
        return os.path.abspath(self.model) if os.path.isdir(self.model) else os.fspath(self.model)

    def _saved_params(self) -> dict[str, Any]:
        params = {name: value for name, value in self.get_params().items() if name != "model"}
        return {name: value.item() if hasattr(value, "item") else value for name, value in params.items()}

    def _learned(self) -> dict[str, Any]:
        """What was learned beside the weights, as JSON values."""
        return {}

    def _set_learned(self, learned: Mapping[str, Any], outputs: int) -> None:
        """The inverse of :meth:`_learned`, of values from a file. BrixelError where they are not allowed."""
        check_names(learned, (), "unknown field")
        if outputs != 1:
            raise BrixelError(f"it has weights for {outputs} outputs; expected 1")


def stride_of(feature_map: FeatureMap, size_hw: Sequence[int]) -> tuple[float, float]:
    """The cells' distance (y, x) in pixels of the image resized to ``size_hw``."""
    (step_y, step_x), (height, width) = feature_map.stride, feature_map.image_hw
    return step_y * size_hw[0] / height, step_x * size_hw[1] / width


def _are_maps(images: object) -> bool:
    if isinstance(images, FeatureMap):
        raise BrixelError("one map was given; expected several, such as a list: give [feature_map]")
    return isinstance(images, Sequence) and bool(images) and isinstance(images[0], FeatureMap)


def _check_map(image: ProbeInput) -> FeatureMap:
    if not isinstance(image, FeatureMap):
        raise BrixelError(f"after maps came {short_repr(image)}; expected maps alone, or images alone")
    return image
