"""What must hold on a GPU, as far as a machine without one can show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.optim import SGD, Adam, Optimizer

from vae_cli.axes.optimizer import ScheduledOptimizer
from vae_cli.config.build import build_experiment
from vae_cli.machine.device import allow_tf32, computing_in, make_deterministic
from vae_cli.model import vae

Compose = Callable[..., dict[str, Any]]

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def in_layout(seed: int, layout: torch.memory_format) -> Tensor:
    """Return convolution weights, drawn from a seed, in a memory layout."""
    return torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(seed)).contiguous(memory_format=layout)


def train_and_move(
    kind: type[Optimizer], settings: dict[str, Any], first: torch.memory_format, then: torch.memory_format
) -> Tensor:
    """Take three steps in one layout, move to a new optimizer by its state, and take three steps in the other."""
    parameter = nn.Parameter(in_layout(0, first))
    optimizer = ScheduledOptimizer(kind, [parameter], settings)
    for step in range(6):
        if step == 3:
            state = optimizer.state_dict()
            parameter = nn.Parameter(parameter.detach().contiguous(memory_format=then))
            optimizer = ScheduledOptimizer(kind, [parameter], settings)
            optimizer.load_state_dict(state)
        parameter.grad = in_layout(step + 1, first if step < 3 else then)
        optimizer.step()
    return parameter.detach().contiguous()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Adam, {"lr": 0.1, "fused": True}),
        (Adam, {"lr": 0.1, "fused": True, "amsgrad": True}),
        (Adam, {"lr": 0.1, "fused": False}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    ],
)
@pytest.mark.parametrize("then", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_an_optimizer_resumes_in_another_memory_layout(
    kind: type[Optimizer], settings: dict[str, Any], first: torch.memory_format, then: torch.memory_format
) -> None:
    """A GPU stores the weights of convolutions in another order than the CPU."""
    stayed = train_and_move(kind, settings, torch.contiguous_format, torch.contiguous_format)
    torch.testing.assert_close(train_and_move(kind, settings, first, then), stayed)


# Precision and determinism -------------------------------------------------------------------------------------------


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Restore torch's settings for CUDA after the test."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    before = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    yield
    torch.backends.cuda.matmul.allow_tf32 = matmul
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


@pytest.mark.usefixtures("torch_settings")
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(("precision", "inside"), [("float32", False), ("tf32", True)])
def test_tf32_is_used_only_if_it_is_the_precision(precision: str, inside: bool, outside: bool) -> None:
    allow_tf32(outside)
    with computing_in(precision, "cuda"):
        assert torch.backends.cuda.matmul.allow_tf32 is cudnn.allow_tf32 is inside
    assert torch.backends.cuda.matmul.allow_tf32 is cudnn.allow_tf32 is outside
    with computing_in(precision, "cpu"):
        assert cudnn.allow_tf32 is outside


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_model_computes_in_its_precision_wherever_it_is_used(
    compose: Compose, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loaded run too, not only a training: encoder and decoder set the precision themselves."""
    model = build_experiment(compose("network.hidden=[8]")).model
    model.precision = precision  # type: ignore[assignment]
    used: list[tuple[str, str]] = []
    monkeypatch.setattr(vae, "computing_in", lambda *given: used.append(given) or nullcontext())
    model.decode(model.encode(torch.zeros(2, 1, 8, 8)).mean)
    assert used == [(precision, "cpu")] * 2


@pytest.mark.usefixtures("torch_settings")
def test_convolutions_on_a_gpu_are_deterministic() -> None:
    cudnn.deterministic, cudnn.benchmark = False, True
    make_deterministic(torch.device("cpu"))
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    make_deterministic(torch.device("cuda"))
    assert (cudnn.deterministic, cudnn.benchmark) == (True, False)


# Compilation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_compiling_changes_neither_statistics_nor_scale_nor_gradients(
    compose: Compose, likelihood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch compiles a network at its first pass, which must be like those of the training but leave no trace."""
    words = ["network=conv", "network.width=4", "network.normalization=batch", f"likelihood={likelihood}"]
    plain = build_experiment(compose(*words))
    seen: list[tuple[int, bool, bool]] = []

    def note(network: nn.Module) -> None:
        network.register_forward_pre_hook(
            lambda own, inputs: seen.append((len(inputs[0]), own.training, torch.is_grad_enabled()))
        )

    monkeypatch.setattr(nn.Module, "compile", note)
    compiled = build_experiment(compose(*words, "compile=true", "batch_size=48"))
    assert seen == [(48, True, True)] * 2
    for name, before in plain.model.state_dict().items():
        assert torch.equal(before, compiled.model.state_dict()[name]), name
    assert all(parameter.grad is None for parameter in compiled.model.parameters())
