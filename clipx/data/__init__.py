"""Data: from files to chunks of uint8 images and trimmed tokens, in a reproducible order."""
