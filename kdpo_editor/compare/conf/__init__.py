"""Hydra configs of ``kdpo-compare``."""
