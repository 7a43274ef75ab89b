"""Rasters: georeferenced images and slides of any size, window by window, into feature rasters."""
