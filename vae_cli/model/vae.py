"""The variational autoencoder, assembled from interchangeable parts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vae_cli.machine.device import computing_in
from vae_cli.model.inference import Inference


class VAE(nn.Module):
    """A variational autoencoder. Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014.

        features   = encoder(x)                 (B, C, H, W) -> (B, raw_size * D)
        posterior  = sigma(features)            q(z|x)
        z          = posterior.rsample()        (*S, B, D)
        likelihood = likelihood(decoder(z))     p(x|z)

    Sampling does not depend on `self.training`: noise is drawn in evaluation mode too. With precision "bfloat16" the
    networks run in bfloat16 and all distributions in float32.
    """

    def __init__(
        self,
        encoder: nn.Module,
        sigma: nn.Module,
        decoder: nn.Module,
        likelihood: nn.Module,
        prior: nn.Module,
        precision: Literal["float32", "tf32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.sigma = sigma
        self.decoder = decoder
        self.likelihood = likelihood
        self.prior = prior
        self.precision = precision

    def encode(self, x: Tensor) -> Distribution:
        """Return q(z|x), batch (B,) and event (D,), for images (B, C, H, W) returned by `likelihood.observe`."""
        posterior: Distribution = self.sigma(self.features(x))
        return posterior

    def features(self, x: Tensor) -> Tensor:
        """Return the encoder's output (B, raw_size * D), for images (B, C, H, W) returned by `likelihood.observe`."""
        with computing_in(self.precision, x.device.type):
            raw: Tensor = self.encoder(x).float()
        return raw

    def decode(self, z: Tensor) -> Distribution:
        """Return p(x|z), batch (*S, B) and event (C, H, W), for codes z (*S, B, D)."""
        likelihood: Distribution = self.likelihood(self._raw(z))
        return likelihood

    def _raw(self, z: Tensor) -> Tensor:
        with computing_in(self.precision, z.device.type):
            raw: Tensor = self.decoder(z if z.dim() == 2 else z.flatten(0, -2)).float()
        return raw if z.dim() == 2 else raw.unflatten(0, z.shape[:-1])

    def forward(self, x: Tensor, samples: tuple[int, ...] = ()) -> Inference:
        """Pass images (B, C, H, W) with values in [0, 1] through the model, with one draw of z per image.

        samples is the shape *S of the draws: (K,) gives K draws of z per image.
        """
        x = self.likelihood.observe(x)  # type: ignore[operator]
        posterior = self.encode(x)
        z = posterior.rsample(torch.Size(samples))
        raw = self._raw(z)
        if self.training:
            self.likelihood.fit(x, raw)  # type: ignore[operator]
        return Inference(x, posterior, z, self.prior(), self.likelihood(raw), decode=self.decode)
