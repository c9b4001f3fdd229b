"""What a batch says about the aggregate posterior q(z) = 1/N sum_n q(z|x_n): its density, its covariance, and its
distance from the prior.

If several processes share the batch, the results equal those of one process with the whole batch, gradients included
(see `distributed.collect`). No function waits for the device, and shapes depend on the batch size alone, so all of them
can be captured as part of a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Distribution, Independent, Normal

from vae_cli.core.errors import UserError
from vae_cli.machine import distributed
from vae_cli.model.distributions import NUMBERS_AT_ONCE
from vae_cli.model.scales import LOG_ROOT_2_PI

NUMBERS_IN_CACHE = 1 << 18  # of a CPU

Kernel = Literal["imq", "rbf"]


def log_densities(posterior: Distribution, z: Tensor, images: int | None = None) -> tuple[Tensor, Tensor]:
    """Estimate ln q(z) and ln q(z_j) in each dimension j, in nats (*S, B) and (*S, B, D), from a batch of B images.

        q(z_i) ~ 1/N q(z_i|x_i) + (N - 1)/N * 1/(B - 1) sum_{k != i} q(z_i|x_k),  and the same for each dimension

    z (*S, B, D) is drawn from the posterior, a product of univariate densities with batch (B,). `images` is N, the
    number of training images; by default N = B. If the batch is a random part of the N images, the estimate of the
    density is unbiased: the image that z_i came from is always in the batch, so it has the weight 1/N that it has in
    q(z), and the others represent the remaining N - 1 images. By Jensen's inequality, the mean of its logarithm is too
    low. A batch of one image says nothing about the others; its estimate is q(z_i|x_i).

    This is the minibatch stratified sampling of Chen et al., Isolating Sources of Disentanglement in Variational
    Autoencoders, NeurIPS 2018, appendix C, except that all other images of the batch have equal weights; the paper
    gives one of them, chosen at random, another weight than the rest, which is unbiased, too, but has a larger
    variance. Raises UserError if the posterior is not a product of univariate densities.
    """
    factors = _of_whole_batch(univariate_factors(posterior))
    codes = z.flatten(0, -2)
    weights = _log_weights(z, images)
    weights = weights.repeat(len(codes) // len(weights), 1)  # (codes, B)
    if isinstance(factors, Normal):
        whole, single = NormalDensities.apply(codes, factors.loc, factors.scale, weights)
    else:
        log_q = factors.log_prob(codes[:, None])  # (codes, B, D)
        whole, single = log_q.sum(-1), (log_q + weights[..., None]).logsumexp(1)
    joint: Tensor = (whole + weights).logsumexp(1)
    return joint.view(z.shape[:-1]), single.view(z.shape)


class NormalDensities(torch.autograd.Function):
    """ln prod_j N(z_ij; loc_kj, scale_kj^2), (n, B), and ln sum_k w_ik N(z_ij; loc_kj, scale_kj^2), (n, D).

    The arguments are codes z (n, D), loc and scale (B, D), and the logarithms of the weights w (n, B). All n * B * D
    densities are needed, but only a part of them exists at a time: those of a few dimensions, which the backward pass
    computes again. On a CPU, this takes 0.3 to 0.5 times as long as torch's operations, which write every step of the
    calculation to memory. The gradient cannot be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, loc: Tensor, scale: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        product, sums = torch.zeros_like(weights), []
        for part in _parts(z, weights):
            distance = _standardized(z[:, part], loc[:, part], scale[:, part])
            log_q = distance.square_().mul_(-0.5).sub_(scale[:, part].log().add(LOG_ROOT_2_PI).mT[:, None])
            product += log_q.sum(0)
            sums.append(log_q.add_(weights).logsumexp(-1))
        by_dimension = torch.cat(sums)  # (D, n)
        ctx.save_for_backward(z, loc, scale, weights, by_dimension)
        return product, by_dimension.mT.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_product: Tensor, of_sums: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        z, loc, scale, weights, by_dimension = ctx.saved_tensors
        to_z, to_loc, to_scale = [], [], []
        for part in _parts(z, weights):
            inverse = scale[:, part].mT.reciprocal()  # (dimensions, B)
            distance = _standardized(z[:, part], loc[:, part], scale[:, part])
            square = distance.square()
            share = (square * -0.5).sub_(scale[:, part].log().add(LOG_ROOT_2_PI).mT[:, None]).add_(weights)
            share.sub_(by_dimension[part, :, None]).exp_()  # of each image in the density of a code
            to_log_q = share.mul_(of_sums.mT[part, :, None]).add_(of_product)
            if ctx.needs_input_grad[2]:
                to_scale.append(((to_log_q * square).sum(1) - to_log_q.sum(1)) * inverse)
            slope = to_log_q.mul_(distance)
            to_loc.append(slope.sum(1) * inverse)
            to_z.append(-(slope @ inverse[..., None])[..., 0])
        by_scale = torch.cat(to_scale).mT if to_scale else None
        return torch.cat(to_z).mT, torch.cat(to_loc).mT, by_scale, None


