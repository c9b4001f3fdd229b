"""Distributions on the sphere |z| = 1 in D dimensions: the power spherical distribution and the uniform distribution.

Densities are with respect to the sphere's surface, so they are not comparable with densities in D dimensions.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Gamma, constraints, register_kl

from vae_cli.machine import distributed
from vae_cli.model.scales import in_double


class UniformOnSphere(Distribution):
    """The uniform distribution on the sphere; batch shape (), event shape (D,). Only the shape of `like` (D,), its
    dtype and its device are used."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, like: Tensor) -> None:
        self.like = like
        super().__init__(torch.Size(), like.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return torch.zeros_like(self.like)

    @property
    def variance(self) -> Tensor:
        return torch.full_like(self.like, 1 / self.event_shape[0])

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = (*sample_shape, *self.event_shape)
        return F.normalize(torch.empty(shape, dtype=self.like.dtype, device=self.like.device).normal_(), dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.full_like(value[..., 0], -log_area(self.event_shape[0]))

    def entropy(self) -> Tensor:
        return self.like.new_tensor(log_area(self.event_shape[0]))


def log_area(dimensions: int) -> float:
    """Return the logarithm of the surface of the sphere |z| = 1 in this number of dimensions, 2 pi^(D/2) / Gamma(D/2).

    >>> round(math.exp(log_area(2)) / math.pi, 6), round(math.exp(log_area(3)) / math.pi, 6)
    (2.0, 4.0)
    """
    half = dimensions / 2
    return math.log(2) + half * math.log(math.pi) - math.lgamma(half)


class PowerSphericalDistribution(Distribution):
    """q(z) proportional to (1 + location . z)^concentration on the sphere |z| = 1, in D >= 2 dimensions.

    location (*batch, D) has length 1, and concentration is (*batch). t = location . z has mean and variance

        E t = concentration / (D - 1 + concentration)
        Var t = 4 a b / ((a + b)^2 (a + b + 1)),  a = (D - 1)/2 + concentration, b = (D - 1)/2

    (1 + t)/2 is Beta(a, b), drawn as g / (g + h) with g ~ Gamma(a) and h ~ Gamma(b). For a normal vector n that is
    orthogonal to location, |n|^2 / 2 is such an h, and independent of the direction of n, so

        z = ((g - h) location + sqrt(2 g) n) / (g + h)

    is a draw. It is a smooth function of location, where the reflection in the paper is not. De Cao and Aziz, The Power
    Spherical distribution, 2020.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True
    formula = "power spherical on the sphere |z| = 1, around loc"

    def __init__(self, location: Tensor, concentration: Tensor) -> None:
        self.location, self.concentration = location, concentration
        self.half = (location.shape[-1] - 1) / 2
        super().__init__(location.shape[:-1], location.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PowerSphericalDistribution:
        location = self.location.expand(*batch_shape, *self.event_shape)
        return PowerSphericalDistribution(location, self.concentration.expand(batch_shape))

    @property
    def mean(self) -> Tensor:
        return self._moments()[0][..., None] * self.location

    @property
    def variance(self) -> Tensor:
        along, across = self._variances()
        return across + (along - across) * self.location.square()

    @property
    def covariance_matrix(self) -> Tensor:
        """The covariance of z, (*batch, D, D)."""
        along, across = (part[..., None] for part in self._variances())
        outer = self.location[..., None] * self.location[..., None, :]
        eye = torch.eye(self.event_shape[0], device=outer.device, dtype=outer.dtype)
        return across * eye + (along - across) * outer

    def _moments(self) -> tuple[Tensor, Tensor]:
        """The mean and the variance of t, (*batch)."""
        a, b = self.half + self.concentration, self.half
        return self.concentration / (a + b), 4 * a * b / ((a + b).square() * (a + b + 1))

    def _variances(self) -> tuple[Tensor, Tensor]:
        """The variance along location, and that in each direction orthogonal to it, (*batch, 1)."""
        mean, variance = self._moments()
        across = (1 - mean.square() - variance) / (2 * self.half)
        return variance[..., None], across[..., None]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = (*sample_shape, *self.location.shape)
        noise = torch.empty(shape, dtype=self.location.dtype, device=self.location.device).normal_()
        across = noise - (noise * self.location).sum(-1, keepdim=True) * self.location
        g = _gamma(self.half + self.concentration, sample_shape)[..., None]
        h = across.square().sum(-1, keepdim=True) / 2
        # Dividing by g + h would do but for rounding.
        return F.normalize((g - h) * self.location + (2 * g).sqrt() * across, dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        cosine = (value * self.location).sum(-1)
        tiny = torch.finfo(cosine.dtype).eps  # no draw is exactly opposite to location
        return self._log_norm().to(cosine.dtype) + self.concentration * cosine.clamp_min(tiny - 1).log1p()

    def entropy(self) -> Tensor:
        wide = in_double(self.concentration)
        a, b = self.half + wide, self.half
        expected = wide * (math.log(2) + torch.digamma(a) - torch.digamma(a + b))
        return -(self._log_norm() + expected).to(self.concentration.dtype)

    def _log_norm(self) -> Tensor:
        """The logarithm of the normalizing constant, (*batch), in double precision if the device has it: it is a
        difference of large numbers."""
        wide = in_double(self.concentration)
        a, b = self.half + wide, self.half
        return torch.lgamma(a + b) - torch.lgamma(a) - (a + b) * math.log(2) - b * math.log(math.pi)


@register_kl(PowerSphericalDistribution, UniformOnSphere)
def divergence_from_uniform(posterior: PowerSphericalDistribution, prior: UniformOnSphere) -> Tensor:
    """Return KL(q || p) = ln(area of the sphere) - entropy of q, in nats (*batch)."""
    return log_area(prior.event_shape[0]) - posterior.entropy()


def _gamma(concentration: Tensor, sample_shape: Any) -> Tensor:
    """Return draws (*sample_shape, B) of Gamma(concentration, 1) for concentrations (B,), with gradients.

    A draw takes as many random numbers as its concentration requires, so each process draws for the whole batch.
    """
    whole = distributed.collect(concentration)
    drawn = distributed.drawn_alike(lambda: Gamma(whole, torch.ones_like(whole), False).rsample(sample_shape))
    return distributed.own(drawn.movedim(-1, 0)).movedim(0, -1)
