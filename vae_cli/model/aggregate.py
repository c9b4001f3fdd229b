"""What a batch says about the aggregate posterior q(z) = 1/N sum_n q(z|x_n): its density, its covariance, and its
distance from the prior.

If several processes share the batch, the results equal those of one process with the whole batch, gradients included
(see `distributed.collect`). No function waits for the device, and shapes depend on the batch size alone, so all of them
can be captured as part of a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.utils.checkpoint import checkpoint

from vae_cli.core.errors import UserError
from vae_cli.machine import distributed
from vae_cli.model.distributions import NUMBERS_AT_ONCE

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
    weights = weights.repeat(len(codes) // len(weights), 1)

    def densities(codes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        log_q = factors.log_prob(codes[:, None])  # (codes, B, D)
        return (log_q.sum(-1) + weights).logsumexp(1), (log_q + weights[..., None]).logsumexp(1)

    rows = max(1, NUMBERS_AT_ONCE // (weights.shape[1] * z.shape[-1]))
    if len(codes) <= rows:
        joint, single = densities(codes, weights)
    else:  # the backward pass computes log_q again, one part at a time, since all of it does not fit into memory
        parts = zip(codes.split(rows), weights.split(rows), strict=True)
        found = [checkpoint(densities, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        joint, single = (torch.cat(values) for values in zip(*found, strict=True))
    return joint.view(z.shape[:-1]), single.view(z.shape)


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
    return torch.full((own, batch), of_others, device=z.device).masked_fill(is_itself, of_itself)


def covariance(loc: Tensor) -> Tensor:
    """Return the covariance (D, D) of the mean codes loc (B, D) over the whole batch, with B - 1 in the denominator.

    A batch of one image has none: it is 0.
    """
    loc = distributed.collect(loc)
    centered = loc - loc.mean(0)
    return centered.mT @ centered / max(1, len(loc) - 1)


def mean_discrepancy(z: Tensor, prior: Distribution, kernel: Kernel, scales: Sequence[float]) -> Tensor:
    """Estimate the squared maximum mean discrepancy between codes z (*S, B, D) and the prior, from B draws of it.

        MMD^2 = E k(z, z') - 2 E k(z, y) + E k(y, y'),  z, z' ~ q(z), y, y' ~ p(z)

    imq   k(z, y) = sum_t t C / (t C + |z - y|^2)
    rbf   k(z, y) = sum_t exp(-|z - y|^2 / (t C))

    The sums are over t in `scales`, and C = 2 sum_j Var_p(z_j) is the mean squared distance of two draws of the prior,
    2 D for N(0, I). The estimate is the U-statistic, in which no code is paired with itself: it is unbiased, and so can
    be negative. It has no unit. A batch of one image has no pairs; its MMD is 0. Several draws of z per image count as
    several batches. Only the codes have a gradient, not the prior. Gretton et al., A Kernel Two-Sample Test, JMLR 2012,
    equation 3.
    """
    codes = distributed.collect(z.movedim(-2, 0)).movedim(0, -2)
    codes = codes.reshape(-1, *codes.shape[-2:])  # (draws of z, B, D)
    batch = codes.shape[1]
    if batch == 1:
        return codes.sum() * 0
    with torch.no_grad():
        drawn = distributed.drawn_alike(lambda: prior.sample(torch.Size([batch])))
        spread = 2 * _variance(prior, drawn).sum()

    def similarity(distance: Tensor) -> Tensor:
        if kernel == "imq":
            return torch.stack([(1 + distance / (t * spread)).reciprocal() for t in scales]).sum(0)
        return torch.stack([(-distance / (t * spread)).exp() for t in scales]).sum(0)

    def of_pairs(one: Tensor) -> Tensor:
        values = similarity(_squared_distances(one, one))
        return (values.sum((-2, -1)) - values.diagonal(dim1=-2, dim2=-1).sum(-1)) / (batch * (batch - 1))

    across = similarity(_squared_distances(codes, drawn)).mean((-2, -1))
    return (of_pairs(codes) - 2 * across).mean() + of_pairs(drawn)


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
