"""The axis `regularizer`: the penalty that is added to the distortion.

Each choice maps an Inference to the penalty (B,), in nats per image. The loss is the mean of distortion + penalty over
the batch.
"""

from vae_cli.axes.regularizer.aggregate import DIP, MMD, Factor, TotalCorrelation
from vae_cli.axes.regularizer.autoencoder import Energy, GradientPenalty, Nothing
from vae_cli.axes.regularizer.base import Regularizer
from vae_cli.axes.regularizer.rate import KL, Capacity, FreeBits, ImportanceWeighted

__all__ = [
    "DIP",
    "KL",
    "MMD",
    "Capacity",
    "Energy",
    "Factor",
    "FreeBits",
    "GradientPenalty",
    "ImportanceWeighted",
    "Nothing",
    "Regularizer",
    "TotalCorrelation",
]
