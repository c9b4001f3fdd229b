"""A run on disk: its folder and checkpoints, how it is found, read back and continued."""

__all__ = ["checkpoint", "codes", "find", "folder", "plan", "run"]
