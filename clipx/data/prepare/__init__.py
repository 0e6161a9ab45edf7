"""Pack image-text pairs of any layout into indexed shards."""
