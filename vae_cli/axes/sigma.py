"""The axis `sigma`: how sigma, the scale of the noise in z = loc(x) + sigma * epsilon, epsilon ~ N(0, I), is set.

Each choice maps the encoder's output raw (B, raw_size * D) to q(z|x), a distribution with batch shape (B,) and event
shape (D,).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.distributions import Distribution

from vae_cli.axes.schedule import Schedule, as_schedule
from vae_cli.core.errors import UserError
from vae_cli.core.values import Count
from vae_cli.model.distributions import Delta
from vae_cli.model.scales import LearnedScale, bounded, diagonal_normal

LEAST, MOST = 1e-6, 1e6  # bounds of a fixed scale: scale^2 and 1 / scale^2 do not overflow or underflow in float32


class Sigma(nn.Module):
    """A family of posteriors: forward maps raw (B, raw_size * D) to q(z|x).

    raw_size  number of encoder outputs per latent dimension
    provides  "noise", unless the posterior is a point mass, for which rate and ELBO are not defined
    """

    raw_size: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset({"noise"})


class Learned(Sigma):
    """N(loc(x), scale(x)^2): the encoder outputs a location and a scale for each latent dimension.

    raw (B, 2 * D) contains the D locations, then the D log scales. Kingma and Welling, Auto-Encoding Variational Bayes,
    ICLR 2014.
    """

    raw_size = 2

    def forward(self, raw: Tensor) -> Distribution:
        loc, log_scale = raw.chunk(2, -1)
        log_scale = bounded(log_scale)
        return diagonal_normal(loc, log_scale.exp(), log_scale=log_scale)


class Shared(Sigma):
    """N(loc(x), s^2): one learned scale per latent dimension, s (D,), the same for all images.

    s starts at 1. raw (B, D) is loc(x).
    """

    def __init__(self, latent: Count) -> None:
        super().__init__()
        self.scale = LearnedScale(latent)

    def forward(self, raw: Tensor) -> Distribution:
        log_scale = self.scale.log()
        return diagonal_normal(raw, log_scale.exp(), log_scale=log_scale)


class Fixed(Sigma):
    """N(loc(x), value^2): the scale is a constant or a schedule, not learned. raw (B, D) is loc(x).

    The default, 1.0, is the scale of the standard normal prior. The CV-VAE (Ghosh et al., From Variational to
    Deterministic Autoencoders, ICLR 2020) uses a hand-tuned constant. Raises UserError if the value, or any value that
    the schedule reaches, is less than 1e-6 or more than 1e6.
    """

    def __init__(self, value: float | Schedule = 1.0) -> None:
        super().__init__()
        self.value = as_schedule(value)
        least, most = self.value.bounds()
        if least >= LEAST and most <= MOST:
            return
        allowed = f"the scale of the noise must be between {LEAST:g} and {MOST:g}"
        if least != most:
            raise UserError(
                f"sigma.value goes from {least:g} to {most:g}, but {allowed}: set the schedule's start and stop to "
                "values in this range, for example sigma.value.start=0.1 sigma.value.stop=1."
            )
        none = " For no noise at all, type sigma=deterministic." if least < LEAST else ""
        raise UserError(f"sigma.value={least:g} is not allowed: {allowed}.{none}")

    def forward(self, raw: Tensor) -> Distribution:
        scale = self.value()
        return diagonal_normal(raw, scale, log_scale=scale.log())


class Deterministic(Sigma):
    """A point mass at loc(x): z = loc(x), without noise; no random number is drawn. raw (B, D) is loc(x)."""

    provides = frozenset()

    def forward(self, raw: Tensor) -> Distribution:
        return Delta(raw)
