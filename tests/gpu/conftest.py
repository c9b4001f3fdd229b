"""The GPU suite: `pytest tests/gpu`, in about five minutes on an H200. Without a CUDA GPU every test is skipped.

With --save, the figures are stored in tests/benchmarks/results, from which the table in tests/README.md is made. No
test here downloads anything: the images of MNIST and CIFAR-10 are replaced by random numbers of their shapes.
"""

from __future__ import annotations

import json
import platform
import time
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


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """With --save, store the figures; others of the same GPU and day stay."""
    passed = terminalreporter.getreports("passed")
    figures = dict(figure for report in passed for figure in report.user_properties)
    if not config.getoption("--save") or not figures:
        return
    gpu = torch.cuda.get_device_name()
    about = {"date": time.strftime("%Y-%m-%d"), "gpu": gpu, "python": platform.python_version()}
    about["torch"] = torch.__version__
    results = Path(__file__).parents[1] / "benchmarks" / "results"
    file = results / f"{about['date']}-{gpu.replace(' ', '-').lower()}.json"
    before = json.loads(file.read_text())["figures"] if file.exists() else {}
    file.write_text(json.dumps({"about": about, "figures": {**before, **figures}}, indent=1) + "\n")


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
