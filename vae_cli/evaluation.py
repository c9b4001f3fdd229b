"""Measure a model over a set of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from vae_cli.build import stream
from vae_cli.dataset import Split
from vae_cli.metric import Metric, Posterior, Terms
from vae_cli.model import VAE


def evaluate(
    model: VAE,
    regularizer: nn.Module,
    split: Split,
    seed: int,
    device: torch.device,
    metrics: Sequence[Metric] | None = None,
    batch_size: int = 500,
) -> dict[str, float]:
    """The metrics, by default the terms of the loss and the shape of the posterior, over all images of a split.

    The same seed draws the same noise, and the noise of a training that goes on is not disturbed. Quantities are nats
    per image, as in training. A penalty with a mean over the batch inside (free bits, capacity) sees batches of
    batch_size.
    """
    metrics = [Terms(), Posterior()] if metrics is None else metrics
    with questioned(model, seed, device):
        for positions in torch.arange(len(split), device=device).split(batch_size):
            inference = model(split.batch(positions))
            penalty = regularizer(inference)
            for metric in metrics:
                metric.update(inference, penalty)
    return {name: value for metric in metrics for name, value in metric.compute().items()}


@contextmanager
def questioned(model: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
    """Ask a model without changing it: no gradient, no running statistics, and random numbers of its own."""
    was_training = model.training
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(stream(seed, "evaluation"))
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)
