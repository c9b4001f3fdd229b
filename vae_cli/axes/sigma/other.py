"""Noise that is not normal, and no noise at all."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Independent

from vae_cli.axes.schedule import Schedule
from vae_cli.axes.sigma.base import Sigma, noise_level
from vae_cli.core.compatibility import Need
from vae_cli.core.errors import UserError
from vae_cli.core.values import Count, Interval
from vae_cli.model.distributions import Delta, UniformFactors
from vae_cli.model.mixtures import InterpolatedNormal, ScaleMixture
from vae_cli.model.sphere import PowerSphericalDistribution

LARGEST_LOGIT = 12.0  # of the mean cosine: the noise is about 1e-3 then, and float32 resolves it

Concentration = Annotated[float, Interval(1e-6, 1e6)]


class Deterministic(Sigma):
    """A point mass at loc(x): z = loc(x), without noise; no random number is drawn. raw (B, D) is loc(x)."""

    provides = frozenset()

    def forward(self, raw: Tensor) -> Distribution:
        return Delta(raw)


class Uniform(Sigma):
    """Uniform noise in each dimension, with standard deviation `value`, so width w = value sqrt(12) around loc(x).

    raw (B, D) is loc(x). Under N(0, I), the rate is that of sigma=fixed with the same value plus

        ln(2 pi e / 12) / 2 = 0.1765 nats per dimension

    since of all noise with this variance, the normal carries the least information. In return, about this number of
    bits suffices to send the code: sender and receiver share the noise u ~ U(-w/2, w/2), and the sender transmits the
    integers k = round((loc - u) / w). The receiver computes z = k w + u, which has the distribution of loc(x) plus
    noise. `vae evaluate` measures the length of this code (`dithered_bits`). Agustsson and Theis, Universally Quantized
    Neural Compression, NeurIPS 2020.

    Raises UserError if the value, or any value that the schedule reaches, is less than 1e-6 or more than 1e6.
    """

    provides = Sigma.provides - {"smooth"}

    def __init__(self, value: float | Schedule = 1.0) -> None:
        super().__init__()
        self.value = noise_level(value)

    def forward(self, raw: Tensor) -> Distribution:
        return Independent(UniformFactors(raw, self.value()), 1, validate_args=False)


class Random(Sigma):
    """A noise level that is drawn for each code: z = loc(x) + s epsilon with s = |N(0, value^2)|, epsilon ~ N(0, I).

    raw (B, D) is loc(x), and `value` is the standard deviation of the noise in each dimension. The decoder learns codes
    with little and with much noise. The posterior is a mixture of normals over s. Under a normal prior, the rate is
    the mean over s of the KL divergence, an upper bound on that of the mixture:

        sum_j ((m_j - a_j)^2 / t_j^2 + value^2 / t_j^2 - 1)/2 - ln(value / t_j) + 0.6352,  prior N(a, diag(t^2))

    Under any other prior, the rate is estimated from draws, with the exact density of the mixture. Sun et al.,
    Multimodal Latent Language Modeling with Next-Token Diffusion (LatentLM), 2024; with the default of VibeVoice, 2025.

    Raises UserError if the value, or any value that the schedule reaches, is less than 1e-6 or more than 1e6.
    """

    provides = Sigma.provides - {"dimensions"}

    def __init__(self, value: float | Schedule = 0.5) -> None:
        super().__init__()
        self.value = noise_level(value)

    def forward(self, raw: Tensor) -> Distribution:
        return ScaleMixture(raw, self.value())


class Interpolated(Sigma):
    """A path from the code to noise: z = (1 - t) loc(x) + t value epsilon, with t ~ U(0, 1) and epsilon ~ N(0, I).

    raw (B, D) is loc(x), the code without noise (t = 0). t is drawn for each code, and the mean of z is loc(x)/2. Under
    a normal prior, the rate is the mean over t of the KL divergence, an upper bound on that of the mixture over t:

        sum_j ((m_j^2/3 - a_j m_j + a_j^2 + value^2/3) / t_j^2 + 1)/2 - ln(value / t_j),  prior N(a, diag(t^2))

    Under any other prior, the rate is estimated from draws, with the density of the mixture. Yang et al., Latent
    Denoising Makes Good Visual Tokenizers (l-DeTok), 2025, with value = 3.

    Raises UserError if the value, or any value that the schedule reaches, is less than 1e-6 or more than 1e6.
    """

    provides = Sigma.provides - {"dimensions"}

    def __init__(self, value: float | Schedule = 3.0) -> None:
        super().__init__()
        self.value = noise_level(value)

    def forward(self, raw: Tensor) -> Distribution:
        return InterpolatedNormal(raw, self.value())


class PowerSpherical(Sigma):
    """Codes on the sphere |z| = 1: q(z|x) proportional to (1 + loc(x) . z)^concentration, with loc(x) of length 1.

    The prior must be prior=sphere, from which the KL divergence has a closed form. loc(x) is the direction of the first
    D encoder outputs. If concentration is a number, raw is (B, D). With concentration=learned, raw is (B, 2 * D), and
    the mean r(x) of the second D outputs sets the concentration (D - 1) e^r of an image, so that the mean cosine
    between z and loc(x) is sigmoid(r); it starts at about 1/2. A single number would do as well: a mean of D linear
    outputs is a linear output, too. De Cao and Aziz, The Power Spherical distribution, 2020; codes on a sphere:
    Davidson et al., Hyperspherical Variational Auto-Encoders, UAI 2018.

    Raises UserError if latent is 1: the sphere is then two points.
    """

    provides = frozenset({"noise", "separate", "sphere"})
    needs = (
        Need(
            "prior",
            "sphere",
            "its codes lie on a sphere, where the density of this prior does not apply; type sigma=power_spherical "
            "prior=sphere",
        ),
        Need(
            "regularizer",
            "sphere",
            "its codes lie on a sphere, where this penalty is constant or cannot be small; type regularizer=kl",
        ),
    )

    def __init__(self, latent: Count, concentration: Concentration | Literal["learned"] = "learned") -> None:
        super().__init__()
        if latent < 2:
            raise UserError(
                "sigma=power_spherical needs latent=2 or more, because in one dimension the sphere is two points; with "
                "latent=1, type sigma=fixed prior=standard_normal."
            )
        self.latent, self.concentration = latent, concentration
        self.raw_size = 2 if concentration == "learned" else 1

    def forward(self, raw: Tensor) -> Distribution:
        location = F.normalize(raw[:, : self.latent], dim=-1)
        if self.concentration == "learned":
            logit = raw[:, self.latent :].mean(-1).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
            return PowerSphericalDistribution(location, (self.latent - 1) * logit.exp())
        return PowerSphericalDistribution(location, torch.full_like(raw[:, 0], float(self.concentration)))
