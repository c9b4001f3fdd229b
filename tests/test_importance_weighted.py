"""The importance-weighted bound as a loss: its value, its growth with the draws, and its two gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from vae_cli.axes.prior import StandardNormal
from vae_cli.axes.regularizer import KL, ImportanceWeighted, Regularizer
from vae_cli.config.build import build_experiment
from vae_cli.model.distributions import over_pixels
from vae_cli.model.inference import Inference
from vae_cli.model.loss import loss_and_terms
from vae_cli.model.scales import diagonal_normal

Compose = Callable[..., dict[str, Any]]
NOISE = 0.7  # standard deviation of p(x|z) = N(slope * z, NOISE^2), with z ~ N(0, 1): x ~ N(0, slope^2 + NOISE^2)


class Scalar(nn.Module):
    """A linear model of one pixel, whose likelihood p(x) has a closed form; the posterior is too wide."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.tensor(0.2))
        self.slope = nn.Parameter(torch.tensor(1.2))
        self.prior = StandardNormal(1)
        self.double()

    def forward(self, x: Tensor, samples: tuple[int, ...] = ()) -> Inference:
        scale = self.log_scale.exp().expand(len(x), 1)
        posterior = diagonal_normal(self.loc * x.flatten(1), scale)
        z = posterior.rsample(torch.Size(samples))
        mean = (self.slope * z).unsqueeze(-1).unsqueeze(-1)
        return Inference(x, posterior, z, self.prior(), over_pixels(Normal(mean, NOISE)))

    def log_likelihood(self, x: Tensor) -> Tensor:
        variance = self.slope.detach() ** 2 + NOISE**2
        return Normal(torch.zeros((), dtype=x.dtype), variance.sqrt()).log_prob(x).sum((1, 2, 3))


def bound(regularizer: Regularizer, images: int) -> tuple[float, float]:
    """Return the mean of -loss for x = 1, and its standard error."""
    x = torch.ones(images, 1, 1, 1, dtype=torch.double)
    with torch.no_grad():
        _, terms = loss_and_terms(Scalar(), regularizer, x, regularizer.samples)
    return -float(terms["loss"].mean()), float(terms["loss"].std()) / math.sqrt(images)


def test_the_bound_grows_with_the_draws_towards_the_log_likelihood() -> None:
    found = [bound(ImportanceWeighted(draws), 200_000 // draws) for draws in (1, 2, 5, 50)]
    truth = float(Scalar().log_likelihood(torch.ones(1, 1, 1, 1, dtype=torch.double)))
    for (low, error), (high, other) in pairwise(found):
        assert high - low > 3 * math.hypot(error, other)
    found.append(bound(ImportanceWeighted(1000), 1000))
    assert found[-1][0] == pytest.approx(truth, abs=0.002)


def test_with_one_draw_it_is_the_elbo_with_a_sampled_rate() -> None:
    one, exact = bound(ImportanceWeighted(1), 100_000), bound(KL(), 100_000)
    assert one[0] == pytest.approx(exact[0], abs=4 * math.hypot(one[1], exact[1]))


def test_more_draws_lower_the_variance_of_the_elbo_and_keep_its_mean() -> None:
    one, many = bound(KL(), 50_000), bound(KL(draws=50), 50_000)
    assert many[0] == pytest.approx(one[0], abs=4 * one[1])
    assert many[1] < one[1] / 5


def test_beta_weights_the_prior_and_the_posterior() -> None:
    """With beta = 0 the weights are p(x|z): the loss is below the distortion, and the penalty negative."""
    torch.manual_seed(0)
    x = torch.ones(1000, 1, 1, 1, dtype=torch.double)
    for beta in (0.0, 0.5, 2.0):
        regularizer, model = ImportanceWeighted(7, beta), Scalar()
        inference = model(x, regularizer.samples)
        ratio = inference.prior.log_prob(inference.z) - inference.posterior.log_prob(inference.z)
        weights = (inference.likelihood.log_prob(x) + beta * ratio).exp()
        torch.testing.assert_close(inference.distortion + regularizer(inference), -weights.mean(0).log())
        if beta == 0:
            assert (regularizer(inference) < 0).all()


def gradients(regularizer: Regularizer, rounds: int) -> dict[str, Tensor]:
    """Return the gradients of independent losses, (rounds,) for each parameter."""
    found: dict[str, list[Tensor]] = {}
    for _ in range(rounds):
        model = Scalar()
        loss, _ = loss_and_terms(model, regularizer, torch.ones(1, 1, 1, 1, dtype=torch.double), regularizer.samples)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found.setdefault(name, []).append(parameter.grad)
    return {name: torch.stack(values) for name, values in found.items()}


def test_both_gradients_have_the_same_mean_and_the_doubled_one_less_noise() -> None:
    torch.manual_seed(0)
    rounds = 3000
    plain = gradients(ImportanceWeighted(10), rounds)
    doubled = gradients(ImportanceWeighted(10, gradient="doubly_reparameterized"), rounds)
    for name, values in plain.items():
        other = doubled[name]
        error = math.sqrt((float(values.var()) + float(other.var())) / rounds)
        assert float(values.mean()) == pytest.approx(float(other.mean()), abs=4 * error), name
    for name in ("loc", "log_scale"):
        assert doubled[name].std() < plain[name].std() / 2
    assert float(doubled["slope"].std()) == pytest.approx(float(plain["slope"].std()), rel=0.1)  # the decoder's


def test_the_doubled_gradient_vanishes_at_the_exact_posterior() -> None:
    """There, all weights are equal to p(x), so the bound has no slope, in every single draw."""
    model = Scalar()
    precision = 1 + 1.2**2 / NOISE**2
    with torch.no_grad():
        model.loc.fill_(1.2 / NOISE**2 / precision)
        model.log_scale.fill_(-math.log(precision) / 2)
    regularizer = ImportanceWeighted(5, gradient="doubly_reparameterized")
    x = torch.ones(8, 1, 1, 1, dtype=torch.double)
    loss, terms = loss_and_terms(model, regularizer, x, regularizer.samples)
    loss.backward()
    torch.testing.assert_close(-terms["loss"], model.log_likelihood(x), atol=1e-6, rtol=0)
    for parameter in (model.loc, model.log_scale):
        assert parameter.grad is not None
        assert float(parameter.grad) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("gradient", ["reparameterized", "doubly_reparameterized"])
@pytest.mark.parametrize("sigma", ["learned", "shared", "fixed"])
def test_gradients_reach_every_parameter(compose: Compose, sigma: str, gradient: str) -> None:
    words = [f"sigma={sigma}", "regularizer=importance_weighted", f"regularizer.gradient={gradient}"]
    experiment = build_experiment(compose(*words, "likelihood=bernoulli", "network.hidden=[20]"))
    x = experiment.splits.train.batch(torch.arange(64))
    loss, _ = loss_and_terms(experiment.model, experiment.regularizer, x, experiment.regularizer.samples)
    loss.backward()
    for name, parameter in experiment.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
