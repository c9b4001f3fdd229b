"""`vae compare`: set finished runs side by side."""

from vae_cli.comparison.compare import compare as main

__all__ = ["main"]
