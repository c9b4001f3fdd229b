"""Laws that hold for every choice found in configs/: a new choice is tested without a new test."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, Normal, kl_divergence
from torch.func import functional_call, jvp, vmap
from torch.optim import Adam

from vae_cli.axes.dataset import Dataset
from vae_cli.axes.likelihood import Likelihood
from vae_cli.axes.optimizer import ScheduledOptimizer
from vae_cli.axes.prior import GaussianMixture, Prior, ScaledNormal
from vae_cli.axes.schedule import Linear
from vae_cli.axes.sigma import Learned
from vae_cli.config import catalog
from vae_cli.config.build import Experiment, build_experiment, build_model, check_config
from vae_cli.config.instantiate import build
from vae_cli.core.errors import Failure, UserError
from vae_cli.model import distributions, kernels
from vae_cli.model.distributions import BernoulliSurprisal, Delta, FastBernoulli, MixtureDistribution, location
from vae_cli.model.inference import Inference, with_derived
from vae_cli.model.kernels import Dense
from vae_cli.model.normal_kl import NormalKL, normal_kl, normal_kl_parts
from vae_cli.model.scales import Factors, Standard, diagonal_normal
from vae_cli.runs.checkpoint import load_checkpoint, save_checkpoint
from vae_cli.training.validation import evaluate_split

Compose = Callable[..., dict[str, Any]]

GROUPS = catalog.groups()
QUICK = {  # settings that make a choice quick, or possible, in a test
    "sigma": {"power_spherical": ["prior=sphere"]},
    "prior": {
        "vamp": ["prior.components=20"],
        "flow": ["prior.couplings=4", "prior.hidden=16"],
        "sphere": ["sigma=power_spherical"],
    },
    "regularizer": {"factor": ["regularizer.hidden=32"]},
    "dataset": {
        "linear_gaussian": ["likelihood=gaussian", "dataset.images=200", "dataset.test=50", "dataset.validation=50"],
        "shapes": ["dataset.images=200", "dataset.test=50", "dataset.validation=50", "dataset.side=16"],
    },
    "network": {"conv": ["network.width=8"], "resnet": ["network.width=8"]},
}
PRESETS_OF_PLUGINS = {"search"}  # see test_search.py
# Choices that need a download, or images of the user's own.
DOWNLOADED = {"celeba", "cifar10", "emnist", "fashion_mnist", "image_folder", "kmnist", "mnist", "svhn"}
INSTEAD = ["dataset=digits", "dataset.validation=100"]  # of the images of a preset


def choices(*axes: str) -> list[list[str]]:
    """Every choice of each axis, with the defaults on all others, as overrides."""
    found = []
    for axis in axes:
        for choice in GROUPS[axis].choices:
            if not (axis == "dataset" and choice in DOWNLOADED) and choice not in PRESETS_OF_PLUGINS:
                found.append([f"{axis}={choice}", *QUICK.get(axis, {}).get(choice, []), *replaced(axis, choice)])
    return found


def replaced(axis: str, choice: str) -> list[str]:
    """Return overrides that replace the images of a preset, if they must be downloaded."""
    file = GROUPS[axis].choices[choice].file
    assert file is not None
    text = file.read_text()
    if any(f"override /dataset: {name}\n" in text for name in DOWNLOADED):
        return INSTEAD
    parent = re.search(r"^  - (\w+)(?: #.*)?$", text, re.MULTILINE)  # the preset that it starts from
    return replaced(axis, parent[1]) if parent else []


PRIORS = [prior for prior in GROUPS["prior"].choices if prior != "sphere"]  # those with a density in all dimensions
UNDEFINED = {
    *(("deterministic", prior) for prior in GROUPS["prior"].choices if prior != "standard_normal"),
    *(("uniform", "vamp"), ("preserving", "vamp")),
    *((sigma, "sphere") for sigma in GROUPS["sigma"].choices if sigma != "power_spherical"),
    *(("power_spherical", prior) for prior in PRIORS),
}
BOUNDED = {"random", "interpolated"}  # under a normal prior, their rate is an upper bound
AXES = ["dataset", "network", "sigma", "likelihood", "prior", "regularizer", "optimizer", "experiment"]


def prior_of(config: dict[str, Any]) -> Any:
    """Build a prior over three dimensions, whose pseudo-inputs, if it has any, are encoded by their first pixels."""
    law = build(config["prior"], "prior", Prior)
    law.start(lambda x: diagonal_normal(x.flatten(1)[:, :3], torch.full((3,), 0.5)), torch.zeros(1, 2, 2), 1.0)
    return law


def one_step(experiment: Experiment, count: int = 32) -> Inference:
    x = experiment.splits.train.batch(torch.arange(min(count, len(experiment.splits.train))))
    inference: Inference = experiment.model(x)
    loss = (inference.distortion + experiment.regularizer(inference)).mean()
    loss.backward()
    return inference


@pytest.mark.parametrize("overrides", choices(*AXES), ids=" ".join)
def test_every_parameter_gets_a_finite_gradient_and_changes(compose: Compose, overrides: list[str]) -> None:
    experiment = build_experiment(compose(*overrides))
    before = copy.deepcopy(experiment.model.state_dict())
    inference = one_step(experiment)
    for name, parameter in experiment.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert inference.distortion.shape == inference.kl.shape == (32,)
    assert inference.distortion.isfinite().all()
    experiment.optimizer.step()
    moved = [n for n, p in experiment.model.named_parameters() if not torch.equal(p, before[n])]
    assert {name.partition(".")[0] for name in moved} >= {"encoder", "decoder"}


@pytest.mark.parametrize("overrides", choices("sigma", "likelihood", "prior", "network"), ids=" ".join)
def test_gradients_are_not_zero_everywhere(compose: Compose, overrides: list[str]) -> None:
    """After one update: a layer that starts at 0, as in prior=flow, at first passes no gradient to those before it."""
    experiment = build_experiment(compose(*overrides))
    one_step(experiment, 200)
    experiment.optimizer.step()
    experiment.optimizer.zero_grad()
    one_step(experiment, 200)
    for name, parameter in experiment.model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("overrides", choices(*AXES), ids=" ".join)
def test_state_survives_saving_and_loading(compose: Compose, overrides: list[str], tmp_path: Any) -> None:
    experiment = build_experiment(compose(*overrides))
    one_step(experiment)
    experiment.optimizer.step()
    file = tmp_path / "checkpoint.pt"
    shape = tuple(experiment.splits.train.images.shape[1:])
    save_checkpoint(file, {"step": 1, "shape": list(shape), "model": experiment.model.state_dict()})
    again = build_model(experiment.config, shape)  # type: ignore[arg-type]
    again.load_state_dict(load_checkpoint(file)["model"])
    x = experiment.splits.test.batch(torch.arange(8))
    experiment.model.eval()
    again.eval()
    torch.manual_seed(0)
    first = experiment.model(x)
    torch.manual_seed(0)
    second = again(x)
    assert torch.equal(first.distortion, second.distortion)
    assert torch.equal(first.kl, second.kl)


def noisy_posteriors() -> list[tuple[str, str]]:
    return [(s, p) for s, p in itertools.product(GROUPS["sigma"].choices, GROUPS["prior"].choices)]


@pytest.mark.parametrize(("sigma", "prior"), noisy_posteriors())
def test_kl_equals_monte_carlo(compose: Compose, sigma: str, prior: str) -> None:
    quick = [] if prior == "sphere" else QUICK["prior"].get(prior, [])
    config = compose(f"sigma={sigma}", f"prior={prior}", *quick, "latent=3")
    if (sigma, prior) in UNDEFINED:
        with pytest.raises(UserError, match=f"prior={prior} .*sigma={sigma}|sigma={sigma} .*prior={prior}"):
            check_config(config)
        return
    torch.manual_seed(1)
    family: Any = build(config["sigma"], "sigma", nn.Module)
    law = prior_of(config)
    for parameter in [*family.parameters(), *law.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    posterior = family(torch.randn(5, 3 * family.raw_size) * 0.5)
    z = posterior.rsample((200_000,))
    unused = torch.zeros(5, 1, 1, 1)
    inference = Inference(unused, posterior, z, law(), Independent(Normal(unused, 1.0), 3))
    if inference.rate is None:
        # A point mass has no density, so no rate; the energy -log p(loc) is used instead.
        torch.testing.assert_close(inference.kl, -law().log_prob(location(posterior)))
        assert inference.elbo is None
        assert set(inference.terms(unused[:, 0, 0, 0])) == {"loss", "distortion", "penalty"}
        return
    sampled = posterior.log_prob(z) - law().log_prob(z)
    error = sampled.std(0) / len(z) ** 0.5
    if sigma in BOUNDED and prior in ("standard_normal", "scaled_normal"):
        assert (inference.rate > sampled.mean(0) + 5 * error).all()
        return
    assert ((inference.rate - sampled.mean(0)).abs() < 5 * error + 1e-5).all()
    parts = inference.normal_kl_parts
    if parts is not None:
        torch.testing.assert_close(inference.rate, kl_divergence(posterior, law()))
        torch.testing.assert_close((parts[0] + parts[1]).sum(-1), inference.rate)
    means = with_derived({name: float(term.mean()) for name, term in inference.terms(inference.kl).items()})
    assert means["elbo"] == pytest.approx(float(inference.elbo.mean()))
    assert ("rate_scale" in means) == (parts is not None)
    if parts is not None:
        assert means["rate_loc"] == pytest.approx(float(parts[0].sum(-1).mean()))
        assert means["rate_scale"] == pytest.approx(float(parts[1].sum(-1).mean()), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("prior", PRIORS)
def test_the_density_of_a_prior_is_that_of_its_draws(compose: Compose, prior: str) -> None:
    """It integrates to 1, by importance sampling from a wide normal, and gives the mean and variance of the draws."""
    torch.manual_seed(0)
    law = prior_of(compose(f"prior={prior}", *QUICK["prior"].get(prior, []), "latent=3"))
    for parameter in law.parameters():
        nn.init.normal_(parameter, std=0.03)
    with torch.no_grad():
        wide = Independent(Normal(torch.zeros(3), 3 * torch.ones(3)), 1)
        z = wide.sample((400_000,))
        weight = (law().log_prob(z) - wide.log_prob(z)).exp()[:, None]
        drawn = law().sample((100_000,))
    for moment, others in ((torch.ones_like(z), torch.ones_like(drawn)), (z, drawn), (z.square(), drawn.square())):
        error = ((weight * moment).var(0) / len(z) + others.var(0) / len(drawn)).sqrt()
        assert (((weight * moment).mean(0) - others.mean(0)).abs() < 5 * error + 1e-4).all()
    assert ((law().mean - drawn.mean(0)).abs() < 0.03).all()
    assert ((law().stddev - drawn.std(0)).abs() < 0.03).all()


def test_a_mixture_of_one_normal_is_that_normal() -> None:
    one, normal = GaussianMixture(3, components=1), ScaledNormal(3)
    z = 2 * torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one().log_prob(z), normal().log_prob(z))  # both start as N(0, I)
    with torch.no_grad():
        one.loc.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        one.scale.raw.copy_(torch.tensor([[0.1, -0.1, 0.02]]))
        normal.loc.copy_(one.loc[0])
        normal.scale.raw.copy_(one.scale.raw[0])
    torch.testing.assert_close(one().log_prob(z), normal().log_prob(z))


def test_an_estimated_rate_has_the_gradient_of_the_closed_form() -> None:
    torch.manual_seed(0)
    laws: list[Prior] = [GaussianMixture(2, components=1), ScaledNormal(2)]
    gradients = []
    for law in laws:
        torch.manual_seed(1)
        raw = torch.tensor([[0.8, -0.3, -0.5, 0.2]], requires_grad=True)
        posterior = Learned()(raw)
        unused = torch.zeros(1, 1, 1, 1)
        z = posterior.rsample((400_000,))
        inference = Inference(unused, posterior, z, law(), Independent(Normal(unused, 1.0), 3))
        inference.kl.sum().backward()
        scales: Any = law.scale
        gradients.append(torch.cat([raw.grad.flatten(), law.loc.grad.flatten(), scales.raw.grad.flatten()]))  # type: ignore[union-attr, operator]
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02)


def test_a_mixture_starts_about_as_wide_as_the_standard_normal() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        start = GaussianMixture(20, components=50)()
        variance, mean = start.variance, start.mean
    assert float(variance.mean()) == pytest.approx(1, abs=0.1)
    assert float(mean.square().mean()) < 0.05


def test_a_mixture_does_not_need_memory_for_all_codes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mixture = GaussianMixture(3, components=4)
    z = torch.randn(2, 5, 3)
    whole = mixture().log_prob(z)
    monkeypatch.setattr(distributions, "NUMBERS_AT_ONCE", 3 * 3 * 4)
    torch.testing.assert_close(mixture().log_prob(z), whole)


@pytest.mark.parametrize("scale", [1e-4, 0.1, 1.0, 30.0])
def test_the_density_of_a_mixture_is_torchs(scale: float) -> None:
    """Its matrix products must not lose the small distances from a narrow component."""
    generator = torch.Generator().manual_seed(0)
    loc, noise = torch.randn(50, 6, generator=generator), torch.randn(50, 6, generator=generator)
    logits, width = torch.randn(50, generator=generator), scale * torch.rand(50, 1, generator=generator).add(0.5)
    given, results = (loc, width, logits, loc + scale * noise), []
    for dtype in (torch.float32, torch.float64):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in given]
        components = diagonal_normal(leaves[0], leaves[1])
        kind = MixtureDistribution if dtype == torch.float32 else MixtureSameFamily
        density = kind(Categorical(logits=leaves[2]), components).log_prob(leaves[3])
        density.sum().backward()
        results.append([density.detach().double(), *(leaf.grad.double() for leaf in leaves)])  # type: ignore[union-attr]
    for found, exact in zip(*results, strict=True):
        # The distances that decide are given in float32, too: relative to the scale, their rounding grows as 1 / scale.
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("choice", GROUPS["likelihood"].choices)
def test_density_integrates_to_one_and_mean_is_its_mean(compose: Compose, choice: str) -> None:
    family: Any = build(compose(f"likelihood={choice}")["likelihood"], "likelihood", Likelihood)
    torch.manual_seed(0)
    raw = torch.randn(7, family.raw_size, 1, 1) * 2
    if choice == "continuous_bernoulli":
        raw.flatten()[:] = torch.tensor([-60.0, -17.0, -1.0, 1e-3, 0.04, 0.06, 30.0])
    likelihood = family(raw)
    assert likelihood.batch_shape == (7,)
    assert likelihood.event_shape == (1, 1, 1)
    support = likelihood.base_dist.support
    if support.is_discrete:
        x = likelihood.base_dist.enumerate_support(expand=False).reshape(-1, 1, 1, 1, 1)
        weight = torch.ones(len(x))
    else:
        low, high = (0.0, 1.0) if hasattr(support, "lower_bound") else (-80.0, 80.0)
        edges = torch.linspace(low, high, 400_001, dtype=torch.float64)
        x = ((edges[1:] + edges[:-1]) / 2).float().reshape(-1, 1, 1, 1, 1)
        weight = (edges[1:] - edges[:-1]).float()
    density = likelihood.log_prob(x.expand(-1, 7, -1, -1, -1)).exp() * weight[:, None]
    torch.testing.assert_close(density.double().sum(0), torch.ones(7, dtype=torch.float64), rtol=2e-3, atol=0)
    mean = (density.double() * x.reshape(-1, 1)).sum(0)
    torch.testing.assert_close(likelihood.mean.flatten().double(), mean, rtol=5e-3, atol=2e-3)
    drawn = likelihood.sample((100_000,))
    error = 6 * drawn.std(0) / len(drawn) ** 0.5 + 1e-3
    assert ((drawn.mean(0) - likelihood.mean).abs() < error).all()


@pytest.mark.parametrize("overrides", choices("optimizer"), ids=" ".join)
def test_weight_decay_leaves_scales_and_priors_alone(compose: Compose, overrides: list[str]) -> None:
    """It would pull sigma, the prior's scale and the likelihood's towards 1."""
    parts = ["sigma=shared", "prior=scaled_normal", "likelihood=gaussian", "likelihood.scale=learned"]
    experiment = build_experiment(compose(*parts, *overrides, "optimizer.weight_decay=0.1"))
    model = experiment.model
    lone = {id(p) for part in (model.sigma, model.prior, model.likelihood) for p in part.parameters()}
    decays = {
        id(p): group["weight_decay"] for group in experiment.optimizer.inner.param_groups for p in group["params"]
    }
    assert len(lone) >= 3
    assert decays.keys() == {id(p) for p in model.parameters()}
    assert {decay for key, decay in decays.items() if key in lone} == {0.0}
    assert {decay for key, decay in decays.items() if key not in lone} == {0.1}


@pytest.mark.parametrize("overrides", choices("likelihood"), ids=" ".join)
def test_an_untrained_decoder_outputs_about_the_mean_image(compose: Compose, overrides: list[str]) -> None:
    experiment = build_experiment(compose(*overrides, "network=linear"))
    with torch.no_grad():
        drawn = experiment.model.decode(torch.zeros(1, experiment.config["latent"])).mean[0]
    mean = experiment.splits.train.mean()
    grey = (mean > 0.2) & (mean < 0.8)  # the mean of a density on [0, 1] is never at an edge
    torch.testing.assert_close(drawn[grey], mean[grey], rtol=0, atol=0.05)


@pytest.mark.parametrize("overrides", choices("network"), ids=" ".join)
def test_the_output_bias_is_at_the_logit_of_the_mean(compose: Compose, overrides: list[str]) -> None:
    experiment = build_experiment(compose(*overrides, "likelihood=bernoulli"))
    layers: Any = experiment.model.decoder
    bias = next(layer.bias for layer in reversed(list(layers)) if getattr(layer, "bias", None) is not None)
    mean = experiment.splits.train.mean()
    expected = mean.clamp(1e-3, 1 - 1e-3).flatten() if bias.numel() == mean.numel() else mean.mean((1, 2))
    torch.testing.assert_close(bias.detach().sigmoid(), expected)
    zero: Any = build_experiment(compose(*overrides, "network.output_bias=zero")).model.decoder
    bias = next(layer.bias for layer in reversed(list(zero)) if getattr(layer, "bias", None) is not None)
    assert (bias == 0).all()


@pytest.mark.parametrize(("prior", "regularizer"), list(itertools.product(PRIORS, GROUPS["regularizer"].choices)))
def test_the_parameters_of_a_prior_are_learned_or_it_is_refused(compose: Compose, prior: str, regularizer: str) -> None:
    config = compose(f"prior={prior}", f"regularizer={regularizer}")
    try:
        check_config(config)
    except UserError:
        return
    experiment = build_experiment(config)
    one_step(experiment)
    assert all(p.grad is not None for p in experiment.model.prior.parameters())


def test_active_units_do_not_depend_on_the_scale_of_the_code(compose: Compose) -> None:
    experiment = build_experiment(compose("network=linear", "sigma=fixed", "latent=3"))
    x = experiment.splits.train.batch(torch.arange(400))
    directions = torch.linalg.svd(x.flatten(1) - x.flatten(1).mean(0), full_matrices=False).Vh
    for size, value in ((1.0, 1.0), (1e-3, 1e-3), (50.0, 50.0)):
        encoder: Any = experiment.model.encoder
        with torch.no_grad():
            encoder[1].weight.copy_(torch.stack([directions[0], 0.3 * directions[1], 0 * directions[2]]) * size)
        sigma: Any = experiment.model.sigma
        sigma.value.value.fill_(value)
        measured = evaluate_split(
            experiment.model, experiment.regularizer, experiment.splits.train, 0, experiment.device
        )
        assert measured["active_units"] == 2


def test_fixed_and_deterministic_differ_only_by_epsilon(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for sigma in ("fixed", "deterministic"):
        experiment = build_experiment(compose(f"sigma={sigma}"))
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "normal_", torch.Tensor.zero_)
            one_step(experiment)
        gradients.append([p.grad for p in experiment.model.parameters()])
    for fixed, deterministic in zip(*gradients, strict=True):
        assert fixed is not None
        assert deterministic is not None
        assert torch.equal(fixed, deterministic)


@pytest.mark.parametrize("initialization", ["default", "glorot"])
def test_all_sigma_modes_start_with_the_same_locations_and_decoder(compose: Compose, initialization: str) -> None:
    start = f"network.initialization={initialization}"
    quick = QUICK["sigma"]
    models = {s: build_experiment(compose(f"sigma={s}", *quick.get(s, []), start)) for s in GROUPS["sigma"].choices}
    x = models["learned"].splits.train.batch(torch.arange(10))
    for name, experiment in models.items():
        with torch.no_grad():
            outputs = experiment.model.encoder(x)[:, :16]
            torch.testing.assert_close(outputs, models["learned"].model.encode(x).mean)
            if name not in ("preserving", "power_spherical"):  # which standardize loc, or set its length to 1
                torch.testing.assert_close(location(experiment.model.encode(x)), outputs)
            z = torch.ones(2, 16)
            assert torch.equal(experiment.model.decode(z).mean, models["learned"].model.decode(z).mean)


@pytest.mark.parametrize("network", GROUPS["network"].choices)
def test_glorot_draws_uniform_weights_of_the_stated_size_and_no_biases(compose: Compose, network: str) -> None:
    words = [f"network={network}", "likelihood=bernoulli"]
    model = build_experiment(compose(*words, "network.initialization=glorot")).model
    before = build_experiment(compose(*words)).model
    layers = [
        [m for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
        for part in (model.encoder, model.decoder)
    ]
    for layer in (*layers[0], *layers[1]):
        inputs, outputs = layer.weight[0].numel(), layer.weight.transpose(0, 1)[0].numel()
        if layer is layers[0][-1]:
            outputs //= 2  # loc and scale count as two layers
        bound = math.sqrt(6 / (inputs + outputs))
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert layer.bias is not None
        if layer is not layers[1][-1]:
            assert (layer.bias == 0).all()
    torch.testing.assert_close(list(model.decoder.parameters())[-1], list(before.decoder.parameters())[-1])


def test_noise_of_each_mode(compose: Compose) -> None:
    x = build(compose()["dataset"], "dataset", Dataset).load().train.batch(torch.arange(50))
    for sigma in GROUPS["sigma"].choices:
        model = build_experiment(compose(f"sigma={sigma}", *QUICK["sigma"].get(sigma, []))).model
        for training in (True, False):  # what is random is random in evaluation too
            model.train(training)
            assert (model(x, (2,)).z.std(0) > 0).all() or sigma == "deterministic"
            spread = model.encode(x).rsample((5000,)).std(0).mean().detach()
            expected = 0.0 if isinstance(model.encode(x), Delta) else float(model.encode(x).stddev.mean().detach())
            assert abs(float(spread) - expected) < 0.02 * max(expected, 0.01)


@pytest.mark.parametrize("overrides", choices("sigma", "likelihood", "regularizer", "network"), ids=" ".join)
def test_one_seed_gives_the_same_bits(compose: Compose, overrides: list[str]) -> None:
    results = []
    for _ in range(2):
        experiment = build_experiment(compose(*overrides))
        torch.manual_seed(3)
        for _ in range(3):
            experiment.optimizer.zero_grad()
            one_step(experiment)
            experiment.optimizer.step()
        results.append([p.detach().clone() for p in experiment.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("overrides", choices("sigma", "likelihood"), ids=" ".join)
def test_evaluation_is_repeatable_and_changes_nothing(compose: Compose, overrides: list[str]) -> None:
    experiment = build_experiment(compose(*overrides))
    state, rng = copy.deepcopy(experiment.model.state_dict()), torch.get_rng_state()
    arguments = (experiment.model, experiment.regularizer, experiment.splits.validation, 0, experiment.device)
    first, second = evaluate_split(*arguments), evaluate_split(*arguments, batch_size=37)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(state[name], value) for name, value in experiment.model.state_dict().items())
    assert first == evaluate_split(*arguments)
    assert experiment.model.training
    assert first.keys() == second.keys()
    assert abs(first["distortion"] - second["distortion"]) < 0.05 * abs(first["distortion"]) + 0.5


def test_several_draws_of_one_code_share_a_posterior(compose: Compose) -> None:
    experiment = build_experiment(compose("network=conv", "network.width=8"))
    x = experiment.splits.train.batch(torch.arange(6))
    inference = experiment.model(x, (4,))
    assert inference.z.shape == (4, 6, 16)
    assert inference.likelihood.batch_shape == (4, 6)
    assert inference.distortion.shape == (6,)
    one = experiment.model.decode(inference.z[2]).log_prob(inference.x)
    torch.testing.assert_close(inference.likelihood.log_prob(inference.x)[2], one)


@pytest.mark.parametrize("choice", sorted(DOWNLOADED - {"image_folder"}))
def test_every_downloaded_dataset_can_be_configured(compose: Compose, choice: str, tmp_path: Any) -> None:
    config = compose(f"dataset={choice}", f"data_dir={tmp_path}")
    check_config(config)


def test_point_mass() -> None:
    loc = torch.randn(4, 3, requires_grad=True)
    point = Delta(loc)
    state = torch.get_rng_state()
    assert torch.equal(point.rsample(), loc)
    assert torch.equal(torch.get_rng_state(), state)  # no random number was drawn
    assert point.rsample((5,)).shape == (5, 4, 3)
    assert point.batch_shape == (4,)
    assert point.event_shape == (3,)
    assert torch.equal(point.log_prob(loc), torch.zeros(4))
    assert torch.equal(point.log_prob(loc + 1), torch.full((4,), -torch.inf))
    assert torch.equal(point.variance, torch.zeros(4, 3))
    assert point.expand((2, 4)).rsample().shape == (2, 4, 3)
    prior = Independent(Normal(torch.zeros(3), torch.ones(3)), 1)
    energy = kl_divergence(point, prior)
    torch.testing.assert_close(energy, loc.square().sum(-1) / 2 + 1.5 * torch.log(torch.tensor(2 * torch.pi)))
    energy.sum().backward()
    assert torch.equal(loc.grad, loc.detach())


def test_a_failed_download_is_a_failure(compose: Compose, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(Failure, match="dataset=digits"):
        build_experiment(compose("dataset=mnist", f"data_dir={tmp_path}"))


@pytest.mark.parametrize("scale_shape", [(5, 3), (3,), ()])
def test_factors_are_torchs_normal_to_the_last_bit(scale_shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(5, 3, generator=generator)
    scale = torch.rand(scale_shape, generator=generator) + 0.1
    ours, theirs = Factors(loc, scale), Normal(loc, scale)
    value = torch.randn(5, 3, generator=generator)
    assert torch.equal(ours.log_prob(value), theirs.log_prob(value))
    assert torch.equal(ours.stddev, theirs.stddev)
    for shape in ((), (4,), (2, 3)):
        draws = []
        for distribution in (ours, theirs):
            torch.manual_seed(1)
            draws.append(distribution.rsample(torch.Size(shape)))
        assert torch.equal(*draws)
    assert torch.equal(ours.expand((2, 5, 3)).mean, theirs.expand((2, 5, 3)).mean)
    assert torch.equal(kl_divergence(ours, theirs), torch.zeros(5, 3))


def test_the_standard_normal_is_torchs() -> None:
    zero, one, value = torch.zeros(3), torch.ones(3), torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = Standard(zero, one), Independent(Normal(zero, one), 1)
    found = []
    for distribution in (ours, theirs):
        leaf = value.clone().requires_grad_()
        log_prob = distribution.log_prob(leaf)
        (log_prob.sum() * 3).backward()
        found.append((log_prob.detach(), leaf.grad))
    torch.testing.assert_close(*found)
    assert torch.equal(ours.surprisal(value), -ours.log_prob(value))
    torch.testing.assert_close(ours.expand((2, 7)).log_prob(value), theirs.expand((2, 7)).log_prob(value))
    assert torch.equal(kl_divergence(ours, theirs), torch.tensor(0.0))


@pytest.mark.parametrize("side", [4, 60, 160])  # few pixels, many, and rows too long for one product
def test_the_fast_bernoulli_is_torchs(side: int) -> None:
    logits = torch.randn(2, 5, 1, side, side, generator=torch.Generator().manual_seed(0))
    logits[0, 0] = 0  # the smallest product of the larger probabilities
    value = torch.rand(5, 1, side, side, generator=torch.Generator().manual_seed(1))
    theirs = Independent(Bernoulli(logits=logits, validate_args=False), 3, validate_args=False)
    torch.testing.assert_close(FastBernoulli(logits).log_prob(value), theirs.log_prob(value))
    assert torch.equal(FastBernoulli(logits).mean, theirs.mean)
    several = value.expand(3, 2, -1, -1, -1, -1)
    torch.testing.assert_close(FastBernoulli(logits).log_prob(several), theirs.log_prob(several))


def test_the_gradients_of_a_bernoulli_are_those_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (6 * torch.randn(2, 1, 2, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    value = torch.rand(2, 1, 2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    function = BernoulliSurprisal.apply
    assert torch.autograd.gradcheck(function, (logits, value), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (logits, value))


@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (1, 3), (3,), (1,), ()])
def test_the_gradients_of_a_normal_kl_are_those_of_its_formula(shape: tuple[int, ...]) -> None:
    """For a scale of each code, of each image, of each dimension, or of all."""
    generator = torch.Generator().manual_seed(0)
    distance = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    log_ratio = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    kl, of_locations = normal_kl(distance, log_ratio)
    parts = normal_kl_parts(distance, log_ratio)
    torch.testing.assert_close(kl, (parts[0] + parts[1]).sum(-1))
    torch.testing.assert_close(of_locations, parts[0].sum(-1).detach())
    assert not of_locations.requires_grad
    ratio = (2 * log_ratio).exp()
    exact = (distance.square() / 2).sum(-1) + ((ratio - 1 - ratio.log()) / 2).expand(4, 3).sum(-1)
    torch.testing.assert_close(kl, exact)
    first = torch.autograd.grad(kl.sum(), (distance, log_ratio), create_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(exact.sum(), (distance, log_ratio)))

    def function(*given: torch.Tensor) -> torch.Tensor:
        return normal_kl(*given)[0]

    # In gradcheck's forward mode no scale has a gradient, so `normal_kl` does not use NormalKL.
    for check in (function, lambda *given: NormalKL.apply(*given)[0]):
        assert torch.autograd.gradcheck(check, (distance, log_ratio), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(check, (distance, log_ratio))
    along = torch.func.jvp(function, (distance.detach(), log_ratio.detach()), (distance.detach(), ratio.detach()))[1]
    torch.testing.assert_close(along, (first[0] * distance + (ratio - 1) * ratio).sum(-1))


@pytest.mark.parametrize("size", [1e-6, 1.0, 10.0, 1e2, 1e4])
def test_a_bernoulli_is_exact_for_logits_of_any_size(size: float) -> None:
    logits = size * torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for value in (torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)), (logits > 0).float()):
        exact = F.binary_cross_entropy_with_logits(logits.double(), value.double(), reduction="none").sum((1, 2, 3))
        torch.testing.assert_close(-FastBernoulli(logits).log_prob(value).double(), exact, rtol=3e-7, atol=784 * 6e-8)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Dense, nn.Linear]]:
    """Make a layer that uses oneDNN on any processor, and torch's Linear with the same parameters."""
    if not kernels.has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(kernels, "WORTHWHILE", 0)

    def pair(inputs: int, outputs: int, bias: bool = True) -> tuple[Dense, nn.Linear]:
        ours, theirs = Dense(inputs, outputs, bias), nn.Linear(inputs, outputs, bias)
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs

    return pair


