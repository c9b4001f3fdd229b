"""What a decoder's output says about pixels: all choices of the axis `likelihood`.

Each choice turns the decoder's output, raw (*S, B, raw_size * C, H, W), into p(x|z), a distribution of batch (*S, B)
and event (C, H, W). Log-probabilities are in nats.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Distribution, Independent, constraints
from torch.distributions import Laplace as LaplaceDistribution
from torch.distributions import Normal as NormalDistribution

from vae_cli.axes.schedule import Number, Schedule, as_schedule
from vae_cli.core.compatibility import Need
from vae_cli.core.values import Interval
from vae_cli.machine import distributed
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
        return Coins(raw)


class Coins(Independent):  # type: ignore[type-arg]
    """Independent coins for the pixels, with logits (*S, B, C, H, W).

    log_prob is computed with its gradient, by CrossEntropy, and changes the sign of an image's sum, not of every pixel:
    of a step of a small network it is otherwise a fifth.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__(BernoulliDistribution(logits=logits, validate_args=False), 3, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        logits: Tensor = self.base_dist.logits
        if value.shape != logits.shape:
            logits, value = torch.broadcast_tensors(logits, value)
        cross_entropy: Tensor = CrossEntropy.apply(logits, value)
        return -cross_entropy


class CrossEntropy(torch.autograd.Function):
    """-sum x ln p + (1 - x) ln(1 - p) with p = sigmoid(l), over the pixels of images x and logits l, both
    (*S, B, C, H, W), in nats, (*S, B). The gradient is p - x.

    It is relu(l) - x l + ln(1 + e^-|l|), and the logarithm is -ln sigmoid(|l|): exact to 6e-8 nats a pixel, a rounding
    of 1. torch's binary_cross_entropy_with_logits has it from log1p, which is as exact in float32 and takes ten times
    as long where the processor has AVX-512.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, value: Tensor) -> Tensor:
        certain = logits.clamp_min(0).addcmul_(logits, value, value=-1)
        return certain.sub_(logits.abs().sigmoid_().log_()).flatten(-3).sum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, value = ctx.saved_tensors
        by_image = gradients[0][..., None, None, None]
        to_value = -logits * by_image if ctx.needs_input_grad[1] else None
        return (logits.sigmoid() - value) * by_image, to_value

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        logits, value = ctx.saved_tensors
        of_logits, of_value = tangents
        along = torch.zeros_like(logits) if of_logits is None else (logits.sigmoid() - value) * of_logits
        return (along if of_value is None else along - logits * of_value).flatten(-3).sum(-1)


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


class ContinuousBernoulliDistribution(Distribution):
    """p(x) = e^(l x) l / (e^l - 1) on [0, 1], with the logit l.

    torch's own clamps the probability in the normalizing constant and not beside it, so that it does not integrate to
    one where |l| exceeds 16, and decoders of images go there. Everything here is computed from l itself, of which the
    part that depends on the sign is split off.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        # Near 0 the formulas are 0 / 0, and their series are exact; there they are computed at 1 and not used.
        self._near = logits.abs() < 0.05
        self._far = torch.where(self._near, torch.ones_like(logits), logits.abs())
        super().__init__(logits.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ContinuousBernoulliDistribution:
        return ContinuousBernoulliDistribution(self.logits.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        # ln((e^l - 1) / l) = l / 2 + ln(sinh(|l| / 2) / (|l| / 2))
        square = self.logits.square()
        series = square / 24 - square.square() / 2880
        far = self._far / 2 + (-torch.expm1(-self._far)).log() - self._far.log()
        return (value - 0.5) * self.logits - torch.where(self._near, series, far)

    @property
    def mean(self) -> Tensor:
        far = 1 / -torch.expm1(-self._far) - 1 / self._far - 0.5
        return 0.5 + torch.where(self._near, self.logits / 12 - self.logits**3 / 720, self.logits.sign() * far)

    @property
    def variance(self) -> Tensor:
        half = self._far / 2
        far = 1 / self._far.square() - ((-half).exp() / -torch.expm1(-self._far)).square()
        return torch.where(self._near, 1 / 12 - self.logits.square() / 240, far)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        uniform = torch.rand(shape, device=self.logits.device, dtype=self.logits.dtype)
        # The inverse of the distribution function for l < 0; for l > 0 the same, seen from the other end.
        falling = -torch.log1p(uniform * torch.expm1(-self._far)) / self._far
        far = torch.where(self.logits > 0, 1 - falling, falling)
        return torch.where(self._near, uniform + self.logits * uniform * (uniform - 1) / 2, far).clamp(0, 1)


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
