"""The base class of regularizers, and what several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vae_cli.axes.schedule import Schedule
from vae_cli.core.compatibility import Need
from vae_cli.core.values import NonNegative
from vae_cli.model.inference import Inference

Weight = NonNegative | Schedule

GIVEN = Need("prior", "given", "this loss would not train the prior's parameters; type prior=standard_normal")


class Regularizer(nn.Module):
    """A regularizer: forward maps an Inference to the penalty (B,), in nats per image.

    parts           names of the terms that forward adds to Inference.parts; they become curves
    draws           the number of draws of z for each image, in training and validation
    least_images    the smallest batch size that the penalty is meant for
    provides        "sphere" if the penalty suits codes on the sphere |z| = 1
    needs           may depend on the settings: an instance can replace it
    optimizer       the optimizer's arguments for the regularizer's own parameters, if they differ from the model's
    differentiates  whether forward differentiates the decoder, so that the loss needs second derivatives
    """

    parts: ClassVar[tuple[str, ...]] = ()
    differentiates: ClassVar[bool] = False
    least_images: ClassVar[int] = 1
    provides: ClassVar[frozenset[str]] = frozenset({"sphere"})
    needs: tuple[Need, ...] = ()
    draws: int = 1
    optimizer: Mapping[str, Any] = MappingProxyType({})

    @property
    def samples(self) -> tuple[int, ...]:
        """The shape *S of the draws of z (see `VAE.forward`)."""
        return () if self.draws == 1 else (self.draws,)

    def start(self, images: int) -> None:
        """Receive the number of training images, before training starts. The default ignores it."""


def has_weight(weight: Schedule) -> bool:
    """Return whether a weight is ever above 0."""
    return weight.bounds()[1] > 0


def weighted_kl(beta: Schedule, inference: Inference) -> Tensor:
    """Return beta * KL (B,), or beta * energy for a point mass.

    If beta is always 0, the divergence is not computed: nothing limits the codes then, and 0 times infinity is NaN.
    """
    return beta.times(inference.kl) if has_weight(beta) else torch.zeros_like(inference.distortion)
