"""Frozen backbones: the ViT itself, the formats its weights come in, reading them."""
