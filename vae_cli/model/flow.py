"""A normalizing flow over codes: affine coupling layers (RealNVP), and the distribution that they define."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from vae_cli.model.distributions import NUMBERS_AT_ONCE
from vae_cli.model.kernels import Dense
from vae_cli.model.scales import LOG_ROOT_2_PI

# A coupling multiplies by e^-2 to e^2. With eight couplings, four on each half, the scale of a dimension can reach
# e^-8 to e^8, which covers the codes of all sigma modes, and no scale makes the density or a draw overflow.
LOG_SCALE_LIMIT = 2.0
MOMENT_DRAWS = 10_000  # that estimate the mean and the variance


class Coupling(nn.Module):
    """The network of an affine coupling layer: kept (N, inputs) -> log scale s and shift t, both (N, outputs).

    s = L tanh(raw / L) with L = LOG_SCALE_LIMIT. The last layer starts at 0, so s = t = 0 and the coupling starts as
    the identity.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for before, after in pairwise([inputs, *[hidden] * layers]):
            parts += [Dense(before, after), nn.ReLU()]
        last = Dense(hidden, 2 * outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(*parts, last)

    def forward(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.network(kept).chunk(2, -1)
        return LOG_SCALE_LIMIT * torch.tanh(raw / LOG_SCALE_LIMIT), shift


class FlowDistribution(Distribution):
    """The distribution of z = f(u) with u ~ N(0, I) (D,), batch shape () and event shape (D,).

        ln p(z) = ln N(f^-1(z); 0, I) + sum of s over all couplings and dimensions        nats

    Each coupling of f^-1 maps one half of the dimensions, b, to b exp(s(a)) + t(a), where the other half, a, stays as
    it is; the halves take turns. Each of these maps is inverted in closed form, so densities and draws are exact.
    Dinh, Sohl-Dickstein and Bengio, Density Estimation Using Real NVP, ICLR 2017.

    Mean and variance have no closed form. They are estimated without a gradient from 10,000 draws, always the same
    ones, in antithetic pairs (u and -u), with the variance of u in each dimension scaled to 1: before training, and
    whenever the flow only shifts and rescales dimensions, the estimates are exact. Otherwise the standard error of the
    mean is at most 1.4 % of the standard deviation (more with over 1,677 dimensions, for which there are fewer draws).

    torch's TransformedDistribution would run each network twice, for the value and for the log-determinant.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, couplings: nn.ModuleList, latent: int) -> None:
        self.couplings = couplings
        self._sizes = [latent // 2, latent - latent // 2]
        self._like = next(couplings.parameters())  # which has the device and the type of codes
        super().__init__(torch.Size(), torch.Size([latent]), validate_args=False)

    def normalized(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return u = f^-1(z) (N, D), and the log-determinant of its Jacobian du/dz (N,), for codes z (N, D)."""
        halves = list(z.split(self._sizes, -1))
        log_det = torch.zeros_like(z[..., 0])
        for number, coupling in enumerate(self.couplings):
            kept = number % 2
            log_scale, shift = coupling(halves[kept])
            halves[1 - kept] = halves[1 - kept] * log_scale.exp() + shift
            log_det = log_det + log_scale.sum(-1)
        return torch.cat(halves, -1), log_det

    def generated(self, u: Tensor) -> Tensor:
        """Return z = f(u) (N, D) for u (N, D)."""
        halves = list(u.split(self._sizes, -1))
        for number, coupling in reversed(list(enumerate(self.couplings))):
            kept = number % 2
            log_scale, shift = coupling(halves[kept])
            halves[1 - kept] = (halves[1 - kept] - shift) * (-log_scale).exp()
        return torch.cat(halves, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        def of_part(z: Tensor) -> Tensor:
            u, log_det = self.normalized(z)
            return log_det - u.square().sum(-1) / 2 - u.shape[-1] * LOG_ROOT_2_PI

        return self._in_parts(of_part, value)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = (*sample_shape, *self.event_shape)
        return self._in_parts(self.generated, torch.randn(shape, dtype=self._like.dtype, device=self._like.device))

    @property
    def mean(self) -> Tensor:
        return self._moments[0]

    @property
    def variance(self) -> Tensor:
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """The mean and the variance (D,) of f(u), estimated from fixed draws of u."""
        (latent,) = self.event_shape
        pairs = max(1, min(MOMENT_DRAWS, NUMBERS_AT_ONCE // latent) // 2)
        noise = torch.randn(pairs, latent, generator=torch.Generator().manual_seed(0), device="cpu")
        noise = noise / noise.square().mean(0).sqrt()
        with torch.no_grad():
            z = self._in_parts(self.generated, torch.cat([noise, -noise]).to(self._like))
        return z.mean(0), z.var(0, correction=0)

    def _in_parts(self, function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """Apply a function of vectors (N, D) to values (*S, D), in parts: the output of a layer has at most
        NUMBERS_AT_ONCE numbers."""
        rows = values.reshape(-1, values.shape[-1])
        widest = max(len(self._like), *self.event_shape)
        results = [function(part) for part in rows.split(max(1, NUMBERS_AT_ONCE // widest))]
        whole = results[0] if len(results) == 1 else torch.cat(results)
        return whole.reshape(values.shape[:-1] + whole.shape[1:])
