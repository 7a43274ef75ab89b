"""Images in: found, read, and prepared for the patch grid."""
