"""Files with the maps of many images, keyed by the image's relative path, one module per format."""
