"""Which files below a folder are images, and where each belongs."""

from collections.abc import Sequence
from pathlib import Path

from brixel.errors import BrixelError

# what counts as an image in a folder; a file that is named itself is always tried
IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".j2k", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)

SCENE = Path(__file__).parents[1] / "assets" / "scene.jpg"  # a drawing of ours, for where no image is given


def find_images(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Images with the place that each takes below the output folder, in a fixed order.

    Folders are searched through, but for what a leading dot hides, and keep their inner structure; a file goes by its
    name. Raises BrixelError for a path that does not exist, for a folder without images, and where two images would
    take one place.
    """
    found: dict[Path, Path] = {}
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise BrixelError(f"no image or folder at {path}")
        inside = _images_in(path) if path.is_dir() else [path]
        if not inside:
            raise BrixelError(f"no images in {path}; looked for {', '.join(IMAGE_SUFFIXES)}")
        for image in inside:
            if image.resolve() in seen:  # named twice, or below two of the folders
                continue
            seen.add(image.resolve())
            place = image.relative_to(path) if path.is_dir() else Path(image.name)
            if place in found:
                raise BrixelError(f"{found[place]} and {image} would both be written as {place}; extract them apart")
            found[place] = image
    return [(image, place) for place, image in found.items()]


def _images_in(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(path for path in files if not any(part[0] == "." for part in path.relative_to(folder).parts))
