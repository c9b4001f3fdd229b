"""A critic that tells codes from codes whose dimensions were shuffled, and so estimates their total correlation."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_cli.machine import distributed
from vae_cli.model.inference import over_samples
from vae_cli.model.kernels import Dense, dense

SLOPE = 0.2  # of the leaky ReLU for negative numbers


class Critic(nn.Module):
    """z (*S, B, D) -> l(z) (*S, B), a fully connected network that learns ln q(z) - ln prod_j q(z_j), in nats.

    q(z) is the distribution of the codes of all images. sigmoid(l(z)) is the probability D(z) that z is a code, and not
    a draw of prod_j q(z_j), if both are equally likely; at the minimum of `loss` l is the log density ratio (Sugiyama
    et al., Density Ratio Estimation in Machine Learning, 2012). The hidden layers have leaky ReLU units, with He
    initialization; the last layer starts at 0, so that an untrained critic moves no code. Kim and Mnih, Disentangling
    by Factorising, ICML 2018, use two logits, whose difference is l.
    """

    def __init__(self, latent: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Dense(*sizes) for sizes in pairwise([latent, *[hidden] * layers, 1])])
        *inner, last = [layer for layer in self.layers if isinstance(layer, Dense)]
        for layer in inner:
            nn.init.kaiming_normal_(layer.weight, SLOPE)
        nn.init.zeros_(last.weight)
        for layer in (*inner, last):
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, frozen: bool = False) -> Tensor:
        """Return l(z). If frozen, its gradient does not reach the critic's parameters."""
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Dense)
            weight, bias = (layer.weight.detach(), layer.bias.detach()) if frozen else (layer.weight, layer.bias)
            z = dense(F.leaky_relu(z, SLOPE) if number else z, weight, bias)
        return z.squeeze(-1)

    def loss(self, z: Tensor) -> Tensor:
        """Return the cross-entropy (B,), in nats, of telling codes z (*S, B, D) from `shuffled` codes.

        For each image it is (-ln D(z) - ln(1 - D(shuffled z))) / 2, averaged over draws: ln 2 for a critic that cannot
        tell them apart. Its gradient reaches the critic's parameters only.
        """
        z = z.detach()
        real, fake = self(torch.cat([z, shuffled(z)])).chunk(2)
        return over_samples((F.softplus(-real) + F.softplus(fake)) / 2)


def shuffled(z: Tensor) -> Tensor:
    """Return codes z (*S, B, D) with each dimension shuffled over the B images: draws of prod_j q(z_j), detached.

    Every dimension has its own random order. If several processes share the batch, dimensions are shuffled over the
    whole batch, and each process gets its own rows.
    """
    codes = distributed.whole(z.detach().movedim(-2, 0))
    # torch.randperm cannot draw one order for each dimension. Sorting random numbers also works in a CUDA graph.
    order = torch.rand(codes.shape, device=codes.device).argsort(0)
    return distributed.own(codes.gather(0, order)).movedim(0, -2)
