"""What `vae evaluate` measures: one class for each metric."""

__all__ = [
    "base",
    "classifiers",
    "evaluate",
    "features",
    "information",
    "neighbours",
    "price",
    "quality",
    "record",
    "scales",
    "shortcuts",
    "table",
    "tolerance",
]
