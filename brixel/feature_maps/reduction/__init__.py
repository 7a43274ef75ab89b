"""Reduction of feature maps: fewer channels, fewer cells, fewer bits, or only points and regions."""
