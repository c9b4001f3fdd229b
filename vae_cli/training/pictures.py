"""TensorBoard output other than curves: histograms, reconstructions, samples, latent codes."""

from __future__ import annotations

import torch

from vae_cli.config.build import Experiment
from vae_cli.core.images import grid
from vae_cli.core.rng import evaluating
from vae_cli.training.tensorboard import EventWriter
from vae_cli.training.validation import some_training_images

IN_HISTOGRAMS = 500  # images
IN_PROJECTOR = 1000  # test images
PAIRS = 10  # images with their reconstructions below
SAMPLES = 64
SIDE = 32  # small images are enlarged to about this many pixels; a card of TensorBoard shows no more detail
PAD = 3  # pixels between images


def write_pictures(experiment: Experiment, events: EventWriter, step: int) -> None:
    """Write histograms of the posterior, images above their reconstructions, and decoded samples from the prior."""
    model, split = experiment.model, experiment.splits.validation
    shown = split if len(split) else some_training_images(experiment)
    with evaluating(model, experiment.config["seed"], experiment.device):
        inference = model(shown.batch(torch.arange(min(IN_HISTOGRAMS, len(shown)), device=experiment.device)))
        histograms = {"posterior/loc": inference.loc}
        if inference.scale is not None:
            histograms["posterior/scale"] = inference.scale
        if inference.rate is not None and inference.rate_per_dimension is not None:
            histograms["posterior/rate_per_dimension"] = inference.rate_per_dimension.mean(0)
        events.histograms(histograms, step)
        count = min(PAIRS, len(inference.x))
        pairs = torch.cat([inference.x[:count], inference.likelihood.mean[:count]])
        events.pictures("images/reconstructions", grid(pairs, count, SIDE, PAD), step)
        samples = model.decode(model.prior().sample((SAMPLES,))).mean
        events.pictures("images/samples", grid(samples, 8, SIDE, PAD), step)


def write_embedding(experiment: Experiment, events: EventWriter, step: int) -> None:
    """Show the posterior means of test images in TensorBoard's projector, with images and labels."""
    test, classes = experiment.splits.test, experiment.splits.classes
    positions = torch.arange(min(IN_PROJECTOR, len(test)), device=experiment.device)
    with evaluating(experiment.model, experiment.config["seed"], experiment.device):
        inference = experiment.model(test.batch(positions))
    labels = None
    if test.labels is not None:
        labels = [classes[n] if classes else str(n) for n in test.batch_labels(positions).tolist()]
    images = inference.x if inference.x.shape[1] in (1, 3) else None
    events.embedding(inference.loc, labels, images, step)
