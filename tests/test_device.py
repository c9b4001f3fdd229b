"""What must hold on a GPU, as far as a machine without one can show it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from vae_cli.axes.optimizer import ScheduledOptimizer

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
