"""Images in, feature maps out."""
