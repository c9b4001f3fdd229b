"""Metrics for claim 5 (price): how much likelihood a sigma mode costs, and how much of that is due to the prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributions import Distribution

from vae_cli.metrics.base import CODES_PER_IMAGE, Codes, Figure, Metric, mean_figure, undefined
from vae_cli.metrics.information import is_noise_mixture, is_normal, rate_is_bound
from vae_cli.model.scales import factors_of
from vae_cli.runs.codes import MIXTURE_COMPONENTS
from vae_cli.runs.mixture import Mixture

FEW_DRAWS = 64  # draws with which the importance-weighted bound is compared, to show how much it still rises
DECODED_PIXELS = 1 << 21  # in one batch of decoded images
HELD_WEIGHTS = 1 << 22  # importance weights in memory at a time

Density = Callable[[Tensor], Tensor]  # maps codes (N, D) to their log densities (N,)

BOUND = "with a bound on the rate (see vae explain rate); with the rate itself, it is higher"
POINT_MASS = "the KL divergence of a point mass from the prior is infinite"
ON_SPHERE = "the codes lie on a sphere, where a Gaussian in all dimensions has no density"


class Bound(Metric):
    """The distortion of test images and two lower bounds on log p(x), in nats per image.

    distortion             E_q[-log p(x|z)], over 8 draws of z
    elbo                   -(distortion + rate), with the same draws
    iw_bound_k{K}          E[log 1/K sum_k w_k] with w_k = p(x, z_k) / q(z_k|x), for budget.iw_images test images
    iw_gap                 iw_bound_k{K} minus the ELBO with the same images and draws, E[1/K sum_k log w_k]; the gap is
                           never negative
    iw_growth              iw_bound_k{K} minus the bound with 64 of the same draws; not defined for K of 64 or less
    iw_curve               the bound at k = 1, 2, 5, 10 ... K (iw_curve_k): for each k a mean over the K // k disjoint
                           groups of k draws, and unbiased for the bound at that k
    effective_sample_size  (sum w)^2 / sum w^2, between 1 and K; K if q is the exact posterior

    Errors are standard errors over images, and include the spread over draws. The bound rises with K towards log p(x),
    at a pace that depends on how well q fits the exact posterior. How far it is below log p(x) cannot be computed from
    the draws; iw_growth and iw_curve show whether it still rises. Bounds of runs that still rise at different paces
    must not be ranked. Memory use is limited by constants of this module, whatever K and the number of images. For a
    point mass, only the distortion is defined, since the others need a density of q. Burda, Grosse and Salakhutdinov,
    Importance Weighted Autoencoders, ICLR 2016.
    """

    claim = "price"
    decodes = (
        *("distortion", "elbo", "iw_bound_k{k}", "iw_gap", "iw_growth", "iw_curve_k", "iw_curve"),
        "effective_sample_size",
    )

    def compute(self) -> dict[str, Figure]:
        distortion, rate = self.subject.terms
        figures = {"distortion": mean_figure(distortion, "nats")}
        count = self.subject.budget.samples
        if rate is None:
            names = ("elbo", f"iw_bound_k{count}", "iw_gap", "iw_growth", "iw_curve_k", "iw_curve")
            return figures | dict.fromkeys((*names, "effective_sample_size"), undefined(POINT_MASS))
        ladder = curve_steps(count)
        curve, size = self._importance(count, ladder)
        means = [mean_figure(values, "nats") for values in curve.T]
        growth = undefined(f"there are only {count} draws")
        if count > FEW_DRAWS:
            growth = mean_figure(curve[:, -1] - curve[:, ladder.index(FEW_DRAWS)], "nats")
        return figures | {
            "elbo": mean_figure(-(distortion + rate), "nats", BOUND if rate_is_bound(self.subject) else ""),
            f"iw_bound_k{count}": means[-1],
            "iw_gap": mean_figure(curve[:, -1] - curve[:, 0], "nats"),
            "iw_growth": growth,
            "iw_curve_k": Figure([float(k) for k in ladder], "draws"),
            "iw_curve": Figure(
                [_number(mean.value) for mean in means],
                "nats",
                len(curve),
                None if len(curve) < 2 else [_number(mean.error) for mean in means],
            ),
            "effective_sample_size": mean_figure(size, "draws"),
        }

    def _importance(self, count: int, ladder: list[int]) -> tuple[Tensor, Tensor]:
        """Return the bound of each image for each k in `ladder`, (N, len(ladder)), and effective sample sizes (N,)."""
        curve, size = [], []
        most = self.subject.budget.iw_images
        for x, _ in self.subject.batches("test", most):
            for part in x.split(max(1, HELD_WEIGHTS // count)):
                log_weight = self._log_weight(part, count)
                curve.append(torch.stack([group_bound(log_weight, k) for k in ladder], 1))
                size.append((2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp())
        return torch.cat(curve), torch.cat(size)

    def _log_weight(self, x: Tensor, count: int) -> Tensor:
        """Return log p(x, z_k) - log q(z_k|x) for K = count draws z_k for each image x (B, C, H, W), float64 (K, B)."""
        model = self.subject.model
        posterior, prior = model.encode(x), model.prior()
        log_weight = torch.empty(count, len(x), dtype=torch.float64)
        images = max(1, DECODED_PIXELS // x[0].numel())  # decoded in one batch
        for rows in torch.arange(count).split(max(1, images // len(x))):
            z = posterior.rsample((len(rows),))
            surprise = torch.cat([self.subject.distortion(part, codes) for part, codes in _columns(x, z, images)], 1)
            log_weight[rows] = (prior.log_prob(z) - posterior.log_prob(z) - surprise).cpu().double()
        return log_weight


def _columns(x: Tensor, z: Tensor, images: int) -> list[tuple[Tensor, Tensor]]:
    """Split images (B, C, H, W) and their codes (K, B, D) into parts of at most `images` images."""
    return list(zip(x.split(images), z.split(images, 1), strict=True))


def _number(value: float | list[float] | None) -> float:
    assert isinstance(value, float)
    return value


def curve_steps(count: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50 ... up to count, FEW_DRAWS, and count itself.

    >>> curve_steps(200)
    [1, 2, 5, 10, 20, 50, 64, 100, 200]
    """
    steps = {FEW_DRAWS} | {digit * 10**power for power in range(len(str(count))) for digit in (1, 2, 5)}
    return [*(k for k in sorted(steps) if k < count), count]


