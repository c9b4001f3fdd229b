"""Scales of noise: how they are bounded, how a scale without a network is learned, and normals made from them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

# exp(-15) = 3e-7 to exp(15) = 3e6 includes every scale that is useful in float32, and the square does not overflow.
LOG_SCALE_BOUND = 15.0
LOG_ROOT_2_PI = math.log(math.sqrt(2 * math.pi))

# Adam moves a lone parameter by one learning rate per step, but the output of a layer by about one for each input that
# agrees. Without this factor a scale would need thousands of steps to reach what a network reaches at once.
PACE = 10.0


def bounded_exp(log_scale: Tensor) -> Tensor:
    """Return exp(log_scale), clamped between e^-15 and e^15; any shape.

    >>> bounded_exp(torch.tensor([-100.0, 0.0, 100.0]))
    tensor([3.0590e-07, 1.0000e+00, 3.2690e+06])
    """
    return log_scale.clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND).exp()


class LearnedScale(nn.Module):
    """Learned scales exp(PACE * raw) of a given shape, which start at 1; forward() returns them.

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

    def forward(self) -> Tensor:
        return bounded_exp(PACE * self.raw)


class Factors(Normal):
    """The univariate factors N(loc, scale^2) of a diagonal normal; scale broadcasts to the shape of loc.

    The results are bit for bit those of torch's Normal, whose broadcasting and checks would slow a training step.
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale if scale.shape == loc.shape else scale.expand_as(loc)
        Distribution.__init__(self, loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Factors:
        return type(self)(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = (*sample_shape, *self.loc.shape)
        return self.loc + torch.empty(shape, dtype=self.loc.dtype, device=self.loc.device).normal_() * self.scale


class Standard(Factors):
    """The factors N(0, 1) of a standard normal, with a simpler log-density; loc must be 0 and scale 1."""

    def log_prob(self, value: Tensor) -> Tensor:
        return -value.square() / 2 - LOG_ROOT_2_PI


def diagonal_normal(loc: Tensor, scale: Tensor, kind: type[Factors] = Factors) -> Distribution:
    """Return N(loc, diag(scale^2)), batch (*S,) and event (D,), from loc (*S, D) and a scale that broadcasts to it.

    The arguments are not checked: checks would slow a training step.

    >>> diagonal_normal(torch.zeros(3), torch.ones(3)).log_prob(torch.zeros(3))  # -3/2 ln(2 pi)
    tensor(-2.7568)
    """
    return Independent(kind(loc, scale), 1, validate_args=False)