def _parts(z: Tensor, weights: Tensor) -> Iterator[slice]:
    """Yield ranges of dimensions of the codes z (n, D) whose n * B densities each are computed at once."""
    dimensions = max(1, (NUMBERS_AT_ONCE if z.is_cuda else NUMBERS_IN_CACHE) // weights.numel())
    yield from (slice(first, first + dimensions) for first in range(0, z.shape[1], dimensions))


def _standardized(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Return (z_ij - loc_kj) / scale_kj, (D, n, B), in which sums over images are over neighbors in memory."""
    return (z.mT[..., None] - loc.mT[:, None]).mul_(scale.mT.reciprocal()[:, None])


def univariate_factors(posterior: Distribution) -> Distribution:
    """Return the densities q(z_j|x), batch (B, D), of a posterior that is their product. Raises UserError if it is
    not."""
    if isinstance(posterior, Independent) and posterior.reinterpreted_batch_ndims == 1:
        base: Distribution = posterior.base_dist
        if not base.event_shape:
            return base
    raise UserError(
        f"The total correlation needs a posterior that is a product over dimensions (torch's Independent), and "
        f"{type(posterior).__name__} is not. Type sigma=learned, or regularizer=kl."
    )


def _of_whole_batch(factors: Distribution) -> Distribution:
    """Return the densities (B, D) of all images of the batch, given those of this process's share."""
    if distributed.count() == 1:
        return factors
    given: dict[str, Any] = {name: distributed.collect(getattr(factors, name)) for name in factors.arg_constraints}
    return type(factors)(**given)


def _log_weights(z: Tensor, images: int | None) -> Tensor:
    """Return the logarithm of the weight of each image of the whole batch, for each image of this share."""
    own = z.shape[-2]
    batch = distributed.size(z.movedim(-2, 0))
    total = batch if images is None else images
    of_itself = -math.log(total) if batch > 1 else 0.0
    of_others = math.log((total - 1) / (total * (batch - 1))) if batch > 1 and total > 1 else -math.inf
    rows = torch.arange(own, device=z.device)[:, None] + distributed.first_row()
    is_itself = rows == torch.arange(batch, device=z.device)
    return torch.full((own, batch), of_others, dtype=z.dtype, device=z.device).masked_fill(is_itself, of_itself)


def covariance(loc: Tensor) -> Tensor:
    """Return the covariance (D, D) of the mean codes loc (B, D) over the whole batch, with B - 1 in the denominator.

    A batch of one image has none: it is 0.
    """
    loc = distributed.collect(loc)
    centered = loc - loc.mean(0)
    return centered.mT @ centered / max(1, len(loc) - 1)


def mean_discrepancy(z: Tensor, prior: Distribution, kernel: Kernel, scales: Tensor) -> Tensor:
    """Estimate the squared maximum mean discrepancy between codes z (*S, B, D) and the prior, from B draws of it.

        MMD^2 = E k(z, z') - 2 E k(z, y) + E k(y, y'),  z, z' ~ q(z), y, y' ~ p(z)

    imq   k(z, y) = sum_t t C / (t C + |z - y|^2)
    rbf   k(z, y) = sum_t exp(-|z - y|^2 / (t C))

    The sums are over t in `scales` (T,), and C = 2 sum_j Var_p(z_j) is the mean squared distance of two draws of the
    prior, 2 D for N(0, I). The estimate is the U-statistic, in which no code is paired with itself: it is unbiased, and
    so can be negative. It has no unit. A batch of one image has no pairs; its MMD is 0. Several draws of z per image
    count as several batches. Only the codes have a gradient, not the prior. Gretton et al., A Kernel Two-Sample Test,
    JMLR 2012, equation 3.
    """
    codes = distributed.collect(z.movedim(-2, 0)).movedim(0, -2)
    codes = codes.reshape(-1, *codes.shape[-2:])  # (draws of z, B, D)
    batch = codes.shape[1]
    if batch == 1:
        return codes.sum() * 0
    with torch.no_grad():
        drawn = distributed.drawn_alike(lambda: prior.sample(torch.Size([batch])))
        widths = scales * (2 * _variance(prior, drawn).sum())

    def similarity(one: Tensor, other: Tensor) -> Tensor:
        values: Tensor = Similarity.apply(_squared_distances(one, other), widths, kernel)
        return values

    def of_pairs(values: Tensor) -> Tensor:
        return (values.sum((-2, -1)) - values.diagonal(dim1=-2, dim2=-1).sum(-1)) / (batch * (batch - 1))

    of_codes = similarity(codes, torch.cat([codes, drawn.expand_as(codes)], 1))
    within, across = of_pairs(of_codes[..., :batch]), of_codes[..., batch:].mean((-2, -1))
    return (within - 2 * across).mean() + of_pairs(similarity(drawn, drawn))


class Similarity(torch.autograd.Function):
    """The kernel of `mean_discrepancy`, a sum over widths t C (T,), as a function of the squared distance, elementwise.

    Only its slope is stored for the gradient, and not the terms for each width.
    """

    @staticmethod
    def forward(ctx: Any, distance: Tensor, widths: Tensor, kernel: Kernel) -> Tensor:
        value, slope = torch.zeros_like(distance), torch.zeros_like(distance)
        for some in widths.split(max(1, NUMBERS_IN_CACHE // distance.numel())):
            width = some.view(-1, *[1] * distance.dim())
            ratio = distance / width
            term = ratio.neg_().exp_() if kernel == "rbf" else ratio.add_(1).reciprocal_()
            value += term.sum(0)
            if ctx.needs_input_grad[0]:
                slope -= (term if kernel == "rbf" else term.square_()).div_(width).sum(0)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.saved_tensors[0], None, None


def _squared_distances(one: Tensor, other: Tensor) -> Tensor:
    """Return |a - b|^2 for the rows a of `one` (..., B, D) and b of `other` (B, D), by a matrix product, which needs no
    tensor of B * B * D numbers."""
    norms = one.square().sum(-1)[..., None] + other.square().sum(-1)[..., None, :]
    return (norms - 2 * one @ other.mT).clamp_min(0)


def _variance(prior: Distribution, drawn: Tensor) -> Tensor:
    """Return the variance of the prior in each dimension, (D,); if it has no closed form, that of the draws (B, D)."""
    try:
        return prior.variance
    except NotImplementedError:
        return drawn.var(0)
