"""What `vae evaluate` measures: one class for each metric."""

__all__ = [
    "base",
    "classifiers",
    "derivatives",
    "disentanglement",
    "dither",
    "evaluate",
    "factors",
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
