"""Checkpoints, and conversion to and from other projects' weights."""
