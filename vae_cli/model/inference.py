"""The result of a forward pass, and the quantities computed from it: distortion, rate, ELBO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from vae_cli.model.distributions import Delta, location, surprisal
from vae_cli.model.mixtures import NoiseMixture
from vae_cli.model.normal_kl import normal_kl, normal_kl_parts
from vae_cli.model.scales import Standard, factors_of, log_scale_of


class computed_once(property):  # noqa: N801 (used like functools.cached_property)
    """A property that is computed on first access and then cached.

    functools.cached_property does the same, but in Python 3.11 it uses a lock, which torch.compile does not support.
    """

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        assert self.fget is not None
        known, name = instance.__dict__, self.fget.__name__
        if name not in known:
            known[name] = self.fget(instance)
        return known[name]


@dataclass(frozen=True)
class Inference:
    """The result of a forward pass on a batch of B images; every loss, metric and picture is computed from it.

    x           (B, C, H, W), the images, after any binarization by the likelihood
    posterior   q(z|x), batch (B,), event (D,)
    z           (*S, B, D), drawn from the posterior
    prior       p(z), batch (), event (D,)
    likelihood  p(x|z), batch (*S, B), event (C, H, W)
    parts       terms that a regularizer adds for curves and reports, by name; each (B,), or one number for all images
    decode      returns p(x|z) for other codes z (*S, B, D); None if the inference was not made by a model

    Quantities are in nats per image, summed over pixels and latent dimensions, and have shape (B,) unless stated
    otherwise. A quantity that is undefined for the type of posterior is None.
    """

    x: Tensor
    posterior: Distribution
    z: Tensor
    prior: Distribution
    likelihood: Distribution
    parts: dict[str, Tensor] = field(default_factory=dict)
    decode: Callable[[Tensor], Distribution] | None = None

    @computed_once
    def surprisal(self) -> Tensor:
        """-log p(x|z) for each draw of z, (*S, B)."""
        return surprisal(self.likelihood, self.x)

    @computed_once
    def distortion(self) -> Tensor:
        """The reconstruction term -log p(x|z), averaged over the draws of z."""
        return over_samples(self.surprisal)

    @computed_once
    def normal_kl_parts(self) -> tuple[Tensor, Tensor] | None:
        """The location part and the scale part of the KL divergence in each latent dimension, both (B, D).

        None unless posterior and prior are both diagonal normals. See `normal_kl_parts` in model/normal_kl.py.
        """
        return None if self._difference is None else normal_kl_parts(*self._difference)

    @computed_once
    def _difference(self) -> tuple[Tensor, Tensor] | None:
        """With posterior N(m, s^2) and prior N(a, t^2): (m - a) / t, (B, D), and ln(s / t), which broadcasts to it."""
        q, p = factors_of(self.posterior), factors_of(self.prior)
        if q is None or p is None:
            return None
        if isinstance(self.prior, Standard):  # a = 0 and t = 1: nothing to compute
            return q.loc, log_scale_of(q)
        return (q.loc - p.loc) / p.scale, log_scale_of(q) - log_scale_of(p)

    @computed_once
    def _normal_kl(self) -> tuple[Tensor, Tensor] | None:
        """The KL divergence of diagonal normals and its location part, (B,) each; the latter has no gradient."""
        return None if self._difference is None else normal_kl(*self._difference)

    @computed_once
    def kl(self) -> Tensor:
        """The divergence that regularizers use: the rate or, for a point mass, the energy -log p(loc).

        If the rate has no closed form, it is estimated from z, without bias (see `divergence`).
        """
        if self._normal_kl is not None:
            return self._normal_kl[0]
        return divergence(self.posterior, self.prior, self.z)

    @property
    def rate(self) -> Tensor | None:
        """The KL term KL(q(z|x) || p(z)); None for a point mass, for which it is infinite.

        If the noise level is random and the prior normal, it is an upper bound (see NoiseMixture).
        """
        return None if isinstance(self.posterior, Delta) else self.kl

    @computed_once
    def rate_per_dimension(self) -> Tensor | None:
        """The rate of each latent dimension, (B, D); None unless posterior and prior are both products over dimensions,
        with a KL divergence that has a closed form."""
        if self.normal_kl_parts is not None:
            return self.normal_kl_parts[0] + self.normal_kl_parts[1]
        if not isinstance(self.posterior, Independent) or not isinstance(self.prior, Independent):
            return None
        try:
            return kl_divergence(self.posterior.base_dist, self.prior.base_dist)
        except NotImplementedError:
            return None

    @property
    def elbo(self) -> Tensor | None:
        """The evidence lower bound -(distortion + rate), without any weight such as beta; None for a point mass.

        In expectation over z it is at most log p(x). Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014.
        """
        return None if self.rate is None else -(self.distortion + self.rate)

    @property
    def loc(self) -> Tensor:
        """The code without noise, (B, D): the posterior's mean, unless it has another `location`."""
        return location(self.posterior)

    @property
    def scale(self) -> Tensor | None:
        """The posterior's standard deviation, (B, D); None for a point mass."""
        return None if isinstance(self.posterior, Delta) else self.posterior.stddev

    def terms(self, penalty: Tensor) -> dict[str, Tensor]:
        """Return the loss and its terms, each (B,), keyed by their names in curves and reports.

        loss = distortion + penalty; the penalty (B,) comes from the regularizer. Undefined terms are left out, and so
        are those that `with_derived` computes from the means of the others. The regularizer's `parts` and the part of
        the rate have no gradient, since no loss consists of them.
        """
        terms = {"loss": self.distortion + penalty, "distortion": self.distortion, "penalty": penalty}
        terms |= {name: part.detach().expand_as(penalty) for name, part in self.parts.items()}
        if self.rate is not None:
            terms["rate"] = self.rate
        if self._normal_kl is not None:
            terms["rate_loc"] = self._normal_kl[1]
        return terms


