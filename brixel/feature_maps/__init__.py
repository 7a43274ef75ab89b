"""Feature maps: the class, its files, and its colours."""
