"""Runs on disk: their folders and checkpoints, and functions to find, load, sample, list and resume them."""

__all__ = ["checkpoint", "codes", "find", "folder", "mixture", "pictures", "plan", "run", "table"]
