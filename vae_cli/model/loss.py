"""The loss of a batch, and its terms."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vae_cli.machine import distributed

Terms = dict[str, Tensor]
Loss = Callable[[Tensor], tuple[Tensor, Terms]]


def loss_and_terms(
    model: nn.Module, regularizer: nn.Module, x: Tensor, samples: tuple[int, ...] = ()
) -> tuple[Tensor, Terms]:
    """Return the loss mean(distortion + penalty) of images x (B, C, H, W), and its terms, each (B,) and detached.

    samples is the shape of the draws of z for each image (see `VAE.forward`).
    If several processes share the batch, the mean of their losses is the loss of the entire batch. If there are fewer
    images than processes, the processes without an image of their own return empty terms (see `distributed.share`).
    """
    inference = model(x, samples)
    terms = inference.terms(regularizer(inference))
    loss = distributed.mean_loss(terms["loss"])
    return loss, {name: distributed.counted(term.detach()) for name, term in terms.items()}
