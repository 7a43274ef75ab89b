"""brixel: dense feature maps from frozen vision transformers, at four times their grid."""
