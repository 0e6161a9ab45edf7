"""A training run: the loop, what happens between its steps, and what it leaves on disk."""
