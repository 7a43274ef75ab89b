"""Maps of folders of any length: files or shards, taken up where a run stopped, shared between processes."""

from brixel.extraction.extract import extract_files
from brixel.extraction.map_folder import MapFolder
from brixel.extraction.pending_images import ExtractionSummary

Report = ExtractionSummary  # the name in version 0.1

__all__ = ["ExtractionSummary", "MapFolder", "Report", "extract_files"]
