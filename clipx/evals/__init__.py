"""What a model is worth: each evaluation takes the encoded validation set and gives numbers by name."""
