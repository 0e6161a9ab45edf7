"""Evaluations: each scores encoded pictures and captions and returns metrics by name."""
