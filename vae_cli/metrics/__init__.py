"""What `vae evaluate` measures: one class for each metric."""

__all__ = [
    "base",
    "classifiers",
    "derivatives",
    "disentanglement",
    "evaluate",
    "evaluate_codes",
    "factors",
    "features",
    "given_decoder",
    "information",
    "neighbours",
    "price",
    "quality",
    "record",
    "scale_factor",
    "scales",
    "shortcuts",
    "stored_codes",
    "table",
    "tolerance",
]
