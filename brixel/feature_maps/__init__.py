"""Feature maps: the class, its file formats, colours of principal components, and panels."""
