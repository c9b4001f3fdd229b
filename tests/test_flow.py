"""The prior `flow`: change of variables, its start at N(0, I), and the aggregate posteriors that it can learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from vae_cli import Run, load_run
from vae_cli.axes.prior import Flow, StandardNormal
from vae_cli.axes.sigma import Learned
from vae_cli.commands.train import train
from vae_cli.comparison.run_plots import code_map
from vae_cli.config.build import build_experiment
from vae_cli.core.errors import UserError
from vae_cli.metrics.base import Budget, MeasuredRun, Metric, as_plain, compute_metrics
from vae_cli.metrics.information import AggregateDensity, MutualInformation, Rate
from vae_cli.metrics.price import AggregateFit, Bound, RefittedPrior
from vae_cli.model import flow
from vae_cli.model.flow import LOG_SCALE_LIMIT, FlowDistribution
from vae_cli.model.inference import Inference
from vae_cli.runs.codes import prior_codes
from vae_cli.runs.pictures import traversals

Compose = Callable[..., dict[str, Any]]
TINY = ["prior=flow", "prior.couplings=4", "prior.hidden=8", "network.hidden=[16]", "latent=2"]


def random_flow(latent: int, spread: float = 0.3, couplings: int = 6) -> FlowDistribution:
    """A flow with random weights, in double precision."""
    torch.manual_seed(0)
    prior = Flow(latent, couplings=couplings, hidden=16).double()
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=spread)
    law = prior()
    assert isinstance(law, FlowDistribution)
    return law


def fit(prior: Flow, draw: Callable[[int], Tensor], steps: int, batch: int = 500) -> None:
    """Maximize the mean log density of draws."""
    optimizer = torch.optim.Adam(prior.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-prior().log_prob(draw(batch)).mean()).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def test_the_density_integrates_to_one() -> None:
    law = random_flow(2)
    line = torch.linspace(-20, 20, 1001, dtype=torch.float64)
    z = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    density = law.log_prob(z).exp()
    assert density.shape == (1001, 1001)
    assert float(density.sum() * (line[1] - line[0]) ** 2) == pytest.approx(1, abs=1e-3)
    peak = float(density.max())
    assert not math.isclose(peak, 1 / (2 * math.pi), rel_tol=0.2)  # it is not N(0, I)


@pytest.mark.parametrize("latent", [2, 3, 8])
def test_the_density_is_the_base_density_over_the_determinant(latent: int) -> None:
    law = random_flow(latent)
    base = Independent(Normal(torch.zeros(latent).double(), 1.0), 1)
    for u in 2 * torch.randn(5, latent, dtype=torch.float64):
        z = law.generated(u[None])[0]
        jacobian = torch.autograd.functional.jacobian(lambda u: law.generated(u[None])[0], u)
        torch.testing.assert_close(law.log_prob(z), base.log_prob(u) - torch.linalg.slogdet(jacobian).logabsdet)
        back, log_det = law.normalized(z[None])
        torch.testing.assert_close(back[0], u)
        torch.testing.assert_close(log_det[0], -torch.linalg.slogdet(jacobian).logabsdet)
    assert (jacobian.abs() > 1e-6).all()  # each dimension depends on every other


def test_draws_are_the_image_of_normal_draws() -> None:
    law = random_flow(3)
    torch.manual_seed(5)
    z = law.rsample((4, 7))
    torch.manual_seed(5)
    u = torch.randn(4, 7, 3, dtype=torch.float64)
    assert z.requires_grad
    torch.testing.assert_close(z, law.generated(u.flatten(0, 1)).unflatten(0, (4, 7)))
    torch.testing.assert_close(law.normalized(z.flatten(0, 1))[0].unflatten(0, (4, 7)), u)
    assert not law.sample((2,)).requires_grad
    assert law.sample().shape == (3,)
    assert law.log_prob(z).shape == (4, 7)


@pytest.mark.parametrize("latent", [2, 5])
def test_it_starts_as_the_standard_normal_to_the_last_bit(latent: int) -> None:
    torch.manual_seed(0)
    law, standard = Flow(latent)(), StandardNormal(latent)()
    z = 3 * torch.randn(9, 4, latent)
    assert torch.equal(law.log_prob(z), standard.log_prob(z))
    torch.manual_seed(1)
    u = torch.randn(6, latent)
    torch.manual_seed(1)
    assert torch.equal(law.sample((6,)), u)
    torch.testing.assert_close(law.mean, torch.zeros(latent))
    torch.testing.assert_close(law.stddev, torch.ones(latent))


def test_its_first_rate_estimates_the_closed_form() -> None:
    torch.manual_seed(0)
    posterior = Learned()(torch.randn(5, 8))
    z = posterior.rsample((100_000,))
    unused = torch.zeros(5, 1, 1, 1)
    law, likelihood = Flow(4, couplings=2, hidden=8)(), Independent(Normal(unused, 1.0), 3)
    with torch.no_grad():
        rate = Inference(unused, posterior, z, law, likelihood).rate
        error = (posterior.log_prob(z) - law.log_prob(z)).std(0) / len(z) ** 0.5
    assert rate is not None
    exact = kl_divergence(posterior, StandardNormal(4)())
    assert ((rate - exact).abs() < 5 * error).all()


def test_every_parameter_learns_from_the_second_step_on(compose: Compose) -> None:
    """In the first step only the last layers learn: they start at 0, so they pass no gradient on."""
    experiment = build_experiment(compose("prior=flow", "latent=5"))
    x = experiment.splits.train.batch(torch.arange(64))
    for step in range(2):
        experiment.optimizer.zero_grad()
        inference = experiment.model(x)
        (inference.distortion + inference.kl).mean().backward()
        for name, parameter in experiment.model.prior.named_parameters():
            is_last = name.split(".")[3] == "4"
            assert parameter.grad is not None
            assert (float(parameter.grad.abs().sum()) > 0) == (is_last or step == 1), name
        experiment.optimizer.step()


@torch.no_grad()
def test_scales_are_bounded_whatever_the_networks_say() -> None:
    law = random_flow(4, spread=30.0, couplings=8)
    z = 1e3 * torch.randn(50, 4, dtype=torch.float64)
    _, log_det = law.normalized(z)
    assert float(log_det.abs().max()) <= 8 * 2 * LOG_SCALE_LIMIT
    assert float(log_det.abs().max()) > 2 * LOG_SCALE_LIMIT
    assert law.log_prob(z).isfinite().all()


@pytest.mark.parametrize("couplings", [2, 3, 8])
def test_every_dimension_is_transformed(couplings: int) -> None:
    law = random_flow(5, couplings=couplings)
    u = torch.randn(50, 5, dtype=torch.float64)
    assert ((law.generated(u) - u).abs().mean(0) > 1e-3).all()


def test_estimated_moments_are_exact_for_shifts_and_scales() -> None:
    prior = Flow(3, couplings=2, hidden=4)
    with torch.no_grad():
        for coupling in prior.couplings:
            last: Any = coupling.get_submodule("network.4")
            last.bias.copy_(torch.linspace(0.5, 1.0, len(last.bias)))
    law = prior()
    u = torch.zeros(1, 3)
    torch.testing.assert_close(law.mean, law.generated(u)[0])
    torch.testing.assert_close(law.stddev, (law.generated(u + 1) - law.generated(u))[0])


def test_estimated_moments_are_repeatable_and_leave_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    law = random_flow(3)
    torch.set_rng_state(state)
    mean, deviation = law.mean, law.stddev
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(mean, random_flow(3).mean)
    assert not mean.requires_grad
    with torch.no_grad():
        z = law.sample((200_000,))
    assert ((mean - z.mean(0)).abs() < 0.05 * deviation).all()
    torch.testing.assert_close(deviation, z.std(0), rtol=0.05, atol=0)


def test_many_codes_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    law = random_flow(3)
    z = torch.randn(5, 7, 3, dtype=torch.float64)
    whole = law.log_prob(z)
    torch.manual_seed(0)
    drawn = law.sample((5, 7))
    monkeypatch.setattr(flow, "NUMBERS_AT_ONCE", 4 * 16)
    torch.testing.assert_close(law.log_prob(z), whole)
    torch.manual_seed(0)
    torch.testing.assert_close(law.sample((5, 7)), drawn)


def test_one_dimension_is_refused(compose: Compose) -> None:
    with pytest.raises(UserError, match=r"^prior=flow needs latent=2 or more, .* with latent=1, type prior=mixture\.$"):
        build_experiment(compose("prior=flow", "latent=1"))
    assert build_experiment(compose("prior=flow", "latent=2")).model.prior().event_shape == (2,)


@pytest.mark.slow
def test_it_learns_a_correlated_normal_as_no_diagonal_normal_can() -> None:
    """The rate of a diagonal normal exceeds the entropy by KL = 1/2 (sum ln C_jj - ln det C) at best."""
    torch.manual_seed(0)
    root = torch.randn(4, 4) + 0.5 * torch.eye(4)
    target = MultivariateNormal(torch.tensor([3.0, -1.0, 0.0, 2.0]), root @ root.T)
    prior = Flow(4, hidden=64)
    fit(prior, lambda n: target.sample((n,)), 600)
    z = target.sample((20_000,))
    with torch.no_grad():
        gap = float((target.log_prob(z) - prior().log_prob(z)).mean())
    covariance = target.covariance_matrix
    diagonal = float((covariance.diagonal().log().sum() - torch.logdet(covariance)) / 2)
    assert diagonal > 0.5
    assert -0.01 < gap < 0.05


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A short run with two latent dimensions."""
    monkeypatch.chdir(tmp_path)
    train([*TINY, "epochs=2"])
    return load_run("latest", device="cpu")


