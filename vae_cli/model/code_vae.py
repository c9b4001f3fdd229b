"""A second VAE: a model of the codes of a first one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vae_cli.model.vae import VAE

DRAWS = 100  # for the importance-weighted bound on the density


class CodeVAE(nn.Module):
    """A model of codes (B, D): a VAE whose images are codes, with shape (D, 1, 1).

    Dai and Wipf, Diagnosing and Enhancing VAE Models, ICLR 2019. They give it as many latent dimensions as the codes
    have, and a Gaussian likelihood whose scale is learned.
    """

    def __init__(self, vae: VAE, latent: int) -> None:
        super().__init__()
        self.vae = vae
        self.latent = latent

    def loss(self, z: Tensor) -> Tensor:
        """Return the negative ELBO (B,) of codes z (B, D), in nats."""
        inference = self.vae(z[..., None, None])
        return inference.distortion + inference.kl

    @torch.no_grad()
    def draw(self, count: int, temperature: float = 1.0) -> Tensor:
        """Draw codes (count, D); temperature multiplies the standard deviations of prior and likelihood."""
        u = temperature * self.vae.prior().sample((count,))
        likelihood = self.vae.decode(u)
        codes: Tensor = torch.lerp(likelihood.mean, likelihood.sample(), temperature)
        return codes.flatten(1)

    @torch.no_grad()
    def log_prob(self, z: Tensor) -> Tensor:
        """Return a lower bound on ln p(z) (B,) in nats, for codes z (B, D): the importance-weighted bound with DRAWS
        draws. Burda et al., Importance Weighted Autoencoders, ICLR 2016."""
        posterior = self.vae.encode(z[..., None, None])
        weights = []
        for _ in range(DRAWS):
            u = posterior.rsample()
            seen = self.vae.decode(u).log_prob(z[..., None, None])
            weights.append(seen + self.vae.prior().log_prob(u) - posterior.log_prob(u))
        return torch.stack(weights).logsumexp(0) - math.log(DRAWS)
