"""Shards on servers, and their bounded local cache."""
