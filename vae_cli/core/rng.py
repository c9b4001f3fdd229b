"""Random numbers: a stream of seeds for every purpose, and asking a model without disturbing its training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def stream(seed: int, *names: object) -> int:
    """A seed for one purpose, the same on every machine, and unlike that for any other purpose."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *names)).encode(), digest_size=7).digest())


@contextmanager
def initial_weights(seed: int, part: str) -> Iterator[None]:
    """Draw the initial weights of a part from a stream of its own, and leave the global one alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, part))
        yield


@contextmanager
def evaluating(model: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
    """Ask a model without changing it: no gradient, no running statistics, and random numbers of its own."""
    was_training = model.training
    random = random_state(device)
    torch.manual_seed(stream(seed, "evaluation"))
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        set_random_state(random, device)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that a training on a device draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go back to these states, as far as they belong to this device."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"].cpu())


def order(seed: int, epoch: int) -> torch.Generator:
    """What the order of the images in an epoch depends on: the seed and the epoch, and nothing else."""
    return torch.Generator().manual_seed(stream(seed, "order", epoch))
