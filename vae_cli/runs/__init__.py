"""A run on disk: its folder and checkpoints, how it is found, read back, sampled and continued."""

__all__ = ["checkpoint", "codes", "find", "folder", "pictures", "plan", "run", "table"]
