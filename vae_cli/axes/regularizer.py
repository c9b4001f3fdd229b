"""The axis `regularizer`: the penalty that is added to the distortion.

Each choice maps an Inference to the penalty (B,), in nats per image. The loss is the mean of distortion + penalty over
the batch.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vae_cli.axes.schedule import Schedule, as_schedule
from vae_cli.core.compatibility import Need
from vae_cli.core.values import NonNegative
from vae_cli.machine import distributed
from vae_cli.model.inference import Inference, over_samples

Weight = NonNegative | Schedule

GIVEN = Need("prior", "given", "this loss would not train the prior's parameters; type prior=standard_normal")


class Regularizer(nn.Module):
    """A regularizer: forward maps an Inference to the penalty (B,), in nats per image."""

    needs: ClassVar[tuple[Need, ...]] = ()


class KL(Regularizer):
    """beta * KL(q(z|x) || p(z)); for a point mass, beta * energy, with energy = -log p(loc).

    With beta = 1 the loss is the negative ELBO of Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014; with
    another beta it is the beta-VAE of Higgins et al., ICLR 2017.
    """

    def __init__(self, beta: Weight = 1.0) -> None:
        super().__init__()
        self.beta = as_schedule(beta)

    def forward(self, inference: Inference) -> Tensor:
        return self.beta() * inference.kl


class FreeBits(Regularizer):
    """beta * sum_j max(floor, mean over the batch of KL_j): only KL above the floor is penalized.

    floor is in nats per latent dimension. The mean over the batch is inside the maximum, so the penalty is the same for
    every image of a batch. Kingma et al., Improved Variational Inference with Inverse Autoregressive Flow, NeurIPS
    2016, appendix C.8.
    """

    needs = (
        Need("sigma", "noise", "the rate of a point mass is infinite, so a floor has no effect; type regularizer=kl"),
        Need("prior", "dimensions", "with this prior the rate is not a sum over dimensions; type regularizer=kl"),
    )

    def __init__(self, floor: Weight = 0.1, beta: Weight = 1.0) -> None:
        super().__init__()
        self.floor = as_schedule(floor)
        self.beta = as_schedule(beta)

    def forward(self, inference: Inference) -> Tensor:
        assert inference.rate_per_dimension is not None  # ensured by `needs`
        rates = distributed.mean(inference.rate_per_dimension, 0)
        return (self.beta() * torch.maximum(rates, self.floor()).sum()).expand(len(inference.x))


class Capacity(Regularizer):
    """gamma * |mean over the batch of KL - capacity|: steers the rate towards the capacity, in nats per image.

    The mean over the batch is inside the absolute value, so the penalty is the same for every image of a batch.
    Burgess et al., Understanding disentangling in beta-VAE, 2018.
    """

    needs = (Need("sigma", "noise", "the rate of a point mass is infinite and cannot be steered; type regularizer=kl"),)

    def __init__(self, capacity: Weight = 25.0, gamma: Weight = 10.0) -> None:
        super().__init__()
        self.capacity = as_schedule(capacity)
        self.gamma = as_schedule(gamma)

    def forward(self, inference: Inference) -> Tensor:
        return (self.gamma() * (distributed.mean(inference.kl) - self.capacity()).abs()).expand(len(inference.x))


class Energy(Regularizer):
    """beta * |z|^2 / 2, averaged over samples of z: an L2 penalty on the code.

    Unlike the KL divergence, it does not penalize small noise. RAE-L2 of Ghosh et al., From Variational to
    Deterministic Autoencoders, ICLR 2020.
    """

    needs = (GIVEN,)

    def __init__(self, beta: Weight = 1.0) -> None:
        super().__init__()
        self.beta = as_schedule(beta)

    def forward(self, inference: Inference) -> Tensor:
        return self.beta() * over_samples(inference.z.square().sum(-1) / 2)


class Nothing(Regularizer):
    """No penalty, 0 for every image: the loss is the distortion."""

    needs = (GIVEN,)

    def forward(self, inference: Inference) -> Tensor:
        return torch.zeros_like(inference.distortion)
