"""Whether a GPU computes what the CPU computes, in the precision that was asked for, and resumes bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vae_cli.config import catalog
from vae_cli.config.build import Experiment
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.run import load_run
from vae_cli.training.step import Step

Built = Callable[..., Experiment]
Answers = Callable[..., Any]


def choices(group: str) -> list[str]:
    """Return the choices of a group."""
    return sorted(catalog.groups()[group].choices)


class SameNoise(TorchFunctionMode):
    """Draws normal, uniform and binary numbers that are the same on every device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "normal_":
            noise = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(args[0].numel()))
            return args[0].copy_(noise)
        if name == "rand":
            uniform = torch.rand(args[0], generator=torch.Generator().manual_seed(args[0].numel()))
            return uniform.to(kwargs["device"])
        if name == "bernoulli":
            uniform = torch.rand(args[0].shape, generator=torch.Generator().manual_seed(args[0].numel()))
            return (uniform.to(args[0].device) < args[0]).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def three_steps(experiment: Experiment) -> tuple[Tensor, list[Tensor]]:
    """Return the losses of three eager steps, and the gradients of the first."""
    step = Step(experiment)
    step.replayed = None
    positions = torch.arange(64, device=experiment.splits.train.images.device)
    losses, gradients = [], list[Tensor]()
    with SameNoise():
        for number in range(3):
            losses.append(step(positions)["loss"].mean().cpu())
            if number == 0:
                gradients = [p.grad.cpu().clone() for p in step.parameters if p.grad is not None]
    return torch.stack(losses), gradients


def difference(built: Built, *words: str) -> float:
    """Return the greatest relative difference of losses and gradients between the GPU and the CPU.

    Weights are not compared: if a gradient is almost 0, Adam moves by the sign of its rounding.
    """
    (here, mine), (there, theirs) = (three_steps(built(*words, f"device={device}")) for device in ("cpu", "cuda"))
    largest = max(float(gradient.abs().max()) for gradient in mine)
    apart = max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True)) / largest
    return max(apart, float(((here - there) / here).abs().max()))


@pytest.mark.parametrize("likelihood", choices("likelihood"))
@pytest.mark.parametrize("sigma", choices("sigma"))
def test_every_sigma_and_likelihood_is_that_of_the_cpu(built: Built, sigma: str, likelihood: str) -> None:
    words = [f"sigma={sigma}", f"likelihood={likelihood}", "network.hidden=[32]", "latent=4"]
    words += ["prior=sphere"] if sigma == "power_spherical" else []
    assert difference(built, *words) < 1e-4


@pytest.mark.parametrize(
    "words",
    [
        *([f"network={network}"] for network in choices("network")),
        *([f"network={network}", "network.spectral_norm=true"] for network in choices("network")),
        ["network=conv", "network.normalization=batch"],
        *([f"network={network}", "latent=[2,4,4]"] for network in ("conv", "resnet")),
        *([f"regularizer={regularizer}", "network.hidden=[32]"] for regularizer in choices("regularizer")),
        *([f"optimizer={optimizer}", "optimizer.lr=1e-4", "network.hidden=[32]"] for optimizer in choices("optimizer")),
        *([f"prior={prior}", "network.hidden=[32]"] for prior in choices("prior") if prior != "sphere"),
        ["max_grad_norm=1", "network.hidden=[32]"],
    ],
    ids=" ".join,
)
def test_every_other_choice_is_that_of_the_cpu(built: Built, words: list[str]) -> None:
    assert difference(built, "latent=4", *words) < 1e-4


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("float32", 0, 2e-5), ("tf32", 1e-6, 5e-3), ("bfloat16", 1e-4, 5e-2)]
)
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_a_precision_rounds_as_much_as_it_should(
    built: Built, network: str, precision: str, least: float, most: float
) -> None:
    """float32 must not round to TF32, and the other precisions must take effect."""
    exact = built(f"network={network}", "device=cpu")
    rounded = built(f"network={network}", "device=cuda", f"precision={precision}")
    x = exact.splits.train.batch(torch.arange(200))
    with torch.no_grad():
        loc, found = exact.model.encode(x).mean, rounded.model.encode(x.cuda()).mean.cpu()
    apart = float((loc - found).abs().max() / loc.abs().max())
    assert least <= apart < most


