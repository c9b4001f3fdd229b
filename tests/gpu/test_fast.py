"""How fast a GPU trains: waits per step, images per second, and the share of what the card can do.

Nothing here is asserted in seconds. pytest prints the figures at the end, and with -s each when it is known.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_cli.config.build import Experiment
from vae_cli.training.meter import Meter
from vae_cli.training.step import Step

Built = Callable[..., Experiment]
Record = Callable[[str, str], None]

STEPS = 200
MNIST = ("dataset=mnist", "likelihood=bernoulli", "batch_size=128", "device=cuda")
CASES = {
    "mlp 784-400-16": (*MNIST, "network.hidden=[400]"),
    "conv, MNIST": (*MNIST, "network=conv"),
    "resnet, CIFAR-10": ("dataset=cifar10", "network=resnet", "batch_size=128", "device=cuda"),
}
RUNS_AT_ONCE = (1, 4, 16)


@pytest.fixture
def record(record_property: Record) -> Record:
    """Record a figure for the table at the end, and print it."""

    def note(name: str, value: str) -> None:
        record_property(name, value)
        print(f"\n{name}: {value}", flush=True)

    return note


def batches(experiment: Experiment) -> list[Tensor]:
    """Return whole batches of positions in random order."""
    images = experiment.splits.train
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.images.device)
    return list(order.split(experiment.config["batch_size"])[:-1])


def seconds_per_step(step: Callable[[Tensor], object], order: list[Tensor], steps: int = STEPS) -> float:
    """Return the least of three means over some steps, after a warm-up."""
    for positions in order[:10]:
        step(positions)
    means = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for number in range(steps):
            step(order[number % len(order)])
        torch.cuda.synchronize()
        means.append((time.perf_counter() - begin) / steps)
    return min(means)


@pytest.mark.parametrize("name", CASES)
def test_no_step_waits_for_the_gpu(built: Built, name: str) -> None:
    experiment = built(*CASES[name])
    step, meter, order = Step(experiment), Meter(), batches(experiment)
    for number, positions in enumerate(order[:10]):
        meter.add(number, step(positions))
    meter.point()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for number, positions in enumerate(order[10:30]):
                meter.add(number, step(positions))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # The mode itself is announced once by a warning that mentions synchronizing operations.
    waits = [said for said in caught if "called a synchronizing" in str(said.message)]
    assert not [f"{said.filename}:{said.lineno}: {said.message}" for said in waits]


def test_the_check_for_waits_notices_one() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            torch.ones(1, device="cuda").item()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [said for said in caught if "called a synchronizing" in str(said.message)]


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_images_per_second(built: Built, name: str, precision: str, record: Record) -> None:
    experiment = built(*CASES[name], f"precision={precision}")
    batch, order = experiment.config["batch_size"], batches(experiment)
    replayed, eager = Step(experiment), Step(experiment)
    eager.replayed = None
    for kind, step in (("eager", eager), ("CUDA graph", replayed)):
        torch.cuda.reset_peak_memory_stats()
        seconds = seconds_per_step(step, order)
        peak = torch.cuda.max_memory_allocated() / 2**20
        record(f"{name}, {precision}, {kind}", f"{batch / seconds:,.0f} images/s, {peak:,.0f} MB")


def test_compiled_images_per_second(built: Built, record: Record) -> None:
    for name in ("mlp 784-400-16", "resnet, CIFAR-10"):
        experiment = built(*CASES[name], "precision=bfloat16", "compile=true")
        seconds = seconds_per_step(Step(experiment), batches(experiment))
        record(f"{name}, bfloat16, compiled, CUDA graph", f"{128 / seconds:,.0f} images/s")


def test_share_of_the_matrix_products(built: Built, record: Record) -> None:
    """The products of the mlp alone, forward and backward, as one CUDA graph: what no step can beat."""
    experiment = built(*CASES["mlp 784-400-16"])
    sizes = [(784, 400), (400, 32), (16, 400), (400, 784)]
    operands = [[torch.randn(*size, device="cuda") for size in ((128, a), (a, b), (128, b))] for a, b in sizes]

    def products() -> None:
        for number, (x, weight, gradient) in enumerate(operands):
            x @ weight
            x.T @ gradient
            if number:
                gradient @ weight.T

    products()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products()
    order = batches(experiment)
    floor = seconds_per_step(lambda positions: graph.replay(), order)
    share = floor / seconds_per_step(Step(experiment), order)
    record("mlp 784-400-16, share of its matrix products", f"{share:.2f}")


class Example(nn.Module):
    """The network of the usual example: two heads, a sigmoid at the end, and the default Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.loc, self.log_variance = nn.Linear(784, 400), nn.Linear(400, 20), nn.Linear(400, 20)
        self.back, self.out = nn.Linear(20, 400), nn.Linear(400, 784)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.hidden(x))
        loc, log_variance = self.loc(h), self.log_variance(h)
        z = loc + torch.exp(0.5 * log_variance) * torch.randn_like(loc)
        return torch.sigmoid(self.out(F.relu(self.back(z)))), loc, log_variance


