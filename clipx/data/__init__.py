"""Data: from files to chunks of uint8 images and packed tokens, in a reproducible order."""
