"""Noise that preserves the variance of the codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vae_cli.axes.schedule import Schedule
from vae_cli.axes.sigma.base import Sigma, noise_level
from vae_cli.core.values import Count
from vae_cli.machine import distributed
from vae_cli.model.scales import diagonal_normal

TINY = 1e-8  # added to variances: a dimension that is the same for all images stays 0
BELOW_1 = 1 - 1e-6  # at 1, the codes would be noise alone


class Preserving(Sigma):
    """N(sqrt(1 - value^2) m(x), value^2 I), with m(x) the encoder's output, standardized over the images.

    raw (B, D) is standardized in each dimension: with the mean and the variance of the batch in training, and with
    their moving averages in evaluation. So the codes have mean 0 and variance 1 at every noise level, as the prior N(0,
    I) has. With sigma=fixed, codes are wider than the prior or sigma is smaller than its scale; this mismatch is
    removed. Under N(0, I), the mean rate is -ln value nats per dimension, whatever the encoder does. The default,
    0.082, is the level of Unified Latents (Heek et al., Unified Latents: How to Train Your Latents, 2026).

    Raises UserError if the value, or any value that the schedule reaches, is less than 1e-6 or not below 1.
    """

    provides = Sigma.provides - {"separate"}

    def __init__(self, latent: Count, value: float | Schedule = 0.082) -> None:
        super().__init__()
        self.value = noise_level(value, BELOW_1)
        self.standardized = Standardizer(latent)

    def forward(self, raw: Tensor) -> Distribution:
        scale = self.value()
        loc = (1 - scale.square()).sqrt() * self.standardized(raw)
        return diagonal_normal(loc, scale, log_scale=scale.log())


class Standardizer(nn.Module):
    """Standardizes raw (B, D) in each dimension over the images: (raw - mean) / sqrt(variance).

    In training, these are the mean and the variance of the batch, over all processes. In evaluation, they are moving
    averages over about the last `images` training images; larger batches weigh more. Unlike torch's batch
    normalization, it standardizes a batch of one image, which has no variance: with the moving averages, as in
    evaluation. It also works with several processes on the CPU.
    """

    mean: Tensor  # (D,)
    variance: Tensor  # (D,)
    seen: Tensor  # the number of images that the moving averages cover, up to `images`

    def __init__(self, latent: int, images: int = 1000) -> None:
        super().__init__()
        self.images = images
        self.register_buffer("mean", torch.zeros(latent))
        self.register_buffer("variance", torch.ones(latent))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, raw: Tensor) -> Tensor:
        if not self.training:
            return (raw - self.mean) * (self.variance + TINY).rsqrt()
        count = distributed.size(raw)
        mean = distributed.mean(raw, 0)
        if count == 1:
            standardized = (raw - self.mean) * (self.variance + TINY).rsqrt()
            self._follow(mean.detach(), (mean.detach() - self.mean).square(), count)
            return standardized
        centered = raw - mean
        variance = distributed.mean(centered.square(), 0)
        self._follow(mean.detach(), variance.detach() * (count / (count - 1)), count)
        return centered * (variance + TINY).rsqrt()

    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Update the moving averages with the moments of a batch of `count` images. The first batch replaces the start
        values, and until `images` images have been seen, all images weigh the same."""
        share = count / (count + self.seen)
        self.mean.lerp_(mean, share)
        self.variance.lerp_(variance, share)
        self.seen.add_(count).clamp_max_(self.images)
