"""Extraction of image folders into files or shards of maps, which continues where it stopped, in several processes."""

from brixel.extraction.extract import extract_files
from brixel.extraction.map_folder import MapFolder
from brixel.extraction.pending_images import ExtractionSummary

Report = ExtractionSummary  # the name in version 0.1

__all__ = ["ExtractionSummary", "MapFolder", "Report", "extract_files"]


def __dir__() -> list[str]:
    return sorted(__all__)
