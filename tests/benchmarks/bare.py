"""The reference of the benchmarks: one VAE in plain PyTorch, and nothing else.

It does what is known to be fast: 8-bit images in memory that are indexed and scaled, a loss on logits, fused Adam, no
denormal numbers, and no value read back from the device during an epoch. It logs, saves and evaluates nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT, HIDDEN, BATCH = 20, 400, 128
SMALL = {"latent": 50, "hidden": 200, "batch": 20}  # the network and the batch of Burda et al., ICLR 2016


class Rows(nn.Module):
    """Reshape each image to a row, or each row to an image."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self.shape)


def mlp(outputs: int) -> tuple[nn.Module, nn.Module]:
    """784-400-20 and 20-400-784, fully connected."""
    encoder = nn.Sequential(Rows((784,)), nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))
    decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 784), Rows((1, 28, 28)))
    return encoder, decoder


def small(outputs: int) -> tuple[nn.Module, nn.Module]:
    """784-200-200-50 and 50-200-200-784, fully connected, with tanh."""
    latent, hidden = SMALL["latent"], SMALL["hidden"]
    encoder = nn.Sequential(
        *(Rows((784,)), nn.Linear(784, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()),
        nn.Linear(hidden, outputs),
    )
    decoder = nn.Sequential(
        *(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()),
        *(nn.Linear(hidden, 784), Rows((1, 28, 28))),
    )
    return encoder, decoder


def conv(outputs: int) -> tuple[nn.Module, nn.Module]:
    """Three strided convolutions and a fully connected layer, and their mirror: network=conv for 28x28 images."""
    encoder = nn.Sequential(
        *(nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU()),
        *(nn.Conv2d(64, 128, 4, 2, 1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(128 * 3 * 3, 256), nn.ReLU(), nn.Linear(256, outputs)),
    )
    decoder = nn.Sequential(
        *(nn.Linear(LATENT, 256), nn.ReLU(), nn.Linear(256, 128 * 3 * 3), nn.ReLU(), Rows((128, 3, 3))),
        *(nn.ConvTranspose2d(128, 64, 4, 2, 1, output_padding=1), nn.ReLU()),
        *(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1)),
    )
    return encoder, decoder


def train(images: Tensor, network: str, sigma: str, epochs: int) -> list[float]:
    """Train on images (N, 1, 28, 28), uint8, and return the seconds of each epoch."""
    count = -(-len(images) // (SMALL["batch"] if network == "small" else BATCH))
    steps = train_steps(images, network, sigma)
    seconds = []
    for _ in range(epochs):
        begin = time.perf_counter()
        for _ in range(count):
            next(steps)
        seconds.append(time.perf_counter() - begin)
    return seconds


def train_steps(images: Tensor, network: str, sigma: str) -> Iterator[int]:
    """Train on images (N, 1, 28, 28), uint8, without end; yield the number of images of each step."""
    torch.manual_seed(0)
    is_small = network == "small"
    latent, batch = (SMALL["latent"], SMALL["batch"]) if is_small else (LATENT, BATCH)
    encoder, decoder = {"mlp": mlp, "conv": conv, "small": small}[network](latent * (2 if sigma == "learned" else 1))
    shared = nn.Parameter(torch.zeros(latent))
    parameters = [*encoder.parameters(), *decoder.parameters(), *([shared] if sigma == "shared" else [])]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    while True:
        for rows in torch.randperm(len(images)).split(batch):
            x = images[rows].float().div_(255)
            if is_small:
                x = torch.bernoulli(x)  # a new binary image each time
            raw = encoder(x)
            if sigma == "learned":
                loc, log_scale = raw.chunk(2, 1)
            else:
                loc, log_scale = raw, shared
            if sigma == "deterministic":
                z, price = loc, 0.5 * loc.square().sum()
            elif sigma == "fixed":
                z, price = loc + torch.randn_like(loc), 0.5 * loc.square().sum()
            else:
                scale = log_scale.exp()
                z = loc + scale * torch.randn_like(loc)
                each = loc.square() + scale.square() - 1 - 2 * log_scale
                price = 0.5 * each.sum()
            distortion = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
            loss = (distortion + price) / len(x)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            yield len(x)
        assert torch.isfinite(loss)


def floor(network: str, steps: int) -> float:
    """Return the seconds that the matrix products of the mlp take in one epoch, forward and backward."""
    assert network == "mlp"
    sizes = [(784, HIDDEN), (HIDDEN, 2 * LATENT), (LATENT, HIDDEN), (HIDDEN, 784)]
    operands = [(torch.randn(BATCH, a), torch.randn(a, b), torch.randn(BATCH, b)) for a, b in sizes]
    begin = time.perf_counter()
    for _ in range(steps):
        for number, (x, weight, gradient) in enumerate(operands):
            x @ weight  # forward
            x.T @ gradient  # the weight's gradient
            if number:  # the images need no gradient
                gradient @ weight.T
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("--network", default="mlp")
    parser.add_argument("--sigma", default="learned")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--floor", action="store_true")
    given = parser.parse_args()
    torch.set_flush_denormal(True)  # before the first parallel operation
    torch.set_num_threads(given.threads)
    images = torch.load(given.images, weights_only=True)
    if given.floor:
        steps = -(-len(images) // BATCH)
        seconds = [floor(given.network, steps) for _ in range(given.epochs)]
    else:
        seconds = train(images, given.network, given.sigma, given.epochs)
    print(json.dumps({"seconds": seconds, "images": len(images)}))


if __name__ == "__main__":
    main()
