"""Features of whole folders into files, one per picture; pictures that cannot be used are listed, not fatal."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from brixel.errors import BrixelError
from brixel.feature_map import FeatureMap
from brixel.features import BrixelFeatures


@dataclass
class Report:
    """What became of the pictures."""

    written: int = 0
    skipped: int = 0
    failures: list[tuple[Path, Exception]] = field(default_factory=list)


def extract_files(
    model: BrixelFeatures,
    pictures: Sequence[tuple[Path, Path]],
    folder: Path,
    *,
    ending: str = ".safetensors",
    overwrite: bool = False,
    batch_size: int = 1,
    short_side_px: int | str | None = None,
    memory_limit: int | str | None = None,
    tiles: str = "auto",
) -> Report:
    """Write the map of every picture to ``folder / place + ending``; pictures and places as `find_pictures` gives them.

    Files appear whole or not at all, so a run that was cut off goes on where it stopped; what exists is skipped unless
    ``overwrite``. The last three: see :meth:`BrixelFeatures.extract`. Raises OSError where a file cannot be written.
    """
    report = Report()
    outputs = [(picture, folder / place.with_name(place.name + ending)) for picture, place in pictures]
    todo = deque(each for each in outputs if overwrite or not each[1].exists())
    report.skipped = len(outputs) - len(todo)
    with tqdm(total=len(todo), unit="picture", disable=None) as bar:
        stream = partial(
            model.stream, batch_size=batch_size, short_side_px=short_side_px, memory_limit=memory_limit, tiles=tiles
        )
        for picture, output, result in _results(stream, todo):
            if isinstance(result, FeatureMap):
                output.parent.mkdir(parents=True, exist_ok=True)
                dataclasses.replace(result, meta={**result.meta, "picture": picture.name}).save(output)
                report.written += 1
            else:
                report.failures.append((picture, result))
            bar.update()
    return report


def _results(
    stream: Callable[[Iterator[Path]], Iterator[FeatureMap]], todo: deque[tuple[Path, Path]]
) -> Iterator[tuple[Path, Path, FeatureMap | Exception]]:
    """A map or the reason for having none, for each picture in order."""
    taken: deque[tuple[Path, Path]] = deque()

    def feed() -> Iterator[Path]:
        while todo:
            taken.append(todo.popleft())
            yield taken[-1][0]

    while todo:
        maps = stream(feed())
        try:
            for feature_map in maps:
                yield *taken.popleft(), feature_map
        except (BrixelError, FileNotFoundError) as error:  # of the last one taken: those before it came through
            yield *taken.popleft(), error
