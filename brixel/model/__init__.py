"""The trained part and the student: adapter, head, losses, and their configuration."""
