"""Fit a mixture of Gaussians to latent codes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vae_cli.core.errors import UserError

RIDGE = 1e-6  # added to the variances of standardized codes, so that every covariance matrix is invertible
ITERATIONS = 100  # at most, of k-means and of expectation maximization
TOLERANCE = 1e-3  # nats per code: expectation maximization stops once an iteration gains less


class Mixture(NamedTuple):
    """A mixture of K Gaussians over codes: weights (K,), means (K, D), Cholesky factors of covariances (K, D, D), all
    float64."""

    weights: Tensor
    means: Tensor
    factors: Tensor

    def draw(self, count: int, temperature: float = 1.0) -> Tensor:
        """Draw codes (count, D), float32. temperature multiplies the standard deviation of every Gaussian."""
        weights, means, factors = (part.float() for part in self)
        chosen = torch.multinomial(weights, count, replacement=True)
        noise = torch.randn(count, means.shape[1], 1)
        return means[chosen] + temperature * (factors[chosen] @ noise).squeeze(-1)

    def log_prob(self, codes: Tensor) -> Tensor:
        """Return the log density (N,) of codes (N, D) float64, in nats."""
        return self.joint_log_density(codes).logsumexp(1)

    def joint_log_density(self, codes: Tensor) -> Tensor:
        """Return log w_k + log N(z_n; m_k, C_k), shape (N, K), for codes z (N, D), in nats."""
        columns = []
        for weight, mean, factor in zip(*self, strict=True):  # one component at a time, to save memory
            away = torch.linalg.solve_triangular(factor, (codes - mean).T, upper=False)
            constant = weight.log() - factor.diagonal().log().sum() - len(mean) / 2 * math.log(2 * math.pi)
            columns.append(constant - away.square().sum(0) / 2)
        return torch.stack(columns, 1)


def fit_mixture(codes: Tensor, components: int, seed: int = 0) -> Mixture:
    """Fit K Gaussians with full covariances to codes (N, D) by expectation maximization, starting from k-means.

    This is the ex-post density estimation of Ghosh et al., From Variational to Deterministic Autoencoders, 2020.
    Raises UserError unless there are more codes than components.
    """
    if len(codes) <= components:
        if components == 1:
            raise UserError("A Gaussian cannot be fitted to a single training code; type --from prior instead.")
        raise UserError(f"--components {components} is too many for {len(codes)} training codes; use a smaller number.")
    # Divide each dimension by its standard deviation, so that the same ridge suits codes on any scale.
    codes = codes.double().cpu()
    shift, spread = codes.mean(0), codes.std(0).clamp_min(1e-12)
    codes = (codes - shift) / spread
    fitted = _maximize(codes, one_hot(_clusters(codes, components, seed), components).double())
    likelihood = -math.inf
    for _ in range(ITERATIONS if components > 1 else 0):
        joint = fitted.joint_log_density(codes)
        total = joint.logsumexp(1, keepdim=True)
        fitted = _maximize(codes, (joint - total).exp())
        before, likelihood = likelihood, float(total.mean())
        if likelihood - before < TOLERANCE:
            break
    means, factors = fitted.means * spread + shift, fitted.factors * spread[:, None]
    return Mixture(fitted.weights, means, factors)


def _maximize(codes: Tensor, responsibilities: Tensor) -> Mixture:
    """Return the maximum-likelihood mixture, given the probability (N, K) that each code belongs to each component."""
    counts = responsibilities.sum(0) + 1e-12  # a component without codes gets weight 0
    means = responsibilities.T @ codes / counts[:, None]
    ridge = RIDGE * torch.eye(codes.shape[1], dtype=codes.dtype)
    covariances = [
        ((codes - mean) * share[:, None]).T @ (codes - mean) / count + ridge
        for mean, share, count in zip(means, responsibilities.T, counts, strict=True)
    ]
    return Mixture(counts / counts.sum(), means, torch.linalg.cholesky(torch.stack(covariances)))


def _clusters(codes: Tensor, count: int, seed: int) -> Tensor:
    """Cluster codes (N, D) by k-means and return the cluster number of each code, int64 (N,).

    Initial centers are chosen by greedy k-means++ (Arthur and Vassilvitskii, k-means++: the advantages of careful
    seeding, SODA 2007): candidates are drawn with probability proportional to their squared distance from the nearest
    center so far, and the one that most reduces the sum of these squares becomes the next center.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(codes), (1,), generator=generator)
    centers, squares = codes[chosen], torch.full((len(codes), 1), math.inf).to(codes)
    for _ in range(count - 1):
        squares = torch.minimum(squares, torch.cdist(codes, centers[-1:]).square())
        chances = squares[:, 0] + 1e-12  # above 0, even if all codes are equal
        drawn = codes[torch.multinomial(chances, 2 + int(math.log(count)), replacement=True, generator=generator)]
        left = torch.minimum(squares, torch.cdist(codes, drawn).square()).sum(0)
        centers = torch.cat([centers, drawn[left.argmin()][None]])
    nearest = torch.cdist(codes, centers).argmin(1)
    for _ in range(ITERATIONS):
        members = one_hot(nearest, count).to(codes)
        sizes = members.sum(0)[:, None]
        centers = torch.where(sizes > 0, members.T @ codes / sizes.clamp_min(1), centers)
        before, nearest = nearest, torch.cdist(codes, centers).argmin(1)
        if torch.equal(before, nearest):
            break
    return nearest
