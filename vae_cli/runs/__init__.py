"""Runs on disk: their folders and checkpoints, and functions to find, load, sample, export, list and resume them."""

__all__ = [
    "checkpoint",
    "codes",
    "export",
    "export_folder",
    "find",
    "folder",
    "mixture",
    "pictures",
    "plan",
    "run",
    "second_stage",
    "table",
]
