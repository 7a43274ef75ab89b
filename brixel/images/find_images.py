"""Which files below a folder are pictures, and where each belongs."""

from collections.abc import Sequence
from pathlib import Path

from brixel.errors import BrixelError

# what counts as a picture in a folder; a file that is named itself is always tried
PICTURES = (
    *(".avif", ".bmp", ".gif", ".j2k", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)

SCENE = Path(__file__).parents[1] / "assets" / "scene.jpg"  # a drawing of ours, for where no picture is given


def find_pictures(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Pictures with the place that each takes below the output folder, in a fixed order.

    Folders are searched through, but for what a leading dot hides, and keep their inner structure; a file goes by its
    name. Raises BrixelError for a path that does not exist, for a folder without pictures, and where two pictures would
    take one place.
    """
    found: dict[Path, Path] = {}
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise BrixelError(f"no picture or folder at {path}")
        inside = _pictures_in(path) if path.is_dir() else [path]
        if not inside:
            raise BrixelError(f"no pictures in {path}; looked for {', '.join(PICTURES)}")
        for picture in inside:
            if picture.resolve() in seen:  # named twice, or below two of the folders
                continue
            seen.add(picture.resolve())
            place = picture.relative_to(path) if path.is_dir() else Path(picture.name)
            if place in found:
                raise BrixelError(f"{found[place]} and {picture} would both be written as {place}; extract them apart")
            found[place] = picture
    return [(picture, place) for place, picture in found.items()]


def _pictures_in(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    return sorted(path for path in files if not any(part[0] == "." for part in path.relative_to(folder).parts))
