"""Small helpers that every other package may use: files, devices, memory, TOML."""
