"""FactorVAE: what its critic learns, and how critic and model take their steps apart from each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal
from torch.optim import Adam

from vae_cli.config.build import Experiment, build_experiment, check_config
from vae_cli.core.errors import UserError
from vae_cli.model.critic import Critic, shuffled
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.folder import RunDir
from vae_cli.training.cards import tag_of
from vae_cli.training.step import Step
from vae_cli.training.validation import validate

Compose = Callable[..., dict[str, Any]]
Ask = Callable[..., Any]

SMALL = ["regularizer=factor", "regularizer.layers=2", "regularizer.hidden=32", "network.hidden=[32]", "latent=4"]


def critic_of(experiment: Experiment) -> Critic:
    found: Any = experiment.regularizer
    return found.critic  # type: ignore[no-any-return]


def disturb(critic: Critic) -> None:
    """Move a critic's weights: the last layer of an untrained critic is 0, so it knows nothing of the codes."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        for parameter in critic.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)


@pytest.mark.slow
def test_a_trained_critic_knows_the_density_ratio_and_the_total_correlation() -> None:
    torch.manual_seed(0)
    correlation = torch.tensor([[1, 0.6, 0.2], [0.6, 1, 0.4], [0.2, 0.4, 1]])
    joint, marginal = MultivariateNormal(torch.zeros(3), correlation), Normal(0.0, 1.0)
    critic, steps = Critic(3, layers=2, hidden=64), 1000
    optimizer = Adam(critic.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        critic.loss(joint.sample((512,))).mean().backward()
        optimizer.step()
    z = joint.sample((20_000,))
    with torch.no_grad():
        exact, found = joint.log_prob(z) - marginal.log_prob(z).sum(-1), critic(z)
        loss = critic.loss(z).mean()
    total_correlation = -0.5 * float(torch.logdet(correlation))
    assert float(exact.mean()) == pytest.approx(total_correlation, abs=0.02)
    assert float(found.mean()) == pytest.approx(total_correlation, abs=0.04)  # 0.31
    assert float((found - exact).square().mean().sqrt()) < 0.25 * float(exact.std())
    other = marginal.sample((20_000, 3))
    ratio = joint.log_prob(other) - marginal.log_prob(other).sum(-1)
    least = (torch.nn.functional.softplus(-exact).mean() + torch.nn.functional.softplus(ratio).mean()) / 2
    assert float(loss) == pytest.approx(float(least), abs=0.01)  # the cross-entropy at the exact log ratio


def test_an_untrained_critic_cannot_tell_codes_apart() -> None:
    critic, z = Critic(3, layers=6, hidden=20), torch.randn(5, 3)
    assert torch.equal(critic(z), torch.zeros(5))
    torch.testing.assert_close(critic.loss(z), torch.full((5,), math.log(2)))


def test_shuffled_codes_keep_each_dimension_and_lose_what_joins_them() -> None:
    torch.manual_seed(0)
    z = torch.randn(2000, 1, requires_grad=True) + 0.1 * torch.randn(2000, 3)
    found = shuffled(z)
    assert not found.requires_grad
    assert torch.equal(found.sort(0).values, z.detach().sort(0).values)
    assert float(torch.corrcoef(z.detach().T)[0, 1:].min()) > 0.9
    assert float((torch.corrcoef(found.T) - torch.eye(3)).abs().max()) < 0.1
    assert (found != z).any(1).float().mean() > 0.99
    several = torch.randn(4, 7, 3)  # draws of the codes of 7 images
    assert torch.equal(shuffled(several).sort(1).values, several.sort(1).values)


def test_every_order_of_a_dimension_is_equally_likely() -> None:
    torch.manual_seed(0)
    z = torch.arange(3.0)[:, None].expand(3, 20_000)
    places = (shuffled(z) * torch.tensor([9.0, 3.0, 1.0])[:, None]).sum(0)
    counts = torch.unique(places, return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts / 20_000 - 1 / 6).abs() < 0.02).all()


