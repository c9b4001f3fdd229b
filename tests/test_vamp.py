"""The VampPrior, against the aggregate posterior that it approximates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import kl_divergence

from vae_cli import load_run
from vae_cli.axes.prior import ScaledNormal
from vae_cli.commands.train import train
from vae_cli.config import catalog
from vae_cli.config.build import build_experiment
from vae_cli.metrics.base import BUDGETS, MeasuredRun, compute_metrics
from vae_cli.metrics.information import MutualInformation
from vae_cli.model.vae import VAE

Compose = Callable[..., dict[str, Any]]
REFUSED = {"deterministic", "uniform", "preserving", "power_spherical"}  # see test_sigma.py
NOISY = [sigma for sigma in catalog.groups()["sigma"].choices if sigma not in REFUSED]


def pseudo_inputs(model: VAE) -> torch.Tensor:
    inputs: Any = model.prior.inputs
    assert isinstance(inputs, torch.nn.Parameter)
    return inputs


@pytest.mark.parametrize("sigma", NOISY)
def test_with_all_training_images_the_rate_is_the_mutual_information(
    sigma: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prior is then the aggregate posterior q(z), so rate - I(x; z) = KL(q(z) || p(z)) is 0 for every draw."""
    monkeypatch.chdir(tmp_path)
    train(["prior=vamp", "prior.components=5", f"sigma={sigma}", "network=linear", "latent=4", "epochs=20"])
    run = load_run("latest", device="cpu")
    images = run.splits.train
    prior: Any = run.model.prior
    prior.inputs = torch.nn.Parameter(images.batch(torch.arange(len(images))))
    prior.components = len(images)
    found = compute_metrics(MeasuredRun(run, BUDGETS["full"]), [MutualInformation])["MutualInformation"]
    assert found["marginal_kl"].value == pytest.approx(0, abs=1e-4)
    assert found["marginal_kl"].error == pytest.approx(0, abs=1e-4)
    information = found["mutual_information"].value
    assert isinstance(information, float)
    assert information > 0.1


def test_one_pseudo_input_gives_the_closed_form(compose: Compose) -> None:
    """With sigma=shared, a mixture of one posterior is a normal whose rate has a closed form."""
    model = build_experiment(compose("prior=vamp", "prior.components=1", "sigma=shared", "latent=3")).model
    x = model.likelihood.observe(torch.rand(4, 1, 8, 8))  # type: ignore[operator]
    torch.manual_seed(0)
    with torch.no_grad():
        inference = model(x, (20_000,))
        normal = ScaledNormal(3)
        only = model.encode(pseudo_inputs(model))
        normal.loc.copy_(only.mean[0])
        exact = kl_divergence(inference.posterior, only.expand((4,)))
        draws = inference.posterior.log_prob(inference.z) - inference.prior.log_prob(inference.z)
    assert ((inference.rate - exact).abs() < 5 * draws.std(0) / len(draws) ** 0.5 + 1e-5).all()


def test_the_encoder_belongs_to_the_model_alone(compose: Compose) -> None:
    """The prior only refers to it: it is not saved twice, and a copy of the model encodes by its own encoder."""
    model = build_experiment(compose("prior=vamp", "prior.components=3", "network=linear")).model
    assert [name for name in model.state_dict() if name.startswith("prior.")] == ["prior.inputs"]
    other = copy.deepcopy(model)
    before = other.prior().mean
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(1)
    assert torch.equal(other.prior().mean, before)
    assert not torch.equal(model.prior().mean, before)


def test_the_pseudo_inputs_start_around_the_mean_image(compose: Compose) -> None:
    experiment = build_experiment(compose("prior=vamp"))
    inputs, mean = pseudo_inputs(experiment.model).detach(), experiment.splits.train.mean()
    assert inputs.shape == (500, *mean.shape)
    spread = float((inputs - mean).square().mean().sqrt())
    images = experiment.splits.train.batch(torch.arange(len(experiment.splits.train)))
    assert spread == pytest.approx(float((images - mean).square().mean().sqrt()), rel=0.05)
    torch.testing.assert_close(inputs.mean(0), mean, rtol=0, atol=5 * spread / 500**0.5)
    again = pseudo_inputs(build_experiment(compose("prior=vamp")).model)
    assert torch.equal(inputs, again)
    other = pseudo_inputs(build_experiment(compose("prior=vamp", "seed=1")).model)
    assert not torch.equal(inputs, other)
