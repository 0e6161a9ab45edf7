"""Image-text pairs of any layout, packed into indexed shards."""
