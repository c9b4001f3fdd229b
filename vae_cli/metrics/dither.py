"""A metric for claim 1 (bits): the length of a code that can really be sent, for uniform noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Independent

from vae_cli.metrics.base import CODES_PER_IMAGE, Figure, Metric, mean_figure, undefined
from vae_cli.model.distributions import UniformFactors
from vae_cli.model.scales import factors_of

NOT_UNIFORM = "only uniform noise can be replaced by shared noise and rounding; see sigma=uniform"
NOT_FACTORIZED = "the entropy coder needs a prior that is normal with independent dimensions"


class Dither(Metric):
    """The number of bits in which the noisy code of an image can be sent, with uniform noise: universal quantization.

    dithered_bits  mean over test images and 8 draws of the noise of -log2 P(k | u)

    Sender and receiver share the noise u ~ U(-w/2, w/2) in each dimension, with w = sqrt(12) sigma. The sender rounds,
    k = round((loc - u) / w), and encodes the integers k with P(k | u) = prod_j (F(z_j + w/2) - F(z_j - w/2)), where
    F is the distribution function of the prior and z = k w + u. The receiver decodes k and computes z, which is
    distributed like a draw of the posterior. An arithmetic coder attains this length up to 2 bits for a whole sequence
    of images. It is close to rate_bits; it is not equal, because the mass of a cell is not exactly w p(z).

    Unbiased over the noise, with the standard error over images. Not defined for other noise, nor for other priors.
    Agustsson and Theis, Universally Quantized Neural Compression, NeurIPS 2020.
    """

    claim = "bits"

    def compute(self) -> dict[str, Figure]:
        subject, normal = self.subject, factors_of(self.subject.model.prior())
        if normal is None:
            return {"dithered_bits": undefined(NOT_FACTORIZED)}
        lengths = []
        for x, _ in subject.batches("test"):
            posterior = subject.model.encode(x)
            factors = posterior.base_dist if isinstance(posterior, Independent) else None
            if not isinstance(factors, UniformFactors):
                return {"dithered_bits": undefined(NOT_UNIFORM)}
            width = factors.width.cpu().double()
            loc = factors.loc.cpu().double()
            u = width * (torch.rand(CODES_PER_IMAGE, *loc.shape, dtype=torch.float64) - 0.5)
            mean, scale = (values.cpu().double() for values in (normal.loc, normal.scale))
            nats = -log_mass(dithered(loc, u, width)[1], width, mean, scale).sum(-1)
            lengths.append(nats.mean(0) / math.log(2))
        return {"dithered_bits": mean_figure(torch.cat(lengths), "bits")}


def dithered(loc: Tensor, u: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers k = round((loc - u) / width) that are sent, and the codes z = k width + u that are received;
    loc (N, D) and u (*S, N, D)."""
    k = ((loc - u) / width).round()
    return k, k * width + u


def log_mass(z: Tensor, width: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return ln (F(z + width/2) - F(z - width/2)), elementwise, for the distribution function F of N(mean, scale^2).

    The cell is reflected to the side of the mean where both values of F are small, so no digits are lost.
    """
    middle, half = -((z - mean) / scale).abs(), width / (2 * scale)
    high, low = torch.special.log_ndtr(middle + half), torch.special.log_ndtr(middle - half)
    return high + torch.log(-torch.expm1(low - high))
