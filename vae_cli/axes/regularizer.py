"""What the code costs: all choices of the axis `regularizer`, each a function Inference -> penalty (B,) in nats."""

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

GIVEN = Need("prior", "given", "what the prior could learn has no part in this loss; type prior=standard_normal")


class Regularizer(nn.Module):
    """The term that is added to the distortion: loss = mean(distortion + penalty)."""

    needs: ClassVar[tuple[Need, ...]] = ()


class KL(Regularizer):
    """beta * KL(q(z|x) || p(z)); for a point mass the energy -log p(loc) stands for the KL.

    With beta = 1 the loss is the negative ELBO. Kingma and Welling 2014; beta as in Higgins et al. 2017.
    """

    def __init__(self, beta: Weight = 1.0) -> None:
        super().__init__()
        self.beta = as_schedule(beta)

    def forward(self, inference: Inference) -> Tensor:
        return self.beta() * inference.kl


class FreeBits(Regularizer):
    """beta * sum_j max(floor, mean over the batch of KL_j): a dimension pays only for what exceeds the floor.

    The mean over the batch stands inside the maximum, so the penalty is the same number for every image of a batch.
    floor is in nats per latent dimension. Kingma et al., Improved Variational Inference with IAF, 2016, appendix C.8.
    """

    needs = (
        Need(
            "sigma", "noise", "the rate of a point mass is infinite, so that no floor can be kept; type regularizer=kl"
        ),
        Need("prior", "dimensions", "under this prior the rate does not split into those of the latent dimensions"),
    )

    def __init__(self, floor: Weight = 0.1, beta: Weight = 1.0) -> None:
        super().__init__()
        self.floor = as_schedule(floor)
        self.beta = as_schedule(beta)

    def forward(self, inference: Inference) -> Tensor:
        assert inference.rate_per_dimension is not None  # what `needs` has made sure of
        rates = distributed.mean(inference.rate_per_dimension, 0)
        return (self.beta() * torch.maximum(rates, self.floor()).sum()).expand(len(inference.x))


class Capacity(Regularizer):
    """gamma * |mean over the batch of KL - capacity|: steers the rate to a target in nats per image.

    The mean over the batch stands inside the absolute value, so the penalty is the same number for every image of a
    batch. Burgess et al., Understanding disentangling in beta-VAE, 2018.
    """

    needs = (Need("sigma", "noise", "the rate of a point mass is infinite and cannot be steered; type regularizer=kl"),)

    def __init__(self, capacity: Weight = 25.0, gamma: Weight = 10.0) -> None:
        super().__init__()
        self.capacity = as_schedule(capacity)
        self.gamma = as_schedule(gamma)

    def forward(self, inference: Inference) -> Tensor:
        return (self.gamma() * (distributed.mean(inference.kl) - self.capacity()).abs()).expand(len(inference.x))


class Energy(Regularizer):
    """beta * |z|^2 / 2, averaged over the draws of z: a price on the code, none on how small the noise is.

    RAE-L2 of Ghosh et al., From Variational to Deterministic Autoencoders, 2020.
    """

    needs = (GIVEN,)

    def __init__(self, beta: Weight = 1.0) -> None:
        super().__init__()
        self.beta = as_schedule(beta)

    def forward(self, inference: Inference) -> Tensor:
        return self.beta() * over_samples(inference.z.square().sum(-1) / 2)


class Nothing(Regularizer):
    """No price: the loss is the distortion."""

    needs = (GIVEN,)

    def forward(self, inference: Inference) -> Tensor:
        return torch.zeros_like(inference.distortion)
