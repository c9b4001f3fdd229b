"""One training: the loop, its state, validation, what TensorBoard shows, and what the terminal says."""

__all__ = [
    "divergence",
    "interruption",
    "lifecycle",
    "loop",
    "meter",
    "pictures",
    "progress",
    "provenance",
    "repeat",
    "state",
    "summary",
    "tensorboard",
    "validation",
]
