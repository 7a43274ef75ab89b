"""Images of coloured blocks, and their classes, for the tests of probes."""

import numpy as np

COLOURS = np.array([[20, 30, 200], [250, 40, 20], [30, 220, 60]], np.uint8)


def blocks(seed, height=24, width=32, classes=3):
    """An image of blocks in noisy colours, (H, W, 3), and its classes, (H, W)."""
    numbers = np.random.default_rng(seed)
    labels = numbers.integers(0, classes, (height // 8, width // 8)).repeat(8, 0).repeat(8, 1)
    labels[0, :classes] = np.arange(classes)  # all of them
    noise = numbers.integers(-15, 16, (height, width, 3))
    return (COLOURS[labels].astype(int) + noise).clip(0, 255).astype(np.uint8), labels
