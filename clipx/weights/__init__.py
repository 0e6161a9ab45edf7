"""Checkpoints, and other projects' weights, in and out."""
