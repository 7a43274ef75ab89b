"""Maps of folders of any length: files or shards, taken up where a run stopped, shared between processes."""

from brixel.extraction.map_folder import MapFolder
from brixel.extraction.run import extract_files
from brixel.extraction.todo import Report

__all__ = ["MapFolder", "Report", "extract_files"]
