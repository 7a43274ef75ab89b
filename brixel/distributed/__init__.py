"""Extraction on many machines, by an engine that others keep."""