@pytest.mark.parametrize(
    "words", [["network=mlp"], ["network=conv"], ["network=resnet", "network.width=8"]], ids=" ".join
)
def test_a_resumed_run_ends_with_the_same_bits(
    ask: Answers, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, epochs in (("whole", 4), ("resumed", 2), ("resumed", 4)):
        assert ask("train", *words, "device=cuda", f"epochs={epochs}", f"run_name={name}").code == 0
    whole, resumed = (load_checkpoint(Path(f"runs/{name}/checkpoint.pt")) for name in ("whole", "resumed"))
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name


@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_moves_to_another_device(
    ask: Answers, first: str, then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of convolutions have another layout on a GPU, and Adam's moments must follow them."""
    monkeypatch.chdir(tmp_path)
    for name, devices in {"moved": (first, then), "stayed": (first, first)}.items():
        for device, epochs in zip(devices, (3, 6), strict=True):
            words = ["network=conv", f"device={device}", f"epochs={epochs}", f"run_name={name}"]
            assert ask("train", *words).code == 0
    losses = [
        json.loads(Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()[-1]) for name in ("moved", "stayed")
    ]
    assert abs(losses[0]["validation/loss"] - losses[1]["validation/loss"]) < 1  # nats per image


@pytest.mark.parametrize(
    "command",
    [
        ["sample"],
        ["sample", "--from", "posterior"],
        ["interpolate"],
        ["evaluate", "--quick"],
        ["evaluate", "--quick", "--device", "cpu"],
    ],
    ids=" ".join,
)
def test_every_command_runs_on_a_gpu(
    ask: Answers, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ask("train", "device=cuda", "epochs=1", "run_name=a").code == 0
    assert ask(command[0], "a", *command[1:]).code == 0
    assert load_run("a").device.type == "cuda"


@pytest.mark.parametrize(
    "words",
    [
        ["network=mlp"],
        ["network=conv", "precision=bfloat16"],
        ["network=resnet"],
        ["network=conv", "latent=[2,4,4]"],
        ["max_grad_norm=1", "+schedule@optimizer.lr=linear", "optimizer.lr.start=1e-2", "optimizer.lr.stop=1e-4"],
        ["optimizer=adamw", "+schedule@optimizer.lr=linear", "optimizer.lr.start=1e-2", "optimizer.lr.stop=1e-4"],
        ["optimizer=sgd", "optimizer.lr=1e-5"],
        ["regularizer=free_bits", "prior=scaled_normal"],
        ["regularizer=factor", "regularizer.hidden=32", "max_grad_norm=1"],
        ["regularizer=gradient_penalty"],
        ["network=conv", "network.spectral_norm=true", "regularizer=gradient_penalty"],
    ],
    ids=" ".join,
)
def test_a_replayed_step_has_the_bits_of_the_eager_one(built: Built, words: list[str]) -> None:
    found = []
    for is_eager in (True, False):
        experiment = built(*words, "device=cuda", "likelihood=bernoulli", "likelihood.binarize=dynamic")
        step = Step(experiment)
        replayed = step.replayed
        assert replayed is not None
        if is_eager:
            step.replayed = None
        positions, means = torch.arange(64, device="cuda"), []
        for number in range(20):
            experiment.optimizer.advance(number / 2)
            means.append(step(positions[: 64 if number % 5 else 20])["loss"].mean())
        losses = torch.stack(means)
        if not is_eager:
            assert replayed.replay is not None
            assert replayed.has_update == (not any(word.startswith("optimizer=") for word in words))
        found.append((losses, experiment.model.state_dict()))
    (losses, eager), (same_losses, same) = found
    assert torch.equal(losses, same_losses)
    for name, value in eager.items():
        assert torch.equal(value, same[name]), name
