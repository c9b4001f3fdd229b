"""Who sets the encoder's noise: all choices of the axis `sigma`.

z = loc(x) + sigma * epsilon, epsilon ~ N(0, I). Each choice turns the network's output for an image into q(z|x), a
distribution of batch (B,) and event (D,). `raw_size` says how many numbers it reads for each latent dimension.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.distributions import Distribution

from vae_cli.axes.schedule import Schedule, as_schedule
from vae_cli.core.errors import UserError
from vae_cli.core.values import Count
from vae_cli.model.distributions import Delta
from vae_cli.model.scales import LearnedScale, bounded_exp, diagonal_normal

LEAST, MOST = 1e-6, 1e6  # of a hard-coded scale: its square, and the inverse of that, stay within float32


class Sigma(nn.Module):
    """A family of posteriors: forward maps raw (B, raw_size * D) to q(z|x).

    provides  "noise" unless the posterior is a point mass, for which rate and ELBO are not defined
    """

    raw_size: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset({"noise"})


class Learned(Sigma):
    """N(loc(x), scale(x)^2): the encoder sets loc and log scale of every image and dimension (Kingma and Welling 2014).

    raw (B, 2 * D) holds the D locations and then the D logarithms of the scales.
    """

    raw_size = 2

    def forward(self, raw: Tensor) -> Distribution:
        loc, log_scale = raw.chunk(2, -1)
        return diagonal_normal(loc, bounded_exp(log_scale))


class Shared(Sigma):
    """N(loc(x), s^2): s is one learned vector, the same for all images. It begins at 1."""

    def __init__(self, latent: Count) -> None:
        super().__init__()
        self.scale = LearnedScale(latent)

    def forward(self, raw: Tensor) -> Distribution:
        return diagonal_normal(raw, self.scale())


class Fixed(Sigma):
    """N(loc(x), value^2): a hard-coded constant or a schedule, in which no parameter has a say.

    Raises UserError where the value is, or becomes, less than 1e-6 or more than 1e6.
    """

    def __init__(self, value: float | Schedule = 1.0) -> None:
        super().__init__()
        self.value = as_schedule(value)
        least, most = self.value.bounds()
        if least >= LEAST and most <= MOST:
            return
        allowed = f"the noise has a scale between {LEAST:g} and {MOST:g}"
        if least != most:
            raise UserError(
                f"sigma.value goes from {least:g} to {most:g}, and {allowed}: say where the schedule starts and stops, "
                "for example sigma.value.start=0.1 sigma.value.stop=1."
            )
        none = " For no noise at all type sigma=deterministic." if least < LEAST else ""
        raise UserError(f"sigma.value={least:g} is not allowed: {allowed}.{none}")

    def forward(self, raw: Tensor) -> Distribution:
        return diagonal_normal(raw, self.value())


class Deterministic(Sigma):
    """A point mass at loc(x): no epsilon, and no random number is drawn."""

    provides = frozenset()

    def forward(self, raw: Tensor) -> Distribution:
        return Delta(raw)
