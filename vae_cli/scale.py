"""Scales: how they are bounded, and how one that is no network's output is learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

# exp(+-15) is 3e-7 to 3e6: wider than any scale that means something in float32, and its square does not overflow.
LOG_SCALE_BOUND = 15.0

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


def diagonal_normal(loc: Tensor, scale: Tensor) -> Distribution:
    """N(loc, diag(scale^2)) over the last dimension; the arguments are not checked, for that costs a step dearly."""
    return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)