@pytest.mark.parametrize("draws", [(), (3,)])
def test_the_penalty_moves_only_the_model_and_the_cross_entropy_only_the_critic(
    compose: Compose, draws: tuple[int, ...]
) -> None:
    experiment = build_experiment(compose(*SMALL, "regularizer.beta=0.7", "regularizer.gamma=3"))
    model, critic = experiment.model, critic_of(experiment)
    disturb(critic)
    torch.manual_seed(1)
    inference = model(experiment.splits.train.batch(torch.arange(50)), draws)
    state = torch.get_rng_state()
    penalty = experiment.regularizer(inference)
    assert penalty.shape == (50,)
    everything = [*model.parameters(), *critic.parameters()]
    found = torch.autograd.grad(penalty.mean(), everything, retain_graph=True, allow_unused=True)

    torch.set_rng_state(state)
    for parameter in critic.parameters():
        parameter.requires_grad_(False)
    total_correlation = critic(inference.z).reshape(-1, 50).mean(0)
    alone = 0.7 * inference.kl + 3 * total_correlation
    of_model = torch.autograd.grad(alone.mean(), list(model.parameters()), retain_graph=True, allow_unused=True)
    for parameter in critic.parameters():
        parameter.requires_grad_(True)
    of_critic = torch.autograd.grad(critic.loss(inference.z).mean(), list(critic.parameters()))

    assert torch.equal(penalty, alone)  # the cross-entropy has a gradient, but is not part of the penalty
    assert set(inference.parts) == {"critic_loss", "critic_total_correlation"}
    torch.testing.assert_close(inference.parts["critic_total_correlation"], total_correlation)
    torch.testing.assert_close(found, (*of_model, *of_critic))
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in of_critic)
    encoder = list(model.encoder.parameters())
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found[: len(encoder)])