def group_bound(log_weight: Tensor, k: int) -> Tensor:
    """Return each image's bound for k draws, (B,): the log of the mean of k weights, averaged over the K // k disjoint
    groups of k draws in log_weight (K, B)."""
    groups = len(log_weight) // k
    return (log_weight[: groups * k].unflatten(0, (groups, k)).logsumexp(1) - math.log(k)).mean(0)


class AggregateFit(Metric):
    """The first two moments of the test images' aggregate posterior q(z) = E_x q(z|x), compared with the prior.

    With m the mean of E(z|x) and C = Cov(E(z|x)) + E Cov(z|x), where a point mass has Cov(z|x) = 0:

    aggregate_mean_norm     |m|
    aggregate_variance      the diagonal of C, one value per dimension
    aggregate_spectrum      the eigenvalues of C in descending order; they do not change if the code is rotated
    aggregate_kl_gaussian   KL(N(m, C) || p(z)) in nats, for a prior that is normal with independent dimensions: a lower
                            bound on KL(q(z) || p(z)), since no distribution with these moments has a larger entropy;
                            not defined (infinite) if the codes of a point mass do not span the latent space

    Variances estimated from N images have a relative standard error of about sqrt(2 / N), and the KL is too large by
    about D (D + 3) / (4 N). The largest eigenvalues are too large, and the smallest too small, by a relative error of
    about sqrt(D / N).
    """

    claim = "price"

    def compute(self) -> dict[str, Figure]:
        codes = self.subject.codes("test")
        count = len(codes.loc)
        mean, covariance = moments(codes)
        spectrum = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
        return {
            "aggregate_mean_norm": Figure(float(mean.norm()), "", count),
            "aggregate_variance": Figure(covariance.diagonal().tolist(), "", count),
            "aggregate_spectrum": Figure(spectrum.tolist(), "", count),
            "aggregate_kl_gaussian": self._kl(mean, covariance, spectrum, count),
        }

    def _kl(self, mean: Tensor, covariance: Tensor, spectrum: Tensor, count: int) -> Figure:
        factors = factors_of(self.subject.model.prior())
        if factors is None:
            return undefined("the prior is not normal with independent dimensions")
        # Eigenvalues below this share of the largest are rounding errors of codes in single precision.
        if not spectrum[-1] > 1e-12 * spectrum[0]:
            return undefined("the codes do not span the latent space, so the KL divergence is infinite")
        loc, scale = factors.loc.cpu().double(), factors.scale.cpu().double()
        away = ((mean - loc) / scale).square() + covariance.diagonal() / scale.square() - 1
        return Figure(float((away.sum() - spectrum.log().sum()) / 2 + scale.log().sum()), "nats", count)


