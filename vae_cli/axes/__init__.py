"""What a word on the command line chooses: one module for each axis, as one folder in configs/."""

__all__ = ["dataset", "likelihood", "network", "optimizer", "prior", "regularizer", "schedule", "sigma"]
