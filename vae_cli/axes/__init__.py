"""The axes of an experiment: one module per config group, such as `sigma`, with the classes of the group's choices."""

__all__ = ["dataset", "likelihood", "network", "optimizer", "prior", "regularizer", "schedule", "sigma"]
