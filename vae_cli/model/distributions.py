"""The point mass: a distribution like the others, which draws nothing."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl


class Delta(Distribution):
    """All mass at one point, q(z|x) = delta(z - loc(x)): rsample returns loc and draws no random number.

    loc has shape (*batch, *event), where the event is the last event_dim dimensions. The log-probability, 0 at loc
    and minus infinity elsewhere, is taken against the counting measure: a point mass has no density.
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
    """The energy -log p(loc) in nats, which stands where the KL divergence of a point mass would be infinite.

    It is KL + entropy, and the entropy of a point mass does not depend on any parameter, so that its gradient is the
    one that a posterior of constant scale has in the limit of no noise. For N(0, I) it is |loc|^2 / 2 + D ln(2 pi) / 2.
    """
    return -prior.log_prob(point.loc)