def two_optimizers(experiment: Experiment, rates: list[float], norm: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Train a copy of an experiment by the two steps of the paper, each with an optimizer of its own."""
    model, regularizer = deepcopy((experiment.model, experiment.regularizer))
    beta, gamma, critic = regularizer.beta, regularizer.gamma, regularizer.critic  # type: ignore[attr-defined]
    of_model = Adam(model.parameters(), fused=True)
    of_critic = Adam(critic.parameters(), lr=1e-4, betas=(0.5, 0.9), fused=True)
    for rate in rates:
        of_model.param_groups[0]["lr"] = rate
        inference = model(experiment.splits.train.batch(torch.arange(64)))
        cross_entropy = critic.loss(inference.z).mean()
        of_model.zero_grad()
        loss = inference.distortion + beta() * inference.kl + gamma() * critic(inference.z)
        loss.mean().backward()
        of_critic.zero_grad()  # the paper's first step leaves gradients there, too
        cross_entropy.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
        torch.nn.utils.clip_grad_norm_(critic.parameters(), norm)
        of_model.step()
        of_critic.step()
        weights = [torch.cat([p.detach().flatten() for p in part.parameters()]) for part in (model, critic)]
        yield weights[0], weights[1]


def test_one_step_of_one_optimizer_is_a_step_of_each_of_two(compose: Compose) -> None:
    norm, rates = 0.05, ["+schedule@optimizer.lr=linear", "optimizer.lr.start=1e-2", "optimizer.lr.stop=1e-3"]
    experiment = build_experiment(compose(*SMALL, *rates, "optimizer.lr.epochs=4", f"max_grad_norm={norm}"))
    disturb(critic_of(experiment))
    given = [1e-2 - 9e-3 * number / 4 for number in range(4)]
    torch.manual_seed(3)
    expected = list(two_optimizers(experiment, given, norm))
    torch.manual_seed(3)
    step = Step(experiment)
    for number, pair in enumerate(expected):
        experiment.optimizer.advance(number)
        terms = step(torch.arange(64))
        torch.testing.assert_close(terms["loss"], terms["distortion"] + terms["penalty"])
        for part, weights in zip((experiment.model, critic_of(experiment)), pair, strict=True):
            found = torch.cat([p.detach().flatten() for p in part.parameters()])
            torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-6)


def test_the_critic_has_its_own_learning_rate_and_no_weight_decay(compose: Compose) -> None:
    words = ["optimizer=adamw", "optimizer.weight_decay=0.1", "regularizer.betas=[0.3,0.8]"]
    rates = ["+schedule@regularizer.lr=linear", "regularizer.lr.start=1e-3", "regularizer.lr.stop=0"]
    experiment = build_experiment(compose(*SMALL, *words, *rates))
    experiment.optimizer.advance(5)
    group = experiment.optimizer.inner.param_groups[-1]
    assert {id(p) for p in group["params"]} == {id(p) for p in experiment.regularizer.parameters()}
    assert group["lr"] == pytest.approx(5e-4)
    assert (group["betas"], group["weight_decay"]) == ((0.3, 0.8), 0.0)
    assert experiment.optimizer.rate == pytest.approx(1e-3)
    experiment.optimizer.slow_down(0.25)
    experiment.optimizer.advance(5)
    assert group["lr"] == pytest.approx(1.25e-4)
    assert experiment.optimizer.rate == pytest.approx(2.5e-4)
    assert not any("lr" in name for name, _ in experiment.regularizer.named_modules())  # no part of the loss


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["sigma=deterministic"],
            "regularizer=factor cannot be combined with sigma=deterministic.*regularizer=kl",
        ),
        (["latent=1"], "regularizer=factor needs latent=2 or more"),
        (["optimizer=sgd"], r"regularizer\.betas cannot be used with SGD.*type regularizer\.betas=null"),
        (["regularizer.betas=[0.5]"], r"regularizer\.betas=\[0\.5\] is not allowed: give two numbers"),
        (["regularizer.betas=[0.5,1.5]"], r"regularizer\.betas=\[0\.5, 1\.5\] is not allowed"),
        (["regularizer.lr=-1"], r"regularizer\.lr=-1 is not allowed"),
        (["+schedule@regularizer.lr=linear"], r"regularizer\.lr would reach 1.*regularizer\.lr\.start=1e-3"),
        (
            ["+schedule@regularizer.lr=steps", "regularizer.lr.values=[2,1]", "regularizer.lr.epochs=[1,1]"],
            r"regularizer\.lr would reach 2.*regularizer\.lr\.values=\[1e-3,1e-4\]",
        ),
    ],
)
def test_what_a_critic_cannot_do_is_refused(compose: Compose, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(compose(*SMALL, *words))


def test_other_optimizers_train_a_critic_without_betas(compose: Compose) -> None:
    experiment = build_experiment(compose(*SMALL, "optimizer=sgd", "regularizer.betas=null", "regularizer.lr=0.01"))
    disturb(critic_of(experiment))
    before = deepcopy(experiment.regularizer.state_dict())
    Step(experiment)(torch.arange(64))
    for name, parameter in experiment.regularizer.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert [group["lr"] for group in experiment.optimizer.inner.param_groups] == [1e-4, 0.01]


def test_a_critic_is_resumed_bit_for_bit(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "regularizer.lr=1e-2", "+schedule@optimizer.lr=linear", "optimizer.lr.start=1e-2"]
    words += ["optimizer.lr.stop=1e-3", "optimizer.lr.epochs=4"]
    for name, epochs in (("whole", 4), ("resumed", 2), ("resumed", 4)):
        found = ask("train", *words, f"epochs={epochs}", f"run_name={name}")
        assert found.code == 0, found.err
    whole, resumed = (load_checkpoint(Path(f"runs/{name}/checkpoint.pt")) for name in ("whole", "resumed"))
    for part in ("model", "regularizer"):
        assert whole[part].keys() == resumed[part].keys()
        assert all(torch.equal(value, resumed[part][name]) for name, value in whole[part].items())
    states = (saved["optimizer"]["state"].values() for saved in (whole, resumed))
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_critic_has_curves_and_is_kept_with_the_best_weights(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The model hardly moves; the critic finds out that its codes depend on each other, so the loss rises.
    words = ["sigma=fixed", "sigma.value=0.05", "optimizer.lr=1e-6", "regularizer.lr=1e-2", "regularizer.gamma=1e4"]
    found = ask("train", *SMALL, *words, "regularizer.beta=0", "epochs=4", "run_name=a")
    assert found.code == 0, found.err
    run = RunDir(tmp_path / "runs/a")
    assert run.summary()["weights_of_epoch"] < 4
    parts = {"critic_loss", "critic_total_correlation"}
    for split in ("train", "validation"):
        assert {f"{split}/{part}" for part in parts} <= run.metrics()[-1].keys()
        assert {tag_of(f"{split}/{part}") for part in parts} == {f"curves/{part}/{split}" for part in parts}
    summary, experiment = run.summary(), build_experiment({**run.config(), "epochs": 4})
    best = load_checkpoint(run.best_file)
    experiment.model.load_state_dict(best["model"])
    experiment.regularizer.load_state_dict(best["regularizer"])
    measured = validate(experiment, experiment.splits.test)
    assert parts <= summary["test"].keys()
    for name, value in summary["test"].items():
        assert measured[name] == value
    assert "Total correlation, estimated by the critic" in ask("explain", "critic_total_correlation").out
