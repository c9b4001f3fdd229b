"""What `vae evaluate` measures: one class for each metric."""

__all__ = [
    "base",
    "classifiers",
    "derivatives",
    "disentanglement",
    "evaluate",
    "factors",
    "features",
    "information",
    "neighbours",
    "price",
    "quality",
    "record",
    "scales",
    "second_stage",
    "shortcuts",
    "table",
    "tolerance",
]
