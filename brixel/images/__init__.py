"""Images: finding and reading them, the patch grid, preprocessing, and crops for training."""
