"""The axes of an experiment: one module for each group of configs/, one class for each choice."""

__all__ = ["dataset", "likelihood", "network", "optimizer", "prior", "regularizer", "schedule", "sigma"]
