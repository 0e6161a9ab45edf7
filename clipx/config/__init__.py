"""From command-line arguments to plain typed values; only this package and the commands know Hydra and OmegaConf."""
