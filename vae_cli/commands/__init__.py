"""One module for each subcommand: its options, its examples, and what it does."""

__all__ = ["compare", "evaluate", "indices", "interpolate", "output", "repeat", "runs", "sample", "train"]
