"""Measure a model over a set of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vae_cli.build import stream
from vae_cli.dataset import Split
from vae_cli.metric.terms import Posterior, Term, Terms
from vae_cli.model import VAE


def evaluate(
    model: VAE,
    regularizer: nn.Module,
    split: Split,
    seed: int,
    device: torch.device,
    metrics: Sequence[Term] | None = None,
    batch_size: int = 500,
) -> dict[str, float]:
    """The metrics, by default the terms of the loss and the shape of the posterior, over all images of a split.

    The same seed draws the same noise, and the noise of a training that goes on is not disturbed. Quantities are nats
    per image, as in training. A penalty with a mean over the batch inside (free bits, capacity) sees batches of
    batch_size.
    """
    metrics = [Terms(), Posterior()] if metrics is None else metrics
    with questioned(model, seed, device):
        for positions in split.in_order(batch_size):
            inference = model(split.batch(positions))
            penalty = regularizer(inference)
            for metric in metrics:
                metric.update(inference, penalty)
    return {name: value for metric in metrics for name, value in metric.compute().items()}


@contextmanager
def questioned(model: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
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
