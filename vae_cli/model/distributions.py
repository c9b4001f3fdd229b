"""Distributions that torch lacks, or computes slowly or inaccurately.

For codes: Delta, the point mass, UniformFactors and MixtureDistribution; `location` is the code without noise. For
pixels: FastBernoulli, ContinuousBernoulliDistribution and DiscretizedLogisticDistribution; `over_pixels` combines the
pixels of an image into one event. Log-probabilities are in nats.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    constraints,
    register_kl,
)

from vae_cli.model.kernels import is_inside_torch_func
from vae_cli.model.scales import LOG_ROOT_2_PI, factors_of, log_densities, log_scale_of

PIXELS = (-3, -2, -1)  # the dimensions of an image
NUMBERS_AT_ONCE = 1 << 24  # in a tensor
# With fewer pixels, torch's own cross-entropy is faster, because it launches fewer operations. With AVX-512, its log1p
# is slow, and few pixels are enough.
FEW_PIXELS = 1 << (13 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 15)
WIDE = 100  # a product of this many numbers above 1/2 does not underflow in float32


class Delta(Distribution):
    """The point mass q(z|x) = delta(z - loc(x)): rsample returns loc without drawing a random number.

    loc has shape (*batch, *event); the event is the last event_dim dimensions. A point mass has no density, so log_prob
    is taken with respect to the counting measure: 0 at loc and minus infinity elsewhere.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"loc": constraints.real}
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, event_dim: int = 1) -> None:
        split = loc.dim() - event_dim
        self.loc = loc
        self.event_dim = event_dim
        super().__init__(loc.shape[:split], loc.shape[split:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.loc)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc.expand(torch.Size(sample_shape) + self.loc.shape) if len(sample_shape) else self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        same = value == self.loc
        if self.event_dim:
            same = same.flatten(-self.event_dim).all(-1)
        return torch.zeros_like(same, dtype=self.loc.dtype).masked_fill(~same, -torch.inf)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Delta:
        return Delta(self.loc.expand(torch.Size(batch_shape) + self.event_shape), self.event_dim)


@register_kl(Delta, Distribution)
def energy(point: Delta, prior: Distribution) -> Tensor:
    """Return the energy -log p(loc), in nats (*batch), which replaces the infinite KL divergence of a point mass.

    As the noise of a posterior vanishes, KL + entropy = -E[log p(z)] tends to this energy. If the posterior's scale is
    constant, so is its entropy, and the gradient of the KL divergence tends to the gradient of the energy. For a prior
    N(0, I), the energy is |loc|^2 / 2 + D ln(2 pi) / 2.
    """
    return surprisal(prior, point.loc)


def location(posterior: Distribution) -> Tensor:
    """Return the code without noise, (*batch, D): the posterior's `location` if it has one, otherwise its mean."""
    found: Tensor | None = getattr(posterior, "location", None)
    return posterior.mean if found is None else found


def surprisal(distribution: Distribution, value: Tensor) -> Tensor:
    """Return -log p(value), in nats: by the distribution's own `surprisal`, which saves an operation, if it has one."""
    own = getattr(distribution, "surprisal", None)
    result: Tensor = -distribution.log_prob(value) if own is None else own(value)
    return result


class UniformFactors(Distribution):
    """Independent uniform distributions with mean loc and standard deviation `scale`, which broadcasts to loc.

    The width is w = scale sqrt(12). A value that rounding has moved out of the support by a few units in its last place
    has the density 1 / w, too, so that every draw has a density.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"loc": constraints.real}
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> UniformFactors:
        return UniformFactors(self.loc.expand(batch_shape), self.scale)

    @property
    def width(self) -> Tensor:
        """The width of the support."""
        return math.sqrt(12) * self.scale

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def stddev(self) -> Tensor:
        return self.scale.expand_as(self.loc)

    @property
    def variance(self) -> Tensor:
        return self.stddev.square()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = (*sample_shape, *self.loc.shape)
        uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.width * (uniform - 0.5)

    def log_prob(self, value: Tensor) -> Tensor:
        away = value - self.loc
        rounding = 4 * torch.finfo(self.loc.dtype).eps * torch.maximum(value.abs(), self.loc.abs())
        return (-self.width.log()).expand_as(away).masked_fill(away.abs() > self.width / 2 + rounding, -torch.inf)

    def entropy(self) -> Tensor:
        return self.width.log().expand_as(self.loc)


@register_kl(UniformFactors, Normal)
def uniform_from_normal(posterior: UniformFactors, prior: Normal) -> Tensor:
    """Return the KL divergence of a uniform from a normal distribution in each dimension, in nats."""
    square = ((posterior.loc - prior.loc) / prior.scale).square() + (posterior.scale / prior.scale).square()
    return square / 2 + LOG_ROOT_2_PI + log_scale_of(prior) - posterior.width.log()


class MixtureDistribution(MixtureSameFamily):
    """A mixture of K components with batch shape (K,) and event shape (D,): batch shape ().

    log_prob uses at most NUMBERS_AT_ONCE numbers at a time: for each code, it needs K if the components are diagonal
    normals, otherwise K * D.
    """

    def __init__(self, weights: Categorical, components: Distribution) -> None:
        super().__init__(weights, components, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        codes, components = value.reshape(-1, value.shape[-1]), self.component_distribution
        weights: Tensor = self.mixture_distribution.logits  # normalized by torch
        factors = factors_of(components)
        if factors is not None and value.device.type != "mps":  # which lacks double precision
            by_component, numbers = log_densities(factors), len(weights)
        else:
            by_component, numbers = lambda part: components.log_prob(part.unsqueeze(1)), components.mean.numel()
        parts = codes.split(max(1, NUMBERS_AT_ONCE // numbers))
        return torch.cat([(by_component(part) + weights).logsumexp(-1) for part in parts]).reshape(value.shape[:-1])


class FastBernoulli(Independent):  # type: ignore[type-arg]
    """Independent Bernoulli pixels: batch (*S, B), event (C, H, W), from logits (*S, B, C, H, W).

    Values and gradients equal those of Independent(Bernoulli(logits=logits), 3), which is slower because of its
    argument checks and its log_prob.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__(_Bits(logits), 3, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return -self.surprisal(value)

    def surprisal(self, value: Tensor) -> Tensor:
        """Return -log_prob(value)."""
        logits: Tensor = self.base_dist.logits
        if value.shape != logits.shape:
            logits, value = torch.broadcast_tensors(logits, value)
        if logits.numel() < FEW_PIXELS or torch.compiler.is_compiling() or is_inside_torch_func():
            return F.binary_cross_entropy_with_logits(logits, value, reduction="none").sum(PIXELS)
        surprisal: Tensor = BernoulliSurprisal.apply(logits, value)
        return surprisal


class _Bits(BernoulliDistribution):
    """torch's Bernoulli, constructed from logits without broadcasting or argument checks."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = self._param = logits
        Distribution.__init__(self, logits.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Bits:
        return _Bits(self.logits.expand(batch_shape))


class BernoulliSurprisal(torch.autograd.Function):
    """-sum (x ln p + (1 - x) ln(1 - p)) over pixels with p = sigmoid(l), in nats (*S, B).

    Logits l and images x have shape (*S, B, C, H, W). The gradient with respect to l is p - x.

    It is computed as relu(l) - x l - ln max(p, 1 - p), with an error of about 1e-7 nats per pixel, from rounding the
    larger probability near 1. The sum of the logarithms of a row of pixels is the logarithm of a product, and only one
    logarithm is computed for each row. For large batches, forward and backward together take 0.3 to 0.9 times as long
    as torch's binary_cross_entropy_with_logits, which computes a log1p for each pixel and makes more temporary tensors.
    Neither torch.func nor torch.compile is supported.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor) -> Tensor:
        p = logits.sigmoid()  # the only exponential: backward uses it, too
        ctx.save_for_backward(logits, value, p)
        ctx.save_for_forward(logits, value)
        larger = 1 - p
        torch.maximum(p, larger, out=larger)
        rows = larger.prod(-1, keepdim=True) if larger.shape[-1] <= WIDE else larger
        certain = logits.clamp_min(0).addcmul_(logits, value, value=-1)
        return certain.sum(PIXELS) - rows.log_().sum(PIXELS)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, value, p = ctx.saved_tensors
        by_image = gradients[0][..., None, None, None]
        to_value = -logits * by_image if ctx.needs_input_grad[1] else None
        if torch.is_grad_enabled():  # the gradient itself is differentiated, so p must depend on the logits
            p = logits.sigmoid()
        return (p - value) * by_image, to_value

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        logits, value = ctx.saved_tensors
        of_logits, of_value = tangents
        along = torch.zeros_like(logits) if of_logits is None else (logits.sigmoid() - value) * of_logits
        return (along if of_value is None else along - logits * of_value).sum(PIXELS)


class ContinuousBernoulliDistribution(Distribution):
    """p(x) = e^(l x) l / (e^l - 1) on [0, 1], with logits l of the batch shape.

    torch's ContinuousBernoulli clamps the probability in the normalizing constant but not elsewhere, so it does not
    integrate to 1 if |l| exceeds 16, as it can in an image decoder. This class computes everything from the sign
    and the magnitude of l. Loaiza-Ganem and Cunningham, The continuous Bernoulli, NeurIPS 2019.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        # Near l = 0 the formulas are 0 / 0, so the first terms of their series are used instead. The formulas are then
        # evaluated at |l| = 1 and discarded: NaN would reach the gradient even from the branch that where discards.
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
        shape = (*sample_shape, *self.logits.shape)
        uniform = torch.rand(shape, device=self.logits.device, dtype=self.logits.dtype)
        # `falling` is drawn for the logit -|l|, by inverting the CDF. If l > 0, it is mirrored: 1 - falling.
        falling = -torch.log1p(uniform * torch.expm1(-self._far)) / self._far
        far = torch.where(self.logits > 0, 1 - falling, falling)
        return torch.where(self._near, uniform + self.logits * uniform * (uniform - 1) / 2, far).clamp(0, 1)


class DiscretizedLogisticDistribution(Distribution):
    """P(x = k / 255) for k = 0 ... 255: the mass of a logistic between (k - 1/2) / 255 and (k + 1/2) / 255.

    Level 0 also gets the mass below it, and level 255 the mass above it. loc and log_scale have the batch shape.
    Salimans et al., PixelCNN++, ICLR 2017, with one mixture component.
    """

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
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a)) avoids subtracting nearly equal numbers.
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
        """The exact mean, sum_k P(x >= k / 255) / 255 for k = 1 ... 255."""
        inverse = (-self.log_scale).exp()
        total = torch.zeros_like(self.loc)
        if torch.compiler.is_compiling():  # to trace and store a graph of 255 sigmoids takes ten seconds
            edges = (torch.arange(1, self.levels, device=self.loc.device, dtype=self.loc.dtype) - 0.5) / (
                self.levels - 1
            )
            for some in edges.reshape(-1, 51, *[1] * self.loc.dim()).unbind():
                total = total + torch.sigmoid((self.loc - some) * inverse).sum(0)
            return total / (self.levels - 1)
        for level in range(1, self.levels):
            total += torch.sigmoid((self.loc - (level - 0.5) / (self.levels - 1)) * inverse)
        return total / (self.levels - 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = (*sample_shape, *self.loc.shape)
            uniform = torch.rand(shape, device=self.loc.device, dtype=self.loc.dtype)
            logistic = self.loc + self.log_scale.exp() * torch.logit(uniform, eps=1e-7)
            return (logistic * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1)


def over_pixels(distribution: Distribution) -> Distribution:
    """Return the joint distribution of independent pixels: batch (*S, B, C, H, W) becomes (*S, B), event (C, H, W)."""
    return Independent(distribution, 3, validate_args=False)