def test_against_the_usual_example(built: Built, record: Record) -> None:
    """The usual way: a DataLoader that collates images one by one, a copy and a read of the loss at every step."""
    experiment = built(*CASES["mlp 784-400-16"], "latent=20")
    ours = 128 / seconds_per_step(Step(experiment), batches(experiment))
    images = experiment.splits.train.images.cpu()[:10_000].float().div(255).flatten(1)
    loader = torch.utils.data.DataLoader(list(images), batch_size=128, shuffle=True, num_workers=1, pin_memory=True)  # type: ignore[arg-type]
    model = Example().cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    speeds = []
    for _ in range(3):
        begin = time.perf_counter()
        for batch in loader:
            x = batch.cuda()
            optimizer.zero_grad()
            y, loc, log_variance = model(x)
            distortion = F.binary_cross_entropy(y, x, reduction="sum")
            loss = distortion - 0.5 * (1 + log_variance - loc.square() - log_variance.exp()).sum()
            loss.backward()
            loss.item()
            optimizer.step()
        speeds.append(len(images) / (time.perf_counter() - begin))
    record("mlp, against the usual example", f"{ours / max(speeds):.1f} times as many images/s")


PROGRAM = """
import sys, time
import torch
from hydra import compose, initialize_config_dir
import vae_cli.commands.train
from vae_cli.axes.dataset import Split, Splits
from vae_cli.axes.dataset.torchvision import Torchvision
from vae_cli.config.build import build_experiment
from vae_cli.config.catalog import configs_dir
from vae_cli.config.compose import to_plain
from vae_cli.training.step import Step

images = torch.randint(0, 255, (12000, 1, 28, 28), dtype=torch.uint8)
rows = torch.arange(12000).split([10000, 1000, 1000])
Torchvision.load = lambda self: Splits(*(Split(images, None, part) for part in rows), None)
with initialize_config_dir(str(configs_dir()), version_base="1.3"):
    config = to_plain(compose("train", sys.argv[1:], return_hydra_config=True))
experiment = build_experiment(config)
step = Step(experiment)
order = torch.randperm(10000).cuda().split(128)[:-1]
for positions in order[:20]:
    step(positions)
torch.cuda.synchronize()
print("ready", flush=True)
sys.stdin.readline()
count, begin = 0, time.time()
while time.time() < begin + 4:
    for positions in order:
        step(positions)
    torch.cuda.synchronize()
    count += len(order) * 128
print(count / (time.time() - begin), flush=True)
"""


def images_per_second_together(count: int, folder: Path) -> float:
    """Return the images per second of several runs together, each in its own process, that start at the same time."""
    command = [sys.executable, "-c", PROGRAM, *CASES["mlp 784-400-16"], "threads=1"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": folder}
    processes = [subprocess.Popen(command, **pipes) for _ in range(count)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in processes)


def test_several_runs_on_one_gpu(tmp_path: Path, record: Record) -> None:
    """The images per second of several processes together, relative to one.

    They take turns on the GPU, unless NVIDIA's Multi-Process Service (MPS) runs: `nvidia-cuda-mps-control -d`.
    """
    has_service = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()
    speeds: dict[int, float] = {}
    for count in RUNS_AT_ONCE:
        speeds[count] = images_per_second_together(count, tmp_path)
        record(
            f"mlp, {count} runs at a time{', with MPS' * has_service}",
            f"{speeds[count]:,.0f} images/s, {speeds[count] / speeds[1]:.1f} times one",
        )


def test_memory_does_not_grow(built: Built) -> None:
    experiment = built(*CASES["mlp 784-400-16"])
    step, meter, order = Step(experiment), Meter(), batches(experiment)
    peaks: list[Any] = []
    for _ in range(3):
        for number, positions in enumerate([*order, order[0][:7]]):
            meter.add(number, step(positions))
        meter.point()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] == peaks[1]
