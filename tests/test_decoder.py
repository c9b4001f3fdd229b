"""What holds the decoder back: a penalty on its Jacobian, layers of spectral norm 1, and a weight decay of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn.utils.parametrizations import spectral_norm

from vae_cli.axes.sigma import Learned
from vae_cli.config import catalog
from vae_cli.config.build import Experiment, build_experiment, build_model, check_config
from vae_cli.core.errors import UserError
from vae_cli.machine.memory import training_memory
from vae_cli.model.inference import Inference
from vae_cli.model.spectral import SpectralNorm, normalize_layers
from vae_cli.model.vae import VAE
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.run import load_run
from vae_cli.training.step import Step

Compose = Callable[..., dict[str, Any]]
Ask = Callable[..., Any]

NETWORKS = {
    "linear": ["network=linear"],
    "mlp": ["network.hidden=[24,16]", "network.activation=tanh"],
    "conv": ["network=conv", "network.width=4", "network.hidden=16"],
    "group": ["network=conv", "network.width=4", "network.hidden=16", "network.normalization=group"],
    "resnet": ["network=resnet", "network.width=4", "network.max_width=8"],
}
WITH_POSITIONS = {f"{network} with positions": [*NETWORKS[network], "latent=[2,4,4]"] for network in ("conv", "resnet")}
ALL_NETWORKS = NETWORKS | WITH_POSITIONS
CRITIC = ["regularizer.hidden=8", "regularizer.layers=1", "regularizer.betas=null"]
LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def layers_of(network: nn.Module) -> list[Any]:
    return [layer for layer in network.modules() if isinstance(layer, LAYERS)]


def matrix_of(layer: Any) -> Tensor:
    """The weight of a layer as the matrix of its output channels by all the others."""
    weight: Tensor = layer.weight.detach()
    return (weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight).flatten(1)


def trained(experiment: Experiment, steps: int) -> None:
    step = Step(experiment)
    for number in range(steps):
        step(torch.arange(64) + 8 * (number % 64))


# The gradient penalty ------------------------------------------------------------------------------------------------


def jacobians(model: VAE, z: Tensor) -> Tensor:
    """Return d E[x|z] / dz for each code (B, D), as matrices (B, C * H * W, D)."""
    return vmap(jacrev(lambda code: model.decode(code[None]).mean.flatten()))(z)


@pytest.mark.parametrize("likelihood", ["gaussian_fixed", "bernoulli"])
@pytest.mark.parametrize("network", ALL_NETWORKS)
def test_the_penalty_is_the_squared_jacobian_without_bias(compose: Compose, network: str, likelihood: str) -> None:
    words = ["regularizer=gradient_penalty", "regularizer.beta=0", "latent=3", "sigma=deterministic"]
    experiment = build_experiment(compose(*words, f"likelihood={likelihood}", *ALL_NETWORKS[network]))
    x = experiment.splits.train.batch(torch.arange(2)).repeat_interleave(500, 0)
    torch.manual_seed(0)
    for is_training in (True, False):
        experiment.model.train(is_training)
        with torch.set_grad_enabled(is_training):
            inference = experiment.model(x)
            penalty = experiment.regularizer(inference).detach().reshape(2, 500)
        exact = jacobians(experiment.model, inference.z.detach()[::500]).square().sum((1, 2)).detach()
        error = penalty.std(1) / 500**0.5
        assert ((penalty.mean(1) - exact).abs() < 4 * error + 1e-4 * exact).all()
        assert torch.equal(inference.parts["squared_jacobian"], penalty.flatten())


def test_the_penalty_of_a_linear_decoder_is_that_of_its_weights(compose: Compose) -> None:
    words = ["regularizer=gradient_penalty", "regularizer.weight=3", "regularizer.beta=0.5", "network=linear"]
    experiment = build_experiment(compose(*words, "sigma=deterministic", "latent=3", "likelihood=gaussian_fixed"))
    decoder: Any = experiment.model.decoder
    torch.manual_seed(0)
    x = experiment.splits.train.batch(torch.arange(1000)).repeat(20, 1, 1, 1)
    inference = experiment.model(x)
    penalty = experiment.regularizer(inference)
    norm = decoder[0].weight.detach().square().sum()
    found = (penalty - 0.5 * inference.z.square().sum(1) / 2).detach() / 3
    assert abs(float(found.mean() - norm)) < 4 * float(found.std()) / len(x) ** 0.5
    assert float(found.std()) < float(norm)
    (gradient,) = torch.autograd.grad(penalty.mean(), decoder[0].weight)  # of 3 |W|_F^2
    assert float((gradient - 6 * decoder[0].weight).norm() / gradient.norm()) < 0.1


def test_the_penalty_of_several_draws_is_their_mean(compose: Compose) -> None:
    experiment = build_experiment(compose("regularizer=gradient_penalty", "network.hidden=[8]", "latent=2"))
    inference = experiment.model(experiment.splits.train.batch(torch.arange(6)), (50,))
    penalty = experiment.regularizer(inference)
    assert penalty.shape == (6,)
    with torch.no_grad():
        exact = jacobians(experiment.model, inference.z.flatten(0, 1)).square().sum((1, 2)).reshape(50, 6).mean(0)
    torch.testing.assert_close(inference.parts["squared_jacobian"].mean(), exact.mean(), rtol=0.2, atol=0)


@pytest.mark.parametrize("likelihood", catalog.groups()["likelihood"].choices)
@pytest.mark.parametrize("network", ALL_NETWORKS)
def test_the_penalty_reaches_every_weight(compose: Compose, network: str, likelihood: str) -> None:
    words = ["regularizer=gradient_penalty", f"likelihood={likelihood}", "sigma=deterministic"]
    experiment = build_experiment(compose(*words, *ALL_NETWORKS[network]))
    trained(experiment, 2)  # away from weights at which a gradient is 0 by symmetry
    inference = experiment.model(experiment.splits.train.batch(torch.arange(64)))
    experiment.optimizer.zero_grad()
    experiment.regularizer(inference).mean().backward()
    for name, parameter in experiment.model.named_parameters():
        if name.endswith("weight"):  # a bias may move no slope
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


def test_the_penalty_works_through_a_layer_of_onednn(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    from vae_cli.model import kernels

    if not kernels.has_onednn():
        pytest.skip("this torch has no oneDNN")
    found = []
    for is_fast in (True, False):
        monkeypatch.setattr(kernels, "onednn_is_faster", lambda is_fast=is_fast: is_fast)
        monkeypatch.setattr(kernels, "WORTHWHILE", 0)
        experiment = build_experiment(compose("regularizer=gradient_penalty", *NETWORKS["mlp"]))
        torch.manual_seed(0)
        trained(experiment, 3)
        found.append([p.detach().clone() for p in experiment.model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_without_weight_the_gradient_penalty_is_the_energy(compose: Compose) -> None:
    found = []
    for words in (["regularizer=energy"], ["regularizer=gradient_penalty", "regularizer.weight=0"]):
        experiment = build_experiment(compose(*words, "sigma=deterministic", *NETWORKS["mlp"]))
        trained(experiment, 5)
        found.append([p.detach().clone() for p in experiment.model.parameters()])
    torch.testing.assert_close(*found)


def test_an_inference_without_a_model_cannot_be_differentiated() -> None:
    posterior = Learned()(torch.randn(4, 6))
    unused = torch.zeros(4, 1, 1, 1)
    assert Inference(unused, posterior, posterior.rsample(), posterior, posterior).decode is None


# Spectral normalization -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(7, 5), torch.randn(3, 7)),
        (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)),
        (nn.ConvTranspose2d(3, 4, 4, 2, 1), torch.randn(2, 3, 5, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_normalized_layer_is_torchs(layer: nn.Module, x: Tensor) -> None:
    ours, theirs = deepcopy(layer), spectral_norm(deepcopy(layer))
    normalize_layers(ours)
    norms: list[Any] = [one.parametrizations.weight[0] for one in (ours, theirs)]  # type: ignore[union-attr, index]
    for mine, other in zip(("u", "v"), ("_u", "_v"), strict=True):
        getattr(norms[0], mine).copy_(getattr(norms[1], other))
    for is_training in (True, True, False):
        results = []
        for one in (ours.train(is_training), theirs.train(is_training)):
            y = one(x)
            one.zero_grad()
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in one.parameters())])
        results[0].sort(key=lambda tensor: tensor.shape)
        results[1].sort(key=lambda tensor: tensor.shape)
        torch.testing.assert_close(*results)
    torch.testing.assert_close(norms[0].u, norms[1].get_buffer("_u"))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_decoder_layer_has_spectral_norm_1(compose: Compose, network: str) -> None:
    experiment = build_experiment(compose("network.spectral_norm=true", *NETWORKS[network], "likelihood=bernoulli"))
    layers = layers_of(experiment.model.decoder)
    plain = build_experiment(compose(*NETWORKS[network], "likelihood=bernoulli")).model
    originals = [layer.parametrizations.weight.original for layer in layers]
    assert len(layers) == len(layers_of(plain.decoder)) > 0
    for original, layer in zip(originals, layers_of(plain.decoder), strict=True):
        assert torch.equal(original, layer.weight)  # the same initial weights as without it
    assert not any(isinstance(module, SpectralNorm) for module in experiment.model.encoder.modules())
    before = [original.detach().clone() for original in originals]
    trained(experiment, 60)
    assert all(not torch.equal(*pair) for pair in zip(originals, before, strict=True))
    experiment.model.eval()
    for layer in layers:
        assert float(torch.linalg.matrix_norm(matrix_of(layer), 2)) == pytest.approx(1, abs=0.03)


def test_a_normalized_mlp_moves_an_image_no_further_than_its_code(compose: Compose) -> None:
    words = ["network.spectral_norm=true", "network.hidden=[24,16]", "likelihood=gaussian_fixed", "latent=3"]
    experiment = build_experiment(compose(*words, "sigma=deterministic", "regularizer=energy"))
    trained(experiment, 100)
    torch.manual_seed(0)
    a, b = 5 * torch.randn(2, 5000, 3)
    with torch.no_grad():
        experiment.model.eval()
        images, others = experiment.model.decode(a).mean, experiment.model.decode(b).mean
    slope = (images - others).flatten(1).norm(dim=1) / (a - b).norm(dim=1)
    assert 0.1 < float(slope.max()) < 1.03


@pytest.mark.parametrize("network", NETWORKS)
def test_in_evaluation_a_normalized_decoder_stays_as_it_is(compose: Compose, network: str) -> None:
    experiment = build_experiment(compose("network.spectral_norm=true", *NETWORKS[network]))
    trained(experiment, 2)
    model, z = experiment.model.eval(), torch.randn(4, 16)
    before = deepcopy(model.state_dict())
    with torch.no_grad():
        first = model.decode(z).mean
    assert torch.equal(first, model.decode(z).mean)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = build_model(experiment.config, (1, 8, 8)).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(first, again.decode(z).mean)
    model.train()
    model.decode(z)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_normalized_decoder_computes_its_norm_in_float32(compose: Compose) -> None:
    words = ["network.spectral_norm=true", *NETWORKS["mlp"]]
    norms = []
    for precision in ("float32", "bfloat16"):
        model = build_experiment(compose(*words, f"precision={precision}")).model
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            norms.append([layer.weight.detach() for layer in layers_of(model.decoder)])
    assert all(torch.equal(*pair) for pair in zip(*norms, strict=True))


def test_the_memory_of_normalized_weights_does_not_grow_with_the_batch(compose: Compose) -> None:
    estimates = []
    for is_normalized in ("false", "true"):
        model = build_model(compose("network.hidden=[500]", f"network.spectral_norm={is_normalized}"), (1, 8, 8))
        estimates.append([training_memory(model, (1, 8, 8), images) for images in (1, 1001)])
    (least, most), (normalized_least, normalized_most) = estimates
    assert normalized_most - normalized_least == most - least
    weights = 4 * 500 * (64 + 16)
    assert least + weights <= normalized_least <= least + 3 * weights


@pytest.mark.parametrize(
    "words",
    [
        ["network.spectral_norm=true"],
        ["network=conv", "network.width=4", "network.spectral_norm=true", "regularizer=gradient_penalty"],
        ["sigma=deterministic", "regularizer=gradient_penalty"],
        ["optimizer=adamw", "optimizer.decoder_weight_decay=0.1"],
    ],
    ids=" ".join,
)
def test_a_run_is_resumed_bit_for_bit_and_can_be_loaded(
    words: list[str], ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, epochs in (("whole", 3), ("resumed", 1), ("resumed", 3)):
        found = ask("train", *words, "latent=4", f"epochs={epochs}", f"run_name={name}")
        assert found.code == 0, found.err
    whole, resumed = (load_checkpoint(Path(f"runs/{name}/checkpoint.pt")) for name in ("whole", "resumed"))
    assert whole["model"].keys() == resumed["model"].keys()
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())
    run = load_run("runs/whole")
    assert run.decode(torch.zeros(2, 4)).mean.shape == (2, 1, 8, 8)
    assert ask("sample", "runs/whole", "--count", "4").code == 0


# The weight decay of the decoder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", catalog.groups()["optimizer"].choices)
def test_a_weight_decay_of_the_decoder_shrinks_nothing_else(compose: Compose, optimizer: str) -> None:
    words = [f"optimizer={optimizer}", "optimizer.weight_decay=0", "optimizer.decoder_weight_decay=0.1"]
    parts = ["sigma=shared", "prior=scaled_normal", "likelihood.scale=learned", "network.hidden=[8]"]
    experiment = build_experiment(compose(*parts, *words, "optimizer.lr=1e-4", "regularizer=factor", *CRITIC))
    everything = [*experiment.model.named_parameters(), *experiment.regularizer.named_parameters("critic")]
    with torch.no_grad():
        for _, parameter in everything:
            parameter.copy_(parameter.sign() + parameter)  # so large that no step reaches beyond 0
    before = {name: parameter.detach().clone() for name, parameter in everything}
    for _ in range(3):
        for _, parameter in everything:
            parameter.grad = torch.zeros_like(parameter)
        experiment.optimizer.step()
    for name, parameter in everything:
        if name.startswith("decoder."):
            nonzero = before[name] != 0
            assert (parameter.abs() < before[name].abs())[nonzero].all(), name
        else:
            assert torch.equal(parameter, before[name]), name


def test_the_decoder_decays_like_the_encoder_unless_it_has_its_own_decay(compose: Compose) -> None:
    def decays(*words: str) -> set[tuple[str, float]]:
        experiment = build_experiment(compose("optimizer=adamw", *words))
        names = {id(p): name.partition(".")[0] for name, p in experiment.model.named_parameters()}
        groups = experiment.optimizer.inner.param_groups
        return {(names[id(p)], group["weight_decay"]) for group in groups for p in group["params"]}

    assert decays() == {("encoder", 0.01), ("decoder", 0.01)}
    assert decays("optimizer.decoder_weight_decay=0") == {("encoder", 0.01), ("decoder", 0.0)}
    assert decays("optimizer.decoder_weight_decay=0.01") == {("encoder", 0.01), ("decoder", 0.01)}
    assert decays("experiment=rae_l2_loss") == {("encoder", 0.0), ("decoder", 0.01)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.decoder_weight_decay=-1"], r"optimizer\.decoder_weight_decay=-1 is not allowed"),
        (["optimizer.decoder_weight_decay=x"], r"optimizer\.decoder_weight_decay=x is not allowed"),
        (
            ["optimizer._target_=torch.optim.Rprop", "~optimizer.weight_decay", "~optimizer.betas", "~optimizer.eps",
             "~optimizer.fused", "optimizer.decoder_weight_decay=1"],
            r"optimizer\.decoder_weight_decay cannot be used with Rprop",
        ),
        (["network.spectral_norm=1"], r"network\.spectral_norm=1 is not allowed: it must be true or false"),
        (["regularizer=gradient_penalty", "regularizer.weight=-1"], r"regularizer\.weight=-1 is not allowed"),
        (["regularizer=gradient_penalty", "prior=scaled_normal"], "type prior=standard_normal"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(compose: Compose, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(compose(*words))


def test_an_mlp_with_relu_is_at_most_as_steep_as_the_product_of_its_layers(compose: Compose) -> None:
    """The law behind the bound, without spectral normalization."""
    model = build_experiment(compose("network.hidden=[24,16]", "latent=3", "likelihood=gaussian_fixed")).model
    bound = math.prod(float(torch.linalg.matrix_norm(matrix_of(layer), 2)) for layer in layers_of(model.decoder))
    steepest = torch.linalg.matrix_norm(jacobians(model, torch.randn(200, 3)), 2).max()
    assert float(steepest.detach()) <= bound
