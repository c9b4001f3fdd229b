"""Train one run: the loop, its state, validation, divergence, and the output to TensorBoard and the terminal."""

__all__ = [
    "cards",
    "divergence",
    "interruption",
    "lifecycle",
    "loop",
    "meter",
    "outcome",
    "pictures",
    "progress",
    "provenance",
    "records",
    "repeat",
    "state",
    "step",
    "summary",
    "tensorboard",
    "validation",
]
