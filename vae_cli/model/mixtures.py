"""Posteriors whose noise level is itself random, drawn for each code: mixtures of infinitely many normals."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints, register_kl

from vae_cli.model.bessel import log_bessel_k
from vae_cli.model.distributions import NUMBERS_AT_ONCE
from vae_cli.model.scales import in_double, log_scale_of

MEAN_LOG = -(np.euler_gamma + math.log(2)) / 2  # E ln |e| for e ~ N(0, 1)
NODES = 32  # of a quadrature
NATS = 20.0  # by which the integrand has fallen at the ends of a quadrature: e^-20 = 2e-9
NUMBERS_IN_CACHE = 1 << 17  # of a CPU
LEAST = 1e-7  # of a distance from loc, relative to the noise: float32 does not resolve smaller ones


class NoiseMixture(Distribution):
    """A mixture over noise levels of normals whose mean and scale depend on the level.

    Its KL divergence from a diagonal normal, as registered with torch, is the mean over levels of the KL divergence at
    the level. This is an upper bound on the divergence of the mixture, because the divergence is convex; minus
    distortion and minus this bound, it gives a lower bound on ln p(x), too: the ELBO of a model in which the noise
    level is a second latent variable.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    @property
    @abstractmethod
    def formula(self) -> str:
        """How z is drawn, given loc and scale, the code without noise and the standard deviation."""

    @abstractmethod
    def expected_kl(self, loc: Tensor, scale: Tensor, log_scale: Tensor) -> Tensor:
        """Return the mean over noise levels of the KL divergence from N(loc, diag(scale^2)), in nats (*batch)."""


@register_kl(NoiseMixture, Independent)
def expected_kl(posterior: NoiseMixture, prior: Independent) -> Tensor:  # type: ignore[type-arg]
    """Return the mean over noise levels of the KL divergence from a diagonal normal, in nats (*batch)."""
    normal = prior.base_dist
    if not isinstance(normal, Normal) or prior.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    return posterior.expected_kl(normal.loc, normal.scale, log_scale_of(normal))


