"""The axis `sigma`: the noise that turns an image's location loc(x) into its code z, and how its scale is set.

Each choice maps the encoder's output raw (B, raw_size * D) to q(z|x), a distribution with batch shape (B,) and event
shape (D,). Most are normal: z = loc(x) + sigma * epsilon, epsilon ~ N(0, I).
"""

from vae_cli.axes.sigma.base import Sigma
from vae_cli.axes.sigma.normal import Bounded, Fixed, Isotropic, Learned, Shared
from vae_cli.axes.sigma.other import Deterministic, Interpolated, PowerSpherical, Random, Uniform
from vae_cli.axes.sigma.preserving import Preserving

__all__ = [
    "Bounded",
    "Deterministic",
    "Fixed",
    "Interpolated",
    "Isotropic",
    "Learned",
    "PowerSpherical",
    "Preserving",
    "Random",
    "Shared",
    "Sigma",
    "Uniform",
]
