"""Finding the image files in folders."""

from collections.abc import Sequence
from pathlib import Path

from brixel.errors import BrixelError

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".j2k", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
"""Suffixes of images in a folder; files that are named one by one may have others."""

SCENE = Path(__file__).parents[1] / "assets" / "scene.jpg"
"""The bundled example image, a drawing."""


def is_hidden(path: Path) -> bool:
    """Whether a name starts with a dot, as hidden files do and the `._NAME` files that macOS puts beside others."""
    return path.name.startswith(".")


def find_images(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Find images, in a fixed order.

    Folders are searched recursively, except for files and folders that start with a dot.

    Args:
        paths: Images and folders.

    Returns:
        Pairs of an image and its relative path below an output folder: its path inside the searched folder, or its name
        for an image that was given itself.

    Raises:
        BrixelError: A path does not exist, a folder holds no images, or two images have the same relative path.
    """
    found: dict[Path, Path] = {}
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise BrixelError(f"no image or folder at {path}")
        images = _images_in(path) if path.is_dir() else [path]
        if not images:
            raise BrixelError(f"no images in {path}; looked for {', '.join(IMAGE_SUFFIXES)}")
        for image in images:
            if image.resolve() in seen:  # given twice, or in two of the folders
                continue
            seen.add(image.resolve())
            relative = image.relative_to(path) if path.is_dir() else Path(image.name)
            if relative in found:
                raise BrixelError(
                    f"{found[relative]} and {image} would both be written as {relative}; extract them separately"
                )
            found[relative] = image
    return [(image, relative) for relative, image in found.items()]


def _images_in(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(path for path in files if not any(part[0] == "." for part in path.relative_to(folder).parts))