class ScaleMixture(NoiseMixture):
    """z = loc + s epsilon with s = |N(0, scale^2)|, one for each code, and epsilon ~ N(0, I); loc is (*batch, D).

    scale has no dimensions. It is the standard deviation in each dimension. The density has a closed form with the
    modified Bessel function K of the second kind, r = |z - loc|:

        ln q(z) = ln(2 / pi) / 2 - D ln(2 pi) / 2 - ln scale + (1 - D)/2 ln(r scale) + ln K_((D-1)/2)(r / scale)

    It is infinite at z = loc.
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    @property
    def formula(self) -> str:
        return "a mixture of N(loc, s^2 I) over s = |N(0, scale^2)|, one s for each code"

    def expand(self, batch_shape: Any, _instance: Any = None) -> ScaleMixture:
        return ScaleMixture(self.loc.expand(*batch_shape, *self.event_shape), self.scale)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.scale.square().expand_as(self.loc)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        size, noise = _noise(self.loc, sample_shape)
        return self.loc + self.scale * size.normal_().abs() * noise

    def log_prob(self, value: Tensor) -> Tensor:
        latent = self.event_shape[0]
        order = (latent - 1) / 2
        x = ((value - self.loc).norm(dim=-1) / self.scale).clamp_min(LEAST)
        constant = math.log(2 / math.pi) / 2 - latent * math.log(2 * math.pi) / 2
        return constant - latent * self.scale.log() - order * x.log() + log_bessel_k(order, x)

    def expected_kl(self, loc: Tensor, scale: Tensor, log_scale: Tensor) -> Tensor:
        distance = ((self.loc - loc) / scale).square()
        noise = (self.scale / scale).square() - 1 - 2 * (self.scale.log() + MEAN_LOG - log_scale)
        return (distance + noise).sum(-1) / 2


class InterpolatedNormal(NoiseMixture):
    """z = (1 - t) location + t gamma epsilon with t ~ U(0, 1), one for each code, and epsilon ~ N(0, I).

    location is (*batch, D), and gamma has no dimensions. The mean of z is location / 2, and its covariance

        location location^T / 12 + gamma^2 / 3 I

    The density is an integral over t, computed by Gauss-Legendre quadrature with 32 nodes in w = 1 / t, placed where
    the integrand is within e^-20 of its maximum; the error is below 1e-5 nats in float64. It is infinite at location.
    """

    def __init__(self, location: Tensor, gamma: Tensor) -> None:
        self.location, self.gamma = location, gamma
        super().__init__(location.shape[:-1], location.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> InterpolatedNormal:
        return InterpolatedNormal(self.location.expand(*batch_shape, *self.event_shape), self.gamma)

    @property
    def formula(self) -> str:
        return (
            f"the distribution of (1 - t) loc + {float(self.gamma):g} t epsilon with t ~ U(0, 1), one t for each code, "
            "and epsilon ~ N(0, I)"
        )

    @property
    def mean(self) -> Tensor:
        return self.location / 2

    @property
    def variance(self) -> Tensor:
        return self.location.square() / 12 + self.gamma.square() / 3

    @property
    def covariance_matrix(self) -> Tensor:
        """The covariance of z, (*batch, D, D)."""
        outer = self.location[..., None] * self.location[..., None, :] / 12
        return outer + self.gamma.square() / 3 * torch.eye(self.event_shape[0], device=outer.device, dtype=outer.dtype)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        level, noise = _noise(self.location, sample_shape)
        level = level.uniform_()
        return (1 - level) * self.location + level * self.gamma * noise

    def log_prob(self, value: Tensor) -> Tensor:
        # With w = 1 / t and d = z - location, z - (1 - t) location = t (w d + location) and dt = dw / w^2.
        # Its square is a small difference of large numbers if the noise is small.
        gamma, loc = in_double(self.gamma), in_double(self.location) / in_double(self.gamma)
        away = in_double(value) / gamma - loc
        square, product, rest = away.square().sum(-1), (away * loc).sum(-1), loc.square().sum(-1)
        square = square.clamp_min(LEAST**2)
        latent, shape = self.event_shape[0], square.shape
        codes = (NUMBERS_AT_ONCE if square.is_cuda else NUMBERS_IN_CACHE) // NODES
        split = (values.expand(shape).flatten().split(codes) for values in (square, product, rest))
        log_q = torch.cat([_log_integral(a, b, c, latent) for a, b, c in zip(*split, strict=True)]).view(shape)
        log_q = log_q - latent * (gamma.log() + math.log(2 * math.pi) / 2)
        return log_q.to(torch.promote_types(value.dtype, self.location.dtype))

    def expected_kl(self, loc: Tensor, scale: Tensor, log_scale: Tensor) -> Tensor:
        # E t^2 = E (1 - t)^2 = 1/3, E (1 - t) = 1/2, E ln t = -1.
        signal = self.location.square() / 3 - loc * self.location + loc.square()
        noise = self.gamma.square() / 3
        return ((signal + noise) / scale.square() + 1 - 2 * (self.gamma.log() - log_scale)).sum(-1) / 2


def _noise(loc: Tensor, sample_shape: Any) -> tuple[Tensor, Tensor]:
    """Return a tensor to draw the noise levels in, (*sample_shape, *batch, 1), and epsilon (*sample_shape, *batch, D).

    The levels are drawn in place by the caller, after epsilon.
    """
    shape = (*sample_shape, *loc.shape)
    noise = torch.empty(shape, dtype=loc.dtype, device=loc.device).normal_()
    return torch.empty((*shape[:-1], 1), dtype=loc.dtype, device=loc.device), noise


def _log_integral(square: Tensor, product: Tensor, rest: Tensor, latent: int) -> Tensor:
    """Return the logarithm of the integral over w >= 1 of w^(latent-2) exp(-(square w^2 + 2 product w + rest) / 2)."""
    with torch.no_grad():
        w, log_weight = _nodes(square, product, latent)
    distance = w * (w * square[..., None] + 2 * product[..., None]) + rest[..., None]
    return (log_weight + (latent - 2) * w.log() - distance / 2).logsumexp(-1)


def _nodes(square: Tensor, product: Tensor, latent: int) -> tuple[Tensor, Tensor]:
    """Return the nodes w >= 1 and the logarithms of their weights, (*batch, nodes), for the integral over w of

        w^n exp(-(A^2 w^2 + 2 P w) / 2),  n = latent - 2, A^2 = square and P = product, both (*batch)

    In v = A w with b = P / A, ln f(v) = n ln v - (v + b)^2 / 2 is concave for n >= 0. The nodes span the range around
    its maximum over v >= A in which it falls by NATS. In one dimension, n = -1, f is nearly 1 / v between A and 1, so
    that range gets as many nodes of its own, evenly spaced in ln v.
    """
    size = square.sqrt()
    b, n = product / size, latent - 2
    low = size if n >= 0 else size.clamp_min(1.0)
    root = (b.square() + 4 * n).clamp_min(0).sqrt()
    top = torch.where(b > 0, 2 * n / (b + root).clamp_min(1e-12), (root - b) / 2)
    mode = torch.maximum(top, low)
    # From the maximum on, ln f falls by at least `falls` l + l^2 / 2 + n (y - ln(1 + y)) at v = mode + l, y = l / mode.
    falls = (mode + b - max(n, 0) / mode).clamp_min(0)  # 0 unless the maximum is at v = A
    right = 2 * NATS / (falls + (falls.square() + 2 * NATS).sqrt())
    if n > 0:  # y - ln(1 + y) is at least 0.307 min(y, y^2)
        y = NATS / (0.307 * n)
        right = torch.minimum(right, (math.sqrt(y) if y < 1 else y) * mode)
    elif n < 0:  # ln v makes it fall a little less
        right = 1.25 * right
    left = math.sqrt(2 * NATS) / (1 + max(n, 0) / mode.square()).sqrt()
    start, end = torch.maximum(mode - left, low), mode + right
    nodes, weights = _legendre(square)
    v = start[..., None] + (end - start)[..., None] * nodes
    log_weight = weights.log() + (end - start)[..., None].log()
    if n < 0:
        length = -size.clamp_max(1.0).log()
        near = (-length[..., None] * (1 - nodes)).exp()
        v = torch.cat([near, v], -1)
        log_weight = torch.cat([weights.log() + length[..., None].log() + near.log(), log_weight], -1)
    return v / size[..., None], log_weight - size[..., None].log()


@cache
def _legendre_on_unit_interval() -> tuple[list[float], list[float]]:
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def _legendre(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nodes and the weights of Gauss-Legendre quadrature on [0, 1]."""
    nodes, weights = _legendre_on_unit_interval()
    return like.new_tensor(nodes), like.new_tensor(weights)