@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(1, 1, 1), (3, 784, 5), (128, 20, 400), (7, 33, 65)])
def test_a_dense_layer_is_torchs_linear(onednn: Any, batch: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    ours, theirs = onednn(inputs, outputs)
    x, gradient = torch.randn(batch, inputs), torch.randn(batch, outputs)
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(gradient)
        results.append([y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad])
    assert "OneDNNLinear" in str(ours(x).grad_fn)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_dense_layer_has_every_kind_of_derivative(onednn: Any) -> None:
    torch.manual_seed(0)
    x, direction = torch.randn(6, 30), torch.randn(6, 30)
    results = []
    for layer in onednn(30, 20):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(leaf).tanh().sum(), leaf, create_graph=True)
        slope.square().sum().backward()  # as for a gradient penalty
        found = [layer.weight.grad, leaf.grad, jvp(layer, (x,), (direction,))[1], vmap(layer)(x.expand(2, -1, -1))]
        with forward_ad.dual_level():
            weight, bias = layer.weight.detach(), layer.bias.detach()
            along = {"weight": (weight, weight.square()), "bias": (bias, bias.square())}
            duals = {name: forward_ad.make_dual(*pair) for name, pair in along.items()}
            for given in ({}, {"bias": duals["bias"]}, {"weight": duals["weight"]}, duals):
                y = functional_call(layer, given, forward_ad.make_dual(x, direction) if len(given) != 1 else x)
                found.append(forward_ad.unpack_dual(y).tangent)
        results.append(found)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_dense_layer_may_have_no_bias(onednn: Any) -> None:
    x = torch.randn(6, 30)
    results = []
    for layer in onednn(30, 20, bias=False):
        y = layer(x)
        y.square().sum().backward()
        results.append([y.detach(), layer.weight.grad])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_dense_layer_uses_torch_for_other_inputs(onednn: Any) -> None:
    layer, theirs = onednn(30, 20)
    x = torch.randn(6, 30)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), theirs(x))
    for other in (x[0], x.expand(2, -1, -1), x.double()):
        assert "OneDNNLinear" not in str(layer.to(other.dtype)(other).grad_fn)
    assert layer.to("meta")(x.to("meta")).shape == (6, 20)


