"""Evaluate a model on a split: the terms of the loss and statistics of the posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from vae_cli.axes.dataset import Split
from vae_cli.axes.regularizer import Regularizer
from vae_cli.config.build import Experiment
from vae_cli.core.rng import evaluating
from vae_cli.model.inference import Inference, with_derived
from vae_cli.model.vae import VAE


def evaluate_split(
    model: VAE,
    regularizer: Regularizer,
    split: Split,
    seed: int,
    device: torch.device,
    metrics: Sequence[Term] | None = None,
    batch_size: int = 500,
) -> dict[str, float]:
    """Return metrics over all images of a split, by default the terms of the loss and statistics of the posterior.

    The terms are in nats per image, as in training. A given seed always draws the same noise, and the random state of
    the training is not changed. Penalties that involve a batch average (free bits, capacity) or compare the codes of a
    batch (mmd, total_correlation, dip) use batch_size images at a time. If the loss needs several draws of z for each
    image, fewer images pass through the model at a time.
    """
    metrics = [Terms(), Posterior()] if metrics is None else metrics
    with evaluating(model, seed, device):
        for positions in split.in_order(max(1, batch_size // regularizer.draws)):
            inference = model(split.batch(positions), regularizer.samples)
            penalty = regularizer(inference)
            for metric in metrics:
                metric.update(inference, penalty)
    return {name: value for metric in metrics for name, value in metric.compute().items()}


Sum = Tensor | float  # 0.0 until the first batch


class Term(Protocol):
    """A metric that yields one or more figures and is accumulated batch by batch."""

    def update(self, inference: Inference, penalty: Tensor) -> None:
        """Add a batch and its penalties (B,)."""

    def compute(self) -> dict[str, float]:
        """Return the figures over all batches."""


class Terms:
    """The terms of the loss, in nats per image: loss, distortion, penalty, and, if they are defined, rate, rate_loc,
    rate_scale, elbo. rate_bits = rate / ln 2 is the rate in bits."""

    def __init__(self) -> None:
        self.count = 0
        self.names: tuple[str, ...] = ()
        self.sums: Tensor | None = None

    def update(self, inference: Inference, penalty: Tensor) -> None:
        terms = inference.terms(penalty)
        self.names = tuple(terms)
        # In float64, because a float32 sum over a large set loses digits in which two models differ.
        sums = torch.stack([term.detach() for term in terms.values()]).double().sum(1)
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += len(inference.x)

    def compute(self) -> dict[str, float]:
        if self.sums is None:
            return {}
        values = with_derived(dict(zip(self.names, (self.sums / self.count).tolist(), strict=True)))
        if "rate" in values:
            values["rate_bits"] = values["rate"] / math.log(2)
        return values


class Posterior:
    """Statistics of the posterior: loc_std and, if z is noisy, active_units, scale_mean, scale_min and collapsed.

    active_units  the number of dimensions in which Var_x(loc_j) exceeds 1 % of the mean of scale_j^2 over images
    loc_std       the square root of the mean of Var_x(loc_j) over dimensions
    scale_mean    the mean scale over images and dimensions; scale_min is the minimum
    collapsed     the fraction of dimensions whose mean scale is below 1 % of the standard deviation of loc

    Burda et al. (2016) define active units as the dimensions with Var_x(loc_j) > 0.01. If sigma is learned, an inactive
    dimension has the prior's scale 1, so the two definitions agree on it. Unlike theirs, the definition above does not
    depend on the scaling of z. It does not apply to a point mass, which has no scale.
    """

    def __init__(self) -> None:
        self.count = 0
        self.loc: Sum = 0.0
        self.square: Sum = 0.0
        self.scale: Sum = 0.0
        self.scale_square: Sum = 0.0
        self.least: Sum = math.inf

    def update(self, inference: Inference, penalty: Tensor) -> None:
        loc = inference.loc.detach().double()
        self.loc = self.loc + loc.sum(0)
        self.square = self.square + loc.square().sum(0)
        if inference.scale is not None:
            scale = inference.scale.detach().double()
            self.scale = self.scale + scale.sum(0)
            self.scale_square = self.scale_square + scale.square().sum(0)
            self.least = scale.min().clamp_max(self.least)  # not read here: each reading waits for the device
        self.count += len(loc)

    def compute(self) -> dict[str, float]:
        if not isinstance(self.loc, Tensor) or not isinstance(self.square, Tensor):
            return {}
        variance = (self.square / self.count - (self.loc / self.count).square()).clamp_min(0)
        values = {"loc_std": float(variance.mean().sqrt())}
        if isinstance(self.scale, Tensor) and isinstance(self.scale_square, Tensor):
            mean = self.scale / self.count
            values["active_units"] = float((variance > 0.01 * self.scale_square / self.count).sum())
            values["scale_mean"] = float(mean.mean())
            values["scale_min"] = float(self.least)
            values["collapsed"] = float((mean < 0.01 * variance.sqrt()).double().mean())
        return values


MONITORED = 1000  # training images that stand in for a validation set


def validate(experiment: Experiment, split: Split) -> dict[str, float]:
    """Return the terms of the loss and the statistics of the posterior over a split."""
    return evaluate_split(experiment.model, experiment.regularizer, split, experiment.config["seed"], experiment.device)


def some_training_images(experiment: Experiment) -> Split:
    """Return the training images that are used for posterior statistics if there is no validation set."""
    train = experiment.splits.train
    return replace(train, index=train.index[:MONITORED])
