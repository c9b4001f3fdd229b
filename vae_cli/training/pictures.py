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

# Descriptions of the pictures, in Markdown
RECONSTRUCTIONS = (
    "Upper row: {split} images, one in each column. Lower row: the reconstruction of the image above it, that is, the "
    "mean of p(x|z) for one draw of z from q(z|x). If the run has no sigma, z is loc(x)."
)
DECODED_DRAWS = (
    "Each image is the mean of p(x|z) for one draw of z from the prior. Rows and columns have no meaning. Each place "
    "shows the same random numbers at every step, so you can watch the decoder change."
)


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
        picture = grid(pairs, count, SIDE, PAD, row_labels=["image", "reconstruction"])
        about = RECONSTRUCTIONS.format(split="validation" if len(split) else "training")
        events.pictures("images/reconstructions", picture, step, about)
        samples = model.decode(model.prior().sample((SAMPLES,))).mean
        events.pictures("images/samples from the prior", grid(samples, 8, SIDE, PAD), step, DECODED_DRAWS)


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
