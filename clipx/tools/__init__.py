"""Implementation of the commands other than train."""
