"""The GPU suite: `pytest tests/gpu`, in about six minutes on an H100. Without a CUDA GPU every test is skipped.

No test here downloads anything: the images of MNIST and CIFAR-10 are replaced by random numbers of their shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vae_cli.axes.dataset import Split, Splits
from vae_cli.axes.dataset.torchvision import Torchvision
from vae_cli.config.build import Experiment, build_experiment
from vae_cli.core.rng import derive_seed

Built = Callable[..., Experiment]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder if there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU"))


@pytest.fixture(autouse=True)
def random_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the images of torchvision's datasets, which would be downloaded, by mostly dark random ones."""

    def load(self: Torchvision) -> Splits:
        levels = torch.rand(12_000, *self.shape, generator=torch.Generator().manual_seed(0)) ** 4 * 255
        images, rows = levels.to(torch.uint8), torch.arange(12_000).split([10_000, 1_000, 1_000])
        return Splits(*(Split(images, None, part) for part in rows), None)

    monkeypatch.setattr(Torchvision, "load", load)


@pytest.fixture
def built(compose: Callable[..., dict[str, Any]]) -> Built:
    """Build an experiment as a training does: `built("device=cuda", "network=conv")`."""

    def build(*words: str) -> Experiment:
        config = compose(*words)
        experiment = build_experiment(config)
        torch.manual_seed(derive_seed(config["seed"], "noise"))
        return experiment

    return build
