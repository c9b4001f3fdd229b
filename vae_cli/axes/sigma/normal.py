"""Normal noise, independent in each dimension: its scale is learned, bounded, or set by hand."""

from __future__ import annotations

import math

from torch import Tensor
from torch.distributions import Distribution

from vae_cli.axes.schedule import Schedule
from vae_cli.axes.sigma.base import LEAST, MOST, Sigma, noise_level
from vae_cli.core.errors import UserError
from vae_cli.core.values import Count
from vae_cli.model.scales import LearnedScale, bounded, diagonal_normal


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


class Isotropic(Sigma):
    """N(loc(x), s(x)^2 I): the encoder outputs one scale for each image, the same in all dimensions.

    raw (B, 2 * D) contains the D locations, then D numbers whose mean is ln s(x). A single number would do as well: a
    mean of D linear outputs is a linear output, too. With D of them, the encoder has the same layers as with
    sigma=learned.
    """

    raw_size = 2

    def forward(self, raw: Tensor) -> Distribution:
        loc, outputs = raw.chunk(2, -1)
        log_scale = bounded(outputs.mean(-1, keepdim=True))
        return diagonal_normal(loc, log_scale.exp(), log_scale=log_scale)


class Bounded(Sigma):
    """N(loc(x), scale(x)^2) with a learned scale between `least` and `most`:

        ln scale = ln least + (ln most - ln least) sigmoid(raw)

    raw (B, 2 * D) contains the D locations, then the D numbers of this formula. The defaults, 0.1 and 0.9, start the
    scale at their geometric mean, 0.3. `least` limits the information in a code. `most` = u < 1 prevents posterior
    collapse: under the prior N(0, I), each dimension has a rate of at least (u^2 - 1 - ln u^2) / 2, the committed rate
    of the delta-VAE: 0.01 nats for u = 0.9, 0.32 for u = 0.5. Razavi et al., Preventing Posterior Collapse with
    delta-VAEs, ICLR 2019.

    Raises UserError unless 1e-6 <= least < most <= 1e6.
    """

    raw_size = 2

    def __init__(self, least: float = 0.1, most: float = 0.9) -> None:
        super().__init__()
        if not LEAST <= least < most <= MOST:
            raise UserError(
                f"sigma.least={least:g} sigma.most={most:g} is not allowed: they must be between {LEAST:g} and "
                f"{MOST:g}, and sigma.least must be below sigma.most, for example sigma.least=0.1 sigma.most=0.9."
            )
        self.start, self.length = math.log(least), math.log(most / least)

    def forward(self, raw: Tensor) -> Distribution:
        loc, outputs = raw.chunk(2, -1)
        log_scale = self.start + self.length * outputs.sigmoid()
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
        self.value = noise_level(value)

    def forward(self, raw: Tensor) -> Distribution:
        scale = self.value()
        return diagonal_normal(raw, scale, log_scale=scale.log())
