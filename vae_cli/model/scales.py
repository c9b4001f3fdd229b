"""Scales, such as standard deviations: their bounds, learnable scales, and normal distributions with given scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

# exp(-15) = 3e-7 to exp(15) = 3e6 includes every scale that is useful in float32, and the square does not overflow.
LOG_SCALE_BOUND = 15.0
LOG_ROOT_2_PI = math.log(math.sqrt(2 * math.pi))
ROUNDING = 1e-6  # of numbers, relative to the largest; float32 resolves about 1e-7

# Adam moves a single parameter by about one learning rate per step, but a layer's output by the sum of many such
# moves. Without this factor, a scale would need thousands of steps to reach a value that a network reaches in a few.
# It decides how fast a scale gets there, and hardly where: with 1, 10 and 100, runs on the digits until the
# validation loss stopped falling reached a test ELBO of 31.3, 31.5 and 31.7 with sigma=shared, after 168, 113 and 109
# epochs, and of 29.9, 28.8 and 28.9 with sigma=fixed prior=scaled_normal, after 158, 119 and 133 (three seeds,
# standard deviations 0.2 to 0.6).
PACE = 10.0


def bounded(log_scale: Tensor) -> Tensor:
    """Return log_scale, clamped between -15 and 15; any shape.

    >>> bounded(torch.tensor([-100.0, 0.0, 100.0])).exp()
    tensor([3.0590e-07, 1.0000e+00, 3.2690e+06])
    """
    return F.hardtanh(log_scale, -LOG_SCALE_BOUND, LOG_SCALE_BOUND)  # clamp, with a gradient in one operation, not five


def in_double(values: Tensor) -> Tensor:
    """Return values in double precision, for differences of large numbers. Apple's GPUs have none."""
    return values if values.device.type == "mps" else values.double()


class LearnedScale(nn.Module):
    """Learnable scales exp(PACE * raw) of a given shape, initially 1; forward() returns them.

    >>> scale = LearnedScale(2)
    >>> scale.set(0.5)
    >>> scale()
    tensor([0.5000, 0.5000], grad_fn=<ExpBackward0>)
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(shape))

    def set(self, scale: float) -> None:
        """Set every scale to this value, which must be positive."""
        with torch.no_grad():
            self.raw.fill_(math.log(scale) / PACE)

    def log(self) -> Tensor:
        """Return the logarithms of the scales."""
        return bounded(PACE * self.raw)

    def forward(self) -> Tensor:
        return self.log().exp()


class Factors(Normal):
    """The univariate factors N(loc, scale^2) of a diagonal normal; scale broadcasts to the shape of loc.

    The results equal those of torch's Normal bit for bit; its broadcasting and argument checks, which would slow down
    training, are left out. The optional log_scale = ln(scale) may broadcast too; if given, the KL divergence
    uses it.
    """

    def __init__(self, loc: Tensor, scale: Tensor, log_scale: Tensor | None = None) -> None:
        # To compare (D,) with (B, D) alone would make torch.export demand that B differs from D.
        is_whole = scale.dim() == loc.dim() and scale.shape == loc.shape
        self.loc, self.scale = loc, scale if is_whole else scale.expand_as(loc)
        self.log_scale = log_scale
        Distribution.__init__(self, loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Factors:
        log_scale = None if self.log_scale is None else self.log_scale.expand(batch_shape)
        return type(self)(self.loc.expand(batch_shape), self.scale.expand(batch_shape), log_scale)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = (*sample_shape, *self.loc.shape)
        return self.loc + torch.empty(shape, dtype=self.loc.dtype, device=self.loc.device).normal_() * self.scale


class Standard(Independent):  # type: ignore[type-arg]
    """N(0, I), batch () and event (D,), with a faster log_prob: loc (D,) must be 0 and scale (D,) 1.

    >>> Standard(torch.zeros(3), torch.ones(3)).log_prob(torch.zeros(3))  # -3/2 ln(2 pi)
    tensor(-2.7568)
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(Factors(loc, scale), 1, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Distribution:
        return Independent(self.base_dist, 1, validate_args=False).expand(batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return -self.surprisal(value)

    def surprisal(self, value: Tensor) -> Tensor:
        """Return -log_prob(value)."""
        return value.square().sum(-1) / 2 + value.shape[-1] * LOG_ROOT_2_PI


def log_scale_of(normal: Normal) -> Tensor:
    """Return ln(scale) of a normal, which broadcasts to the shape of its loc."""
    log_scale = normal.log_scale if isinstance(normal, Factors) else None
    return normal.scale.log() if log_scale is None else log_scale


def factors_of(distribution: Distribution) -> Normal | None:
    """Return the univariate factors of a diagonal normal; None for any other distribution."""
    if isinstance(distribution, Independent) and isinstance(distribution.base_dist, Normal):
        return distribution.base_dist
    return None


def log_densities(normals: Normal) -> Callable[[Tensor], Tensor]:
    """Return a function from codes z (N, D) to their log-densities (N, K) under K normals, loc and scale (K, D).

    ln N(z; m, s^2) = -sum_j (z_j^2 / s_j^2 - 2 z_j m_j / s_j^2 + m_j^2 / s_j^2 + 2 ln s_j + ln(2 pi)) / 2 is a matrix
    product of z^2 and z with coefficients of the normals, so no tensor has N K D numbers. For small s the terms are
    much larger than their sum, hence the double precision. With z and m measured from the center of the locs, the
    error is about 1e-16 (z / s)^2, less than that of rounding z to float32.
    """
    center = normals.loc.detach().double().mean(0)
    loc, log_scale = normals.loc.double() - center, log_scale_of(normals).double().expand_as(normals.loc)
    precision = (-2 * log_scale).exp()
    coefficients = torch.cat([precision / -2, precision * loc], -1).mT
    constant = -(precision * loc.square() / 2 + log_scale + LOG_ROOT_2_PI).sum(-1)

    def of(z: Tensor) -> Tensor:
        centered = z.double() - center
        powers = torch.cat([centered.square(), centered], -1)
        return torch.addmm(constant, powers, coefficients).to(z.dtype)

    return of


def diagonal_normal(loc: Tensor, scale: Tensor, log_scale: Tensor | None = None) -> Distribution:
    """Return N(loc, diag(scale^2)), batch (*S,) and event (D,), from loc (*S, D) and a scale that broadcasts to it.

    If scale was computed from its logarithm, pass the logarithm as log_scale. The arguments are not checked, because
    checks would slow down training.

    >>> diagonal_normal(torch.zeros(3), torch.ones(3)).log_prob(torch.zeros(3))  # -3/2 ln(2 pi)
    tensor(-2.7568)
    """
    return Independent(Factors(loc, scale, log_scale), 1, validate_args=False)


def standardization(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each dimension of codes (N, D), (D,) each. The latter is 1 for a
    dimension that is constant up to rounding, which is thus not magnified."""
    spread = codes.std(0, correction=0)
    varies = spread > ROUNDING * codes.abs().amax(0)
    return codes.mean(0), torch.where(varies, spread, 1)
