"""From files to chunks of uint8 pictures and trimmed tokens, in one repeatable order."""
