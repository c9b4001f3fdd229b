"""The axis `likelihood`: what the decoder's output means as a distribution over pixels.

Each choice maps the decoder's output raw (*S, B, raw_size * C, H, W) to p(x|z), a distribution of batch (*S, B) and
event (C, H, W). Log-probabilities are in nats per image.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions import Laplace as LaplaceDistribution
from torch.distributions import Normal as NormalDistribution

from vae_cli.axes.schedule import Number, Schedule, as_schedule
from vae_cli.core.compatibility import Need
from vae_cli.core.values import Interval
from vae_cli.machine import distributed
from vae_cli.model.distributions import (
    ContinuousBernoulliDistribution,
    DiscretizedLogisticDistribution,
    FastBernoulli,
    over_pixels,
)
from vae_cli.model.scales import LOG_SCALE_BOUND, LearnedScale

GREY_VALUES = Need("dataset", "unit_interval", "its values are not between 0 and 1; type likelihood=gaussian")

Scale = Annotated[float, Interval(1e-6, 1e6)] | Schedule | Literal["learned", "optimal"]


class Likelihood(nn.Module):
    """A family of likelihoods: forward maps raw (*S, B, raw_size * C, H, W) to p(x|z).

    raw_size  how many numbers the decoder outputs per pixel and channel
    """

    raw_size: ClassVar[int] = 1
    needs: ClassVar[tuple[Need, ...]] = ()

    def observe(self, x: Tensor) -> Tensor:
        """Return what the likelihood models of images (B, C, H, W) with values in [0, 1]: the same shape."""
        return x

    def start(self, mean: Tensor, spread: float) -> Tensor:
        """Return the raw output (raw_size * C, H, W) that fits the training images best without any code.

        mean (C, H, W) is their mean, spread the root mean squared distance of their pixels from it. The likelihood's
        own parameters, if it has any, are set to fit too.
        """
        return mean

    def fit(self, x: Tensor, raw: Tensor) -> None:
        """Update, from a training batch, parameters that have a closed form and no gradient; most have none.

        x (B, C, H, W) is observed, raw (*S, B, raw_size * C, H, W) the decoder's output for it.
        """


class Bernoulli(Likelihood):
    """A Bernoulli per pixel: log p(x|z) = sum (x ln p + (1 - x) ln(1 - p)) with p = sigmoid(raw).

    Gray values are used as they are, which makes this a cross-entropy, unless they are binarized: `dynamic` draws a new
    binary image each time an image is used, in evaluation too (Burda et al., Importance Weighted Autoencoders, ICLR
    2016); `threshold` sets pixels above 1/2 to 1 and all others to 0.
    """

    needs = (GREY_VALUES,)

    def __init__(self, binarize: Literal["none", "dynamic", "threshold"] = "none") -> None:
        super().__init__()
        self.binarize = binarize

    def observe(self, x: Tensor) -> Tensor:
        if self.binarize == "dynamic":
            return torch.bernoulli(x)
        if self.binarize == "threshold":
            return (x > 0.5).to(x.dtype)
        return x

    def start(self, mean: Tensor, spread: float) -> Tensor:
        return mean.clamp(1e-3, 1 - 1e-3).logit()

    def forward(self, raw: Tensor) -> Distribution:
        return FastBernoulli(raw)


class ContinuousBernoulli(Likelihood):
    """p(x|z) = prod C(p) p^x (1 - p)^(1 - x) with p = sigmoid(raw): a proper density of gray values in [0, 1].

    C(p) normalizes what the Bernoulli leaves unnormalized. Loaiza-Ganem and Cunningham, The continuous Bernoulli,
    NeurIPS 2019.
    """

    needs = (GREY_VALUES,)

    def start(self, mean: Tensor, spread: float) -> Tensor:
        # No closed form gives the logit for a mean. The derivative of the mean is the variance, so this is Newton's
        # method, with its step clamped because the curve is nearly flat at the ends.
        mean = mean.clamp(0.01, 0.99)
        raw = torch.zeros_like(mean)
        for _ in range(100):
            distribution = ContinuousBernoulliDistribution(raw)
            raw = raw + ((mean - distribution.mean) / distribution.variance).clamp(-2, 2)
        return raw

    def forward(self, raw: Tensor) -> Distribution:
        return over_pixels(ContinuousBernoulliDistribution(raw))


class _LocationScale(Likelihood):
    """A location per pixel, loc = raw, and one scale for all pixels, which is fixed, learned or optimal.

    power  the best scale is the mean of |x - loc|^power, to the power of 1 / power
    """

    power: ClassVar[int]

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        if scale == "learned":
            self.scale: Number = OneLearnedScale()
        elif scale == "optimal":
            self.scale = OptimalScale(self.power)
        else:
            assert not isinstance(scale, str)
            self.scale = as_schedule(scale)

    def best_scale(self, residual: Tensor) -> Tensor:
        """Return the scale that maximizes the likelihood of residuals x - loc of any shape, a 0-dimensional tensor."""
        return distributed.mean(residual.abs().pow(self.power)) ** (1 / self.power)

    def start(self, mean: Tensor, spread: float) -> Tensor:
        if isinstance(self.scale, OneLearnedScale | OptimalScale):
            self.scale.set(max(spread, 1e-3))
        return mean

    def fit(self, x: Tensor, raw: Tensor) -> None:
        if isinstance(self.scale, OptimalScale):
            with torch.no_grad():
                self.scale.follow(self.best_scale(x - raw), distributed.size(x))


class Gaussian(_LocationScale):
    """N(loc, scale^2): log p(x|z) = -sum ((x - loc)^2 / (2 scale^2) + ln scale + ln(2 pi) / 2), with loc = raw.

    scale is a number or schedule (fixed), "learned" by gradient, or "optimal": the root mean squared error, as in the
    sigma-VAE of Rybkin et al., Simple and Effective VAE Training with Calibrated Decoders, ICML 2021.
    """

    power = 2

    def __init__(self, scale: Scale = "optimal") -> None:
        super().__init__(scale)

    def forward(self, raw: Tensor) -> Distribution:
        return over_pixels(NormalDistribution(raw, self.scale(), validate_args=False))


class Laplace(_LocationScale):
    """Laplace(loc, scale): log p(x|z) = -sum (|x - loc| / scale + ln(2 scale)), with loc = raw.

    scale is a number or schedule (fixed), "learned" by gradient, or "optimal": the mean absolute error.
    """

    power = 1

    def __init__(self, scale: Scale = "learned") -> None:
        super().__init__(scale)

    def forward(self, raw: Tensor) -> Distribution:
        return over_pixels(LaplaceDistribution(raw, self.scale(), validate_args=False))


class OneLearnedScale(LearnedScale, Number):
    """One scale for all pixels, whose logarithm is learned by gradient."""


class OptimalScale(Number):
    """One scale for all pixels: the one that fits the last several hundred training images best.

    It is a running mean over batches of the best scale (power 1) or of its square (power 2), each batch weighted by its
    number of images. At the best scale the loss has zero gradient with respect to the scale, so none is propagated.
    Training, evaluation and sampling use the same number: a batch of test images never sets its own.

    images  the running mean covers about this many
    floor   the scale is never smaller
    """

    scale: Tensor

    def __init__(self, power: int, images: int = 600, floor: float = 1e-3) -> None:
        super().__init__()
        self.power, self.images, self.floor = power, images, floor
        self.register_buffer("scale", torch.ones(()))

    def set(self, scale: float) -> None:
        """Start at this scale."""
        self.scale.fill_(scale)

    def follow(self, scale: Tensor, count: int) -> None:
        """Move towards the scale that fits a batch of `count` images best."""
        share = count / (count + self.images)
        moved = torch.lerp(self.scale**self.power, scale**self.power, share) ** (1 / self.power)
        self.scale.copy_(moved.clamp_min(self.floor))

    def forward(self) -> Tensor:
        return self.scale.clone()  # the next batch changes the buffer in place, and backward may still need this value


class DiscretizedLogistic(Likelihood):
    """A logistic per pixel, discretized to the 256 levels of 8-bit images: P(x = k / 255) for k = 0 ... 255.

    raw (*S, B, 2 * C, H, W) holds C locations, then C log scales. Salimans et al., PixelCNN++, ICLR 2017, with one
    component.
    """

    raw_size = 2
    needs = (Need("dataset", "levels", "its values are not 8-bit levels; type likelihood=gaussian"),)

    def start(self, mean: Tensor, spread: float) -> Tensor:
        # The standard deviation of a logistic of scale s is s pi / sqrt(3).
        return torch.cat([mean, torch.full_like(mean, math.log(max(spread, 1e-2) * math.sqrt(3) / math.pi))])

    def forward(self, raw: Tensor) -> Distribution:
        loc, log_scale = raw.chunk(2, -3)
        return over_pixels(DiscretizedLogisticDistribution(loc, log_scale.clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND)))
