"""Helpers for all other packages: files, devices, memory, field validation, optional packages, tables, JSON, TOML."""
