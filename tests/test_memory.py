"""What cannot fit into memory is refused with a message before any memory is allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vae_cli.config.build import build_experiment, build_model, check_config
from vae_cli.core.errors import UserError
from vae_cli.core.images import grid
from vae_cli.machine import memory

Compose = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    "overrides",
    [
        ["latent=100000", "network.hidden=[1000000]"],
        ["network.hidden=[10000000,10000000]"],
        ["network=conv", "network.width=100000", "network.max_width=100000", "dataset=shapes"],
        ["network=resnet", "batch_size=1000000000"],
        ["prior=mixture", "prior.components=1000000000"],
        ["prior=vamp", "prior.components=1000000000"],
        ["prior=flow", "prior.hidden=1000000"],
        ["dataset=shapes", "dataset.images=1000000000"],
        ["dataset=linear_gaussian", "dataset.test=1000000000", "dataset.images=1000000000"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("check", [check_config, build_experiment])
def test_an_absurd_size_is_refused(compose: Compose, overrides: list[str], check: Callable[[Any], object]) -> None:
    with pytest.raises(
        UserError, match=r"would need [\d,.]+ [GT]B of memory, but only [\d.]+ [GT]B is available: give smaller"
    ):
        check(compose(*overrides))


def test_a_latent_size_has_an_upper_bound(compose: Compose) -> None:
    with pytest.raises(UserError, match=r"latent=1000000000000 .* between 1 and 100000"):
        check_config(compose("latent=1000000000000"))


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_the_estimate_counts_parameters_and_activations(compose: Compose, place: str) -> None:
    config = compose("network.hidden=[100]", "latent=2")
    with torch.device(place):
        model = build_model(config, (1, 8, 8))
    small, large = (memory.training_memory(model, (1, 8, 8), images) for images in (1, 1001))
    parameters = sum(p.numel() for p in model.parameters())
    assert small >= 4 * 4 * parameters
    # The inputs of the layers (the image, two hidden layers, the code), and the output of the last layer.
    least = 4 * (64 + 100 + 2 + 100 + 64)
    assert least <= (large - small) / 1000 <= 3 * least


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_the_estimate_counts_each_pseudo_input_once(compose: Compose, place: str) -> None:
    """Every step encodes all of them, however many images a batch has."""
    found = []
    for components in (100, 1100):
        config = compose("network.hidden=[1000]", "latent=2", "prior=vamp", f"prior.components={components}")
        with torch.device(place):
            model = build_model(config, (1, 8, 8))
        found.append([memory.training_memory(model, (1, 8, 8), images) for images in (1, 1001)])
    few, many = torch.tensor(found).diff(dim=0).flatten().div(1000).tolist()
    least = 4 * (4 * 64 + 1000)  # the pseudo-input, its gradient and its moments, and its hidden layer
    assert least <= few <= 3 * least
    assert few < many <= few + 1001 * 4 * 2 * 20  # the density of each code is the sum over all components


def test_the_estimate_counts_the_layers_of_a_flow_for_each_image(compose: Compose) -> None:
    found = []
    for prior in (["prior=standard_normal"], ["prior=flow", "prior.hidden=1000", "prior.layers=3"]):
        model = build_model(compose("network.hidden=[10]", "latent=2", *prior), (1, 8, 8))
        small, large = (memory.training_memory(model, (1, 8, 8), images) for images in (1, 1001))
        found.append((large - small) / 1000)
    least = 4 * 8 * 3 * 1000
    assert least <= found[1] - found[0] <= 2 * least


def test_the_memory_of_this_machine_is_plausible() -> None:
    there = memory.memory_of(torch.device("cpu"))
    assert there is None or 2**27 < there < 2**50


def test_a_picture_too_large_for_any_viewer_is_refused() -> None:
    with pytest.raises(UserError, match="million pixels"):
        grid(torch.zeros(1, 1, 1, 1).expand(100_000, 1, 8, 8), 100)