class RefittedPrior(Metric):
    """The ELBO of the test images under a prior refitted to the training codes, in nats per image.

    The gain over the ELBO under the run's own prior is the part of the cost that comes from that prior rather than from
    the noise.

    elbo_gaussian_prior   under N(m, C), with the moments of the aggregate posterior of the training images
    elbo_mixture_prior    under a mixture of 10 Gaussians with full covariances, fitted to one noisy code of each
                          training image (at most 10,000)
    ..._gain              E_q[log p_refitted(z) - log p(z)], the gain over the ELBO under the run's own prior

    Each ELBO is the run's own (see Bound) plus the gain, E_q log p_refitted(z) + entropy of q + rate. The first term is
    exact for the Gaussian if q is normal with independent dimensions; otherwise it is averaged over 8 draws of z. So is
    the entropy of a distribution for which torch has no closed form. The error of a gain is the standard error over
    images of the paired difference. If the refitted prior equals the aggregate posterior, the gain is KL(q(z) || p(z)).
    With few training codes the mixture overfits, so its gain on the test images is small or even negative; with fewer
    than 10 (D + 1) codes, it is not defined. If the run's rate is only a bound (see NoiseMixture), the gain is relative
    to the ELBO with the rate itself. Nothing is defined for a point mass, or for codes on a sphere. Ghosh et al., From
    Variational to Deterministic Autoencoders, ICLR 2020, fit the same two priors.
    """

    claim = "price"

    def compute(self) -> dict[str, Figure]:
        subject = self.subject
        distortion, rate = subject.terms
        names = ("elbo_gaussian_prior", "elbo_gaussian_prior_gain", "elbo_mixture_prior", "elbo_mixture_prior_gain")
        if rate is None:
            return dict.fromkeys(names, undefined(POINT_MASS))
        if subject.is_on_sphere:
            return dict.fromkeys(names, undefined(ON_SPHERE))
        mean, covariance = moments(subject.codes("train"))
        own = subject.model.prior()
        priors: dict[str, Density] = {"elbo_gaussian_prior": gaussian(mean, covariance).log_prob}
        too_few = subject.too_few_for(MIXTURE_COMPONENTS)
        if not too_few:
            priors["elbo_mixture_prior"] = subject.mixture(MIXTURE_COMPONENTS).log_prob
        if self._has(is_noise_mixture):  # the rate may be a bound: the gain compares the same draws under both priors
            priors["own"] = lambda z: own.log_prob(z.to(subject.device).float()).cpu().double()
        expected, entropy = self._expected(priors)
        if "own" in expected:
            rate = -entropy - expected.pop("own")
        if self._has(is_normal):
            expected["elbo_gaussian_prior"] = expected_log_density(mean, covariance, subject.codes("test"))
        figures = dict.fromkeys(names, undefined(too_few))
        for name, log_density in expected.items():
            elbo = log_density + entropy - distortion
            figures[name] = undefined(subject.no_decoder) if subject.no_decoder else mean_figure(elbo, "nats")
            figures[f"{name}_gain"] = mean_figure(log_density + entropy + rate, "nats")
        return figures

    def _expected(self, priors: Mapping[str, Density]) -> tuple[dict[str, Tensor], Tensor]:
        """Return E_q log p(z) of each test image for the log density of each prior p, estimated from draws, and the
        entropy of q, float64 (N,) each."""
        found: dict[str, list[Tensor]] = {name: [] for name in priors}
        entropies = []
        for x, _ in self.subject.batches("test"):
            posterior = self.subject.model.encode(x)
            z = posterior.rsample((CODES_PER_IMAGE,))
            try:
                entropy = posterior.entropy()
            except NotImplementedError:
                entropy = -posterior.log_prob(z).mean(0)
            entropies.append(entropy.cpu().double())
            for name, prior in priors.items():
                found[name].append(torch.stack([prior(draw) for draw in z.cpu().double()]).mean(0))
        return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(entropies)

    def _has(self, is_kind: Callable[[Distribution], bool]) -> bool:
        x, _ = next(self.subject.batches("test", most=1))
        return is_kind(self.subject.model.encode(x))


def expected_log_density(mean: Tensor, covariance: Tensor, codes: Codes) -> Tensor:
    """Return E_q log N(z; mean, covariance) for each image, float64 (N,), with q's loc and scale, (N, D), in `codes`:
    -1/2 (log |2 pi C| + (loc - m)^T C^-1 (loc - m) + sum_j scale_j^2 (C^-1)_jj)."""
    assert codes.scale is not None
    fitted = gaussian(mean, covariance)
    inverse = torch.cholesky_inverse(fitted.factors[0])
    # The density at loc lacks only the term due to the scale.
    return fitted.log_prob(codes.loc.cpu().double()) - codes.scale.cpu().double().square() @ inverse.diagonal() / 2


def moments(codes: Codes) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and covariance Cov(E(z|x)) + E Cov(z|x) (D, D) of the aggregate posterior, float64."""
    loc = codes.mean.cpu().double()
    covariance = loc.T.cov(correction=0).reshape(loc.shape[1], loc.shape[1])
    if codes.noise is not None:
        covariance = covariance + codes.noise.cpu()
    elif codes.scale is not None:
        covariance = covariance + codes.scale.cpu().double().square().mean(0).diag()
    return loc.mean(0), covariance


def gaussian(mean: Tensor, covariance: Tensor) -> Mixture:
    """Return N(mean, covariance). Dimensions are scaled to unit variance for the factorization, so any scales work.

    After scaling, 1e-12 is added to each variance, so that codes that hardly vary in some direction have a density.
    """
    spread = covariance.diagonal().sqrt()
    correlation = covariance / spread / spread[:, None] + 1e-12 * torch.eye(len(mean), dtype=covariance.dtype)
    factor = torch.linalg.cholesky(correlation) * spread[:, None]
    return Mixture(torch.ones(1, dtype=mean.dtype), mean[None], factor[None])