def with_derived(terms: Mapping[str, float]) -> dict[str, float]:
    """Return mean terms of the loss, with those that follow from them: rate_scale = rate - rate_loc, and elbo.

    A training step does not compute the derived terms, because their means are all that is needed.
    """
    derived = dict(terms)
    if "rate_loc" in terms:
        derived["rate_scale"] = terms["rate"] - terms["rate_loc"]
    if "rate" in terms:
        derived["elbo"] = -(terms["distortion"] + terms["rate"])
    return derived


def divergence(posterior: Distribution, prior: Distribution, z: Tensor) -> Tensor:
    """Return KL(q(z|x) || p(z)), in nats (B,), or the energy of a point mass.

    Where no closed form is known, it is estimated from the draws z (*S, B, D) of the posterior. If the noise level is
    random and the prior normal, it is an upper bound (see NoiseMixture).
    """
    try:
        return kl_divergence(posterior, prior)
    except NotImplementedError:
        return sampled_divergence(posterior, prior, z)


def sampled_divergence(posterior: Distribution, prior: Distribution, z: Tensor) -> Tensor:
    """Return the mean of log q(z|x) - log p(z) over draws z (*S, B, D) of the posterior, in nats (B,): an unbiased
    estimate of the KL divergence."""
    return over_samples(posterior.log_prob(z) - prior.log_prob(z))


def unbiased_divergence(posterior: Distribution, prior: Distribution, z: Tensor) -> Tensor:
    """Return KL(q(z|x) || p(z)) like `divergence`, but estimated from the draws z where that is only a bound."""
    return (sampled_divergence if isinstance(posterior, NoiseMixture) else divergence)(posterior, prior, z)


def over_samples(values: Tensor) -> Tensor:
    """Return the mean (B,) of values (*S, B) over the draws of z."""
    return values if values.dim() == 1 else values.flatten(0, -2).mean(0)
