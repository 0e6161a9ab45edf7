"""The encoders: layers, image tower, text tower, and CLIP."""
