"""Train one run: the loop, its state, validation, divergence, and what TensorBoard and the terminal show."""

__all__ = [
    "divergence",
    "interruption",
    "lifecycle",
    "loop",
    "meter",
    "outcome",
    "pictures",
    "progress",
    "provenance",
    "repeat",
    "state",
    "step",
    "summary",
    "tensorboard",
    "validation",
]
