"""The axis `likelihood`: the distribution of pixels p(x|z), parameterized by the decoder's output.

Each choice maps the decoder's output raw (*S, B, raw_size * C, H, W), computed from codes (*S, B, D), to p(x|z), a
distribution with batch shape (*S, B) and event shape (C, H, W). Log-probabilities are in nats per image.
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

GREY_VALUES = Need(
    "dataset", "unit_interval", "the pixel values of this dataset are not limited to [0, 1]; type likelihood=gaussian"
)

Scale = Annotated[float, Interval(1e-6, 1e6)] | Schedule | Literal["learned", "optimal"]


class Likelihood(nn.Module):
    """A family of likelihoods: forward maps raw (*S, B, raw_size * C, H, W) to p(x|z).

    raw_size  number of decoder outputs per pixel and channel
    """

    raw_size: ClassVar[int] = 1
    needs: ClassVar[tuple[Need, ...]] = ()

    def observe(self, x: Tensor) -> Tensor:
        """Return the target of the likelihood for images x (B, C, H, W): x, or binarized x."""
        return x

    def start(self, mean: Tensor, spread: float) -> Tensor:
        """Return the constant decoder output (raw_size * C, H, W) that fits the training images best.

        It initializes the bias of the decoder's output, unless output_bias=zero. mean (C, H, W) is the mean training
        image, spread the root mean squared deviation of pixels from it. If the likelihood learns or adapts its scale,
        the scale is initialized too.
        """
        return mean

    def fit(self, x: Tensor, raw: Tensor) -> None:
        """Use a training batch to update the parameters that are set in closed form rather than by gradient.

        x (B, C, H, W) are the images as returned by `observe`, raw (*S, B, raw_size * C, H, W) is the decoder's output
        for them. The default does nothing, because most likelihoods have no such parameters.
        """


class Bernoulli(Likelihood):
    """A Bernoulli per pixel: log p(x|z) = sum (x ln p + (1 - x) ln(1 - p)) with p = sigmoid(raw).

    By default, gray values are used as they are, so -log p(x|z) is a cross-entropy. They can also be binarized:
    `dynamic` draws a new binary image each time an image is used, in evaluation too (Burda et al., Importance Weighted
    Autoencoders, ICLR 2016); `threshold` sets pixels above 1/2 to 1 and all others to 0.
    """

    needs = (GREY_VALUES,)

    def __init__(self, binarize: Literal["none", "dynamic", "threshold"] = "none") -> None:
        super().__init__()
        self.binarize = binarize

    def observe(self, x: Tensor) -> Tensor:
        if self.binarize == "dynamic":
            return torch.rand_like(x).lt_(x)  # takes two thirds of the time of torch.bernoulli
        if self.binarize == "threshold":
            return (x > 0.5).to(x.dtype)
        return x

    def start(self, mean: Tensor, spread: float) -> Tensor:
        return mean.clamp(1e-3, 1 - 1e-3).logit()

    def forward(self, raw: Tensor) -> Distribution:
        return FastBernoulli(raw)


class ContinuousBernoulli(Likelihood):
    """p(x|z) = prod C(p) p^x (1 - p)^(1 - x) with p = sigmoid(raw): a proper density of gray values in [0, 1].

    C(p) is the normalizing constant that the Bernoulli likelihood of gray values lacks. Loaiza-Ganem and Cunningham,
    The continuous Bernoulli, NeurIPS 2019.
    """

    needs = (GREY_VALUES,)

    def start(self, mean: Tensor, spread: float) -> Tensor:
        # The logit of a given mean has no closed form. The derivative of the mean by the logit is the variance, so this
        # is Newton's method; its steps are clamped because the mean is nearly constant for large positive or negative
        # logits.
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

    power  defines the maximum-likelihood scale, (mean of |x - loc|^power)^(1 / power)
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
        """Return the maximum-likelihood scale, a 0-dimensional tensor, for residuals x - loc of any shape."""
        return distributed.mean(residual.abs().pow(self.power)) ** (1 / self.power)

    def start(self, mean: Tensor, spread: float) -> Tensor:
        if isinstance(self.scale, OneLearnedScale | OptimalScale):
            self.scale.set(max(spread, 1e-3))
        return mean

    def fit(self, x: Tensor, raw: Tensor) -> None:
        if isinstance(self.scale, OptimalScale):
            with torch.no_grad():
                residual = (x - raw).movedim(-4, 0)  # the images first, of which other processes have some
                self.scale.follow(self.best_scale(residual), distributed.size(x))


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
    """One scale for all pixels: the maximum-likelihood scale for the last several hundred training images.

    It is an exponential moving average, over batches, of the best scale (power 1) or of its square (power 2); larger
    batches weigh more. At the best scale the loss has zero gradient with respect to the scale, so no gradient is
    propagated through it. Training, evaluation and sampling use the same scale: it is never fitted to test images.

    images  approximate number of images that the moving average covers
    floor   lower bound of the scale
    """

    scale: Tensor

    def __init__(self, power: int, images: int = 600, floor: float = 1e-3) -> None:
        super().__init__()
        self.power, self.images, self.floor = power, images, floor
        self.register_buffer("scale", torch.ones(()))

    def set(self, scale: float) -> None:
        """Set the initial scale of the moving average."""
        self.scale.fill_(scale)

    def follow(self, scale: Tensor, count: int) -> None:
        """Update the moving average with `scale`, the best scale for a batch of `count` images."""
        share = count / (count + self.images)
        moved = torch.lerp(self.scale**self.power, scale**self.power, share) ** (1 / self.power)
        self.scale.copy_(moved.clamp_min(self.floor))

    def forward(self) -> Tensor:
        return self.scale.clone()  # the next batch changes the buffer in place, and backward may still need this value


class DiscretizedLogistic(Likelihood):
    """A logistic distribution per pixel, discretized to 256 levels: P(x = k / 255) for k = 0 ... 255.

    raw (*S, B, 2 * C, H, W) contains C locations, then C log scales. Salimans et al., PixelCNN++, ICLR 2017, here
    with one mixture component.
    """

    raw_size = 2
    needs = (
        Need("dataset", "levels", "the pixel values of this dataset are not 8-bit levels; type likelihood=gaussian"),
    )

    def start(self, mean: Tensor, spread: float) -> Tensor:
        # The standard deviation of a logistic of scale s is s pi / sqrt(3).
        return torch.cat([mean, torch.full_like(mean, math.log(max(spread, 1e-2) * math.sqrt(3) / math.pi))])

    def forward(self, raw: Tensor) -> Distribution:
        loc, log_scale = raw.chunk(2, -3)
        return over_pixels(DiscretizedLogisticDistribution(loc, log_scale.clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND)))
