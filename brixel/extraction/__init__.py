"""Maps of folders of any length: files or shards, taken up where a run stopped, shared between processes."""

from brixel.extraction.extract import extract_files
from brixel.extraction.map_folder import MapFolder
from brixel.extraction.pending_images import Report

__all__ = ["MapFolder", "Report", "extract_files"]
