"""The axes of an experiment: one module per config group, with the classes that its choices build."""

__all__ = ["dataset", "likelihood", "network", "optimizer", "prior", "regularizer", "schedule", "sigma"]
