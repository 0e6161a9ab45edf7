"""The Hydra config groups; installed as ``clipx.conf``."""
