"""What several test files need."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
"""Reference material beside the checkout; tests that need it carry the marker `shared`."""
