"""Random numbers: seeds, generators and their states.

Each purpose has its own random stream, seeded by the run's seed and the purpose, so draws for one purpose do not affect
another. Runs with the same seed start from the same decoder and see the images in the same order in every sigma mode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


def derive_seed(seed: int, *purpose: object) -> int:
    """Return a seed for one purpose: 56 bits, the same on every machine, and different for every other purpose.

    >>> derive_seed(0, "encoder")
    41288079010412492
    """
    return int.from_bytes(hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=7).digest())


@contextmanager
def initial_weights(seed: int, part: str) -> Iterator[None]:
    """Inside the block, draw a model part's initial weights from a random stream of its own.

    The global CPU generator is restored afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, part))
        yield


@contextmanager
def evaluating(model: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
    """Use a model without affecting its training.

    Inside the block, no gradient is recorded, the model is in evaluation mode (so running statistics do not change) and
    random numbers come from `seed`. Afterwards, the model's mode and the generators' states are restored.
    """
    was_training = model.training
    random = random_state(device)
    _seed_generators(derive_seed(seed, "evaluation"), device)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        set_random_state(random, device)


def _seed_generators(seed: int, device: torch.device) -> None:
    """Seed the CPU's generator and this device's. torch.manual_seed is slower: it seeds the other devices as well."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[number].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the torch generators used when training on this device, keyed by device type."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore generator states returned by `random_state`: the CPU's and, if saved, this device's."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"].cpu())


def epoch_order(seed: int, epoch: int) -> torch.Generator:
    """Return the generator that shuffles the images of an epoch; it depends on the seed and the epoch alone."""
    return torch.Generator().manual_seed(derive_seed(seed, "order", epoch))


def numpy_generator(*seed: int) -> np.random.RandomState:
    """Return a NumPy generator for a seed; additional numbers select independent streams of this seed.

    It is a RandomState, whose random numbers NumPy guarantees to be the same in later versions.

    >>> numpy_generator(0).permutation(5)
    array([3, 0, 2, 1, 4])
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