def test_figures_and_pictures_of_a_run_are_defined(run: Run) -> None:
    subject = MeasuredRun(run, Budget(100, 200, 8, 20, 50, 6, 20, 100))
    kinds: list[type[Metric]] = [Rate, MutualInformation, AggregateDensity, Bound, AggregateFit, RefittedPrior]
    found = [{name: figure for group in compute_metrics(subject, kinds).values() for name, figure in group.items()}]
    found.append({name: figure for group in compute_metrics(subject, kinds).values() for name, figure in group.items()})
    assert found[0] == found[1]
    missing = {name for name, figure in found[0].items() if figure.value is None}
    assert missing == {"rate_loc", "rate_scale", "rate_per_dimension", "aggregate_kl_gaussian", "iw_growth"}
    for figure in found[0].values():
        as_plain(figure)  # refuses what is not finite
    assert code_map(run) is not None
    picture = traversals(run, 3.0, 5, 0, False)
    assert picture.arrays["images"].shape == (2, 5, 1, 8, 8)
    assert picture.arrays["images"].isfinite().all()


def test_temperature_shrinks_draws_towards_the_mean(run: Run) -> None:
    law = run.model.prior()
    torch.manual_seed(0)
    full = prior_codes(run, 50)
    torch.manual_seed(0)
    assert torch.equal(full, law.sample((50,)))
    torch.manual_seed(0)
    torch.testing.assert_close(prior_codes(run, 50, 0.5), (full + law.mean) / 2)
    torch.testing.assert_close(prior_codes(run, 50, 0.0), law.mean.expand(50, 2))


