"""What a decoder's output says about pixels: all choices of the axis `likelihood`.

Each choice turns the decoder's output, raw (*S, B, raw_size * C, H, W), into p(x|z), a distribution of batch (*S, B)
and event (C, H, W). Log-probabilities are in nats.
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
    """A family of likelihoods: forward maps raw to p(x|z)."""

    raw_size: ClassVar[int] = 1
    needs: ClassVar[tuple[Need, ...]] = ()

    def observe(self, x: Tensor) -> Tensor:
        """The data that the likelihood is over, from images (B, C, H, W) with values in [0, 1]."""
        return x

    def start(self, mean: Tensor, spread: float) -> Tensor:
        """The raw output (raw_size * C, H, W) that describes the training images best before there is a code.

        mean (C, H, W) is their mean, spread the root mean squared distance of their pixels from it. Parameters of the
        likelihood's own are set to fit.
        """
        return mean

    def fit(self, x: Tensor, raw: Tensor) -> None:
        """Follow a training batch in what has a closed form and is not learned by gradient; most have nothing such."""


class Bernoulli(Likelihood):
    """One coin per pixel, log p(x|z) = sum x ln p + (1 - x) ln(1 - p) with p = sigmoid(raw).

    Grey values count as probabilities, which makes this a cross-entropy, unless they are binarized: `dynamic` draws a
    new binary image at each presentation, in evaluation too (Burda et al. 2016), `threshold` cuts at one half.
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
    """p(x|z) = C(p) p^x (1 - p)^(1 - x) on [0, 1] with p = sigmoid(raw): the Bernoulli made a proper density of grey
    values. Loaiza-Ganem and Cunningham, The continuous Bernoulli, NeurIPS 2019."""

    needs = (GREY_VALUES,)

    def start(self, mean: Tensor, spread: float) -> Tensor:
        # The mean is no closed form of the logit, but its derivative is the variance: Newton's method, held back where
        # the curve is flat.
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

    power says of what best_scale is a mean: of absolute residuals (1) or of their squares (2).
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
        """The scale under which residuals x - loc are most probable, a 0-dimensional tensor."""
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
    """N(loc, scale^2): log p(x|z) = -sum ((x - loc)^2 / (2 scale^2) + ln scale + ln(2 pi) / 2).

    scale is a number or a schedule (fixed), `learned` by gradient, or `optimal`: the root mean squared error, the
    sigma-VAE of Rybkin et al., Simple and Effective VAE Training with Calibrated Decoders, ICML 2021.
    """

    power = 2

    def __init__(self, scale: Scale = "optimal") -> None:
        super().__init__(scale)

    def forward(self, raw: Tensor) -> Distribution:
        return over_pixels(NormalDistribution(raw, self.scale(), validate_args=False))


class Laplace(_LocationScale):
    """Laplace(loc, scale): log p(x|z) = -sum (|x - loc| / scale + ln(2 scale)).

    scale is a number or a schedule (fixed), `learned` by gradient, or `optimal`: the mean absolute error.
    """

    power = 1

    def __init__(self, scale: Scale = "learned") -> None:
        super().__init__(scale)

    def forward(self, raw: Tensor) -> Distribution:
        return over_pixels(LaplaceDistribution(raw, self.scale(), validate_args=False))


class OneLearnedScale(LearnedScale, Number):
    """One scale for all pixels, learned by gradient through its logarithm."""


class OptimalScale(Number):
    """One scale for all pixels, the one that fits the last several hundred training images best.

    It is a running mean of the squares (of the values, for power 1) of the scales that fit each batch, each counted by
    its images. At the best scale the loss is flat in it, so no gradient goes through it. Training, evaluation and
    sampling use the same number: no batch of test images sets its own.
    """

    scale: Tensor

    def __init__(self, power: int, images: int = 600, floor: float = 1e-3) -> None:
        super().__init__()
        self.power, self.images, self.floor = power, images, floor
        self.register_buffer("scale", torch.ones(()))

    def set(self, scale: float) -> None:
        """Begin at this scale."""
        self.scale.fill_(scale)

    def follow(self, scale: Tensor, count: int) -> None:
        """Move towards the scale that fits a batch of count images."""
        share = count / (count + self.images)
        moved = torch.lerp(self.scale**self.power, scale**self.power, share) ** (1 / self.power)
        self.scale.copy_(moved.clamp_min(self.floor))

    def forward(self) -> Tensor:
        return self.scale.clone()  # later batches change the buffer in place, and backward may still need this value


class DiscretizedLogistic(Likelihood):
    """A logistic per pixel, cut into the 256 levels of 8-bit images.

    raw holds C locations and then C logarithms of scales. Salimans et al., PixelCNN++, 2017, with one component.
    """

    raw_size = 2
    needs = (Need("dataset", "levels", "its values are not 8-bit levels; type likelihood=gaussian"),)

    def start(self, mean: Tensor, spread: float) -> Tensor:
        # A logistic of scale s has the standard deviation s pi / sqrt(3).
        return torch.cat([mean, torch.full_like(mean, math.log(max(spread, 1e-2) * math.sqrt(3) / math.pi))])

    def forward(self, raw: Tensor) -> Distribution:
        loc, log_scale = raw.chunk(2, -3)
        return over_pixels(DiscretizedLogisticDistribution(loc, log_scale.clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND)))
