"""Scales: how they are bounded, and how one that is no network's output is learned."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

# exp(+-15) is 3e-7 to 3e6: wider than any scale that means something in float32, and its square does not overflow.
LOG_SCALE_BOUND = 15.0
LOG_ROOT_2_PI = math.log(math.sqrt(2 * math.pi))

# Adam moves a lone parameter by one learning rate a step, and the output of a layer by about as many as the layer has
# inputs that agree. At its own pace a scale would need thousands of steps to get where a network's output is at once.
PACE = 10.0


def bounded_exp(log_scale: Tensor) -> Tensor:
    """exp(log_scale), between e^-15 and e^15."""
    return log_scale.clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND).exp()


class LearnedScale(nn.Module):
    """exp(PACE * raw): scales of a given shape as a parameter, which begin at 1. forward() gives them."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(shape))

    def set(self, scale: float) -> None:
        """Make all of them this scale."""
        with torch.no_grad():
            self.raw.fill_(math.log(scale) / PACE)

    def forward(self) -> Tensor:
        return bounded_exp(PACE * self.raw)


class Factors(Normal):
    """The normal distributions of which a diagonal one is made, of loc and scale tensors of any two shapes that
    broadcast to the first one's.

    The same numbers as torch's Normal, which broadcasts and asks more than a training step needs.
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale if scale.shape == loc.shape else scale.expand_as(loc)
        Distribution.__init__(self, loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Factors:
        return type(self)(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        return self.loc + torch.empty(shape, dtype=self.loc.dtype, device=self.loc.device).normal_() * self.scale


class Standard(Factors):
    """N(0, 1) of each dimension: where loc and scale are known, formulas are shorter."""

    def log_prob(self, value: Tensor) -> Tensor:
        return -value.square() / 2 - LOG_ROOT_2_PI


def diagonal_normal(loc: Tensor, scale: Tensor, kind: type[Factors] = Factors) -> Distribution:
    """N(loc, diag(scale^2)) over the last dimension; the arguments are not checked, for that costs a step dearly."""
    return Independent(kind(loc, scale), 1, validate_args=False)
