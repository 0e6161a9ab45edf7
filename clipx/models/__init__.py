"""The encoders, by hand: layers, the image tower, the text tower, and CLIP."""
