"""What a decoder's output says about pixels: all choices of the axis `likelihood`.

Each choice turns the decoder's output, raw (*S, B, raw_size * C, H, W), into p(x|z), a distribution of batch (*S, B)
and event (C, H, W). Log-probabilities are in nats.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import ContinuousBernoulli as ContinuousBernoulliDistribution
from torch.distributions import Distribution, Independent, constraints
from torch.distributions import Laplace as LaplaceDistribution
from torch.distributions import Normal as NormalDistribution

from vae_cli.check import Positive
from vae_cli.part import Need
from vae_cli.scale import LOG_SCALE_BOUND, LearnedScale
from vae_cli.schedule import Number, Schedule, as_schedule

GREY_VALUES = Need("dataset", "unit_interval", "its values are not between 0 and 1; type likelihood=gaussian")

Scale = Positive | Schedule | Literal["learned", "optimal"]


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
        return over_pixels(BernoulliDistribution(logits=raw, validate_args=False))


class ContinuousBernoulli(Likelihood):
    """p(x|z) = C(p) p^x (1 - p)^(1 - x) on [0, 1] with p = sigmoid(raw): the Bernoulli made a proper density of grey
    values. Loaiza-Ganem and Cunningham, The continuous Bernoulli, NeurIPS 2019."""

    needs = (GREY_VALUES,)

    def start(self, mean: Tensor, spread: float) -> Tensor:
        # The mean is no closed form of the logit, but its derivative is the variance: Newton's method.
        raw = torch.zeros_like(mean)
        for _ in range(20):
            distribution = ContinuousBernoulliDistribution(logits=raw, validate_args=False)
            raw = (raw + (mean - distribution.mean) / distribution.variance).clamp(-12, 12)
        return raw

    def forward(self, raw: Tensor) -> Distribution:
        return over_pixels(ContinuousBernoulliDistribution(logits=raw, validate_args=False))


class _LocationScale(Likelihood):
    """A location per pixel, loc = raw, and one scale for all pixels, which is fixed, learned or optimal."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        if scale == "learned":
            self.scale: Number = OneLearnedScale()
        elif scale == "optimal":
            self.scale = OptimalScale()
        else:
            assert not isinstance(scale, str)
            self.scale = as_schedule(scale)

    def best_scale(self, residual: Tensor) -> Tensor:
        """The scale under which residuals x - loc are most probable, a 0-dimensional tensor."""
        raise TypeError(f"{type(self).__name__} does not say which scale fits best: it has no method 'best_scale'.")

    def start(self, mean: Tensor, spread: float) -> Tensor:
        if isinstance(self.scale, OneLearnedScale | OptimalScale):
            self.scale.set(max(spread, 1e-3))
        return mean

    def fit(self, x: Tensor, raw: Tensor) -> None:
        if isinstance(self.scale, OptimalScale):
            with torch.no_grad():
                self.scale.follow(self.best_scale(x - raw))


class Gaussian(_LocationScale):
    """N(loc, scale^2): log p(x|z) = -sum ((x - loc)^2 / (2 scale^2) + ln scale + ln(2 pi) / 2).

    scale is a number or a schedule (fixed), `learned` by gradient, or `optimal`: the root mean squared error, the
    sigma-VAE of Rybkin et al., Simple and Effective VAE Training with Calibrated Decoders, ICML 2021.
    """

    def __init__(self, scale: Scale = "optimal") -> None:
        super().__init__(scale)

    def best_scale(self, residual: Tensor) -> Tensor:
        return residual.square().mean().sqrt()

    def forward(self, raw: Tensor) -> Distribution:
        return over_pixels(NormalDistribution(raw, self.scale(), validate_args=False))


class Laplace(_LocationScale):
    """Laplace(loc, scale): log p(x|z) = -sum (|x - loc| / scale + ln(2 scale)).

    scale is a number or a schedule (fixed), `learned` by gradient, or `optimal`: the mean absolute error.
    """

    def __init__(self, scale: Scale = "learned") -> None:
        super().__init__(scale)

    def best_scale(self, residual: Tensor) -> Tensor:
        return residual.abs().mean()

    def forward(self, raw: Tensor) -> Distribution:
        return over_pixels(LaplaceDistribution(raw, self.scale(), validate_args=False))


class OneLearnedScale(LearnedScale, Number):
    """One scale for all pixels, learned by gradient through its logarithm."""


class OptimalScale(Number):
    """One scale for all pixels, a running mean of the one that fits each training batch best.

    At the best scale the loss is flat in it, so that following it instead of differentiating through it changes no
    gradient. Training, evaluation and sampling use the same number: no batch of test images sets its own.
    """

    scale: Tensor

    def __init__(self, share: float = 0.1, floor: float = 1e-3) -> None:
        super().__init__()
        self.share, self.floor = share, floor
        self.register_buffer("scale", torch.ones(()))

    def set(self, scale: float) -> None:
        """Begin at this scale."""
        self.scale.fill_(scale)

    def follow(self, scale: Tensor) -> None:
        self.scale.lerp_(scale.clamp_min(self.floor), self.share)

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


class DiscretizedLogisticDistribution(Distribution):
    """P(x = k / 255), k = 0 ... 255: what a logistic of this location and scale puts between (k - 1/2) / 255 and
    (k + 1/2) / 255; the first and the last level take the tails. All arguments have the batch shape."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real,
        "log_scale": constraints.real,
    }
    support = constraints.independent(constraints.nonnegative_integer, 0)
    has_enumerate_support = True
    levels = 256

    def __init__(self, loc: Tensor, log_scale: Tensor) -> None:
        self.loc, self.log_scale = loc, log_scale
        super().__init__(loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretizedLogisticDistribution:
        return DiscretizedLogisticDistribution(self.loc.expand(batch_shape), self.log_scale.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a)): no difference of nearly equal numbers.
        inverse = (-self.log_scale).exp()
        width = inverse / (self.levels - 1)
        above = (value - self.loc) * inverse + width / 2
        first, last = value < 0.5 / (self.levels - 1), value > 1 - 0.5 / (self.levels - 1)
        lower = F.logsigmoid(above).masked_fill(last, 0.0)
        upper = F.logsigmoid(width - above).masked_fill(first, 0.0)
        return lower + upper + (-torch.expm1(-width)).log().masked_fill(first | last, 0.0)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = torch.arange(self.levels, device=self.loc.device, dtype=self.loc.dtype) / (self.levels - 1)
        values = values.reshape(-1, *[1] * self.loc.dim())
        return values.expand(-1, *self.loc.shape) if expand else values

    @property
    def mean(self) -> Tensor:
        """The sum over k of P(x >= k / 255) / 255, which is exact."""
        inverse = (-self.log_scale).exp()
        total = torch.zeros_like(self.loc)
        for level in range(1, self.levels):
            total += torch.sigmoid((self.loc - (level - 0.5) / (self.levels - 1)) * inverse)
        return total / (self.levels - 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            uniform = torch.rand(self._extended_shape(sample_shape), device=self.loc.device, dtype=self.loc.dtype)
            logistic = self.loc + self.log_scale.exp() * torch.logit(uniform, eps=1e-7)
            return (logistic * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1)


def over_pixels(distribution: Distribution) -> Distribution:
    """Independent pixels: the last three dimensions are one event."""
    return Independent(distribution, 3, validate_args=False)
