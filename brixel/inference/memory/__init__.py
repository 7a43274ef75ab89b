"""Forward passes within a memory limit."""