def test_a_slow_mkl_is_found_while_tensors_are_made_on_meta() -> None:
    expected = kernels.onednn_is_faster.__wrapped__()
    with torch.device("meta"):
        assert kernels.onednn_is_faster.__wrapped__() == expected


ADAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "betas": [0.5, 0.9], "eps": 1e-3},
    "up": {"maximize": True},
    "amsgrad": {"amsgrad": True},
    "several kernels": {"fused": False},
    "schedule": {"lr": Linear(1e-3, 1e-1, 6)},
}


@pytest.mark.parametrize("arguments", ADAMS.values(), ids=ADAMS)
@pytest.mark.parametrize("idle", [(), (0,), (3,), range(9)], ids=["all learn", "late", "a pause", "never"])
def test_a_step_of_adam_is_torchs_to_the_last_bit(arguments: dict[str, Any], idle: Sequence[int]) -> None:
    """One parameter has no gradient in the idle steps; the optimizer is saved and loaded in between."""
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(2))] for _ in range(2))
    arguments = {"lr": 1e-2, "fused": True, **arguments}
    scheduled = ScheduledOptimizer(Adam, ours, arguments)
    plain = Adam(theirs, **{**arguments, "lr": 1e-2})
    for step in range(9):
        if step == 5:
            scheduled.load_state_dict(copy.deepcopy(scheduled.state_dict()))
        if step == 7:
            state = copy.deepcopy(scheduled.state_dict())
            scheduled = ScheduledOptimizer(Adam, ours, arguments)
            scheduled.load_state_dict(state)
        scheduled.advance(step)
        for group in plain.param_groups:
            group["lr"] = scheduled.rate
        for pair in zip(ours, theirs, strict=True):
            gradient = torch.randn_like(pair[0])
            for parameter in pair:
                parameter.grad = None if parameter.dim() == 1 and step in idle else gradient
        scheduled.step()
        plain.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(scheduled.state_dict()["state"], plain.state_dict()["state"], rtol=0, atol=0)