def test_a_resumed_run_is_bit_identical(run: Run) -> None:
    train([*TINY, "epochs=1", "run_name=again"])
    train([*TINY, "epochs=2", "run_name=again"])
    again = load_run("again", device="cpu")
    for one, other in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def moons(count: int) -> Tensor:
    """Draw points (N, 2) near two interleaved half circles."""
    angle, side = math.pi * torch.rand(count), torch.randint(2, (count,)).float() * 2 - 1
    arc = torch.stack([side * angle.cos() - side / 2, side * angle.sin() - side / 4], 1)
    return 2 * (arc + 0.1 * torch.randn(count, 2))


@pytest.mark.slow
def test_it_learns_two_moons_as_no_normal_can() -> None:
    torch.manual_seed(0)
    prior = Flow(2, hidden=64)
    fit(prior, moons, 400)
    z = moons(20_000)
    best_normal = MultivariateNormal(z.mean(0), z.T.cov())
    with torch.no_grad():
        gain = float((prior().log_prob(z) - best_normal.log_prob(z)).mean())
    assert gain > 0.5


@pytest.mark.slow
def test_it_learns_the_aggregate_posterior_of_a_linear_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sigma fixed to 1, N(0, I) costs likelihood. If the prior is the aggregate posterior, the ELBO is the
    log-likelihood of probabilistic PCA, as with a learned sigma."""
    monkeypatch.chdir(tmp_path)
    train(["experiment=linear_vae", "sigma=fixed", "latent=3", "prior=flow", "epochs=20", "dataset.images=4000"])
    run = load_run("latest", device="cpu")
    x = run.splits.test.batch(torch.arange(len(run.splits.test)))
    with torch.no_grad():
        elbo = float(run.model(x, (20,)).elbo.double().mean())
    pixels = x.flatten(1).double()
    lam = torch.linalg.eigvalsh(pixels.T @ pixels / len(pixels)).flip(0)
    model = torch.cat([lam[:3], torch.ones(len(lam) - 3)])
    likelihood = float(-0.5 * (model.log() + lam / model + math.log(2 * math.pi)).sum())
    price = float((lam[:3].sqrt() - 1 - lam[:3].log() / 2).sum())  # of N(0, I), in nats
    assert price > 1
    assert elbo == pytest.approx(likelihood, abs=0.1 * price)
    codes = torch.cat([run.model(x).z.detach() for _ in range(5)])
    covariance = codes.T.cov()
    with torch.no_grad():
        drawn = prior_codes(run, 50_000)
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0.15, atol=0.15)
