"""The variational auto-encoder: it holds the parts and knows none of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from vae_cli.model.inference import Inference


class VAE(nn.Module):
    """features = encoder(x), q(z|x) = sigma(features), z ~ q(z|x), p(x|z) = likelihood(decoder(z)).

    Kingma and Welling, Auto-Encoding Variational Bayes, 2014. What is random is random in evaluation too: nothing here
    that draws a number asks whether the model is in training.
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

    def _autocast(self, x: Tensor) -> AbstractContextManager[object]:
        return torch.autocast(x.device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()

    def encode(self, x: Tensor) -> Distribution:
        """q(z|x), batch (B,) and event (D,), from what the likelihood observes of images, (B, C, H, W)."""
        with self._autocast(x):
            raw = self.encoder(x)
        posterior: Distribution = self.sigma(raw.float())
        return posterior

    def decode(self, z: Tensor) -> Distribution:
        """p(x|z), batch (*S, B) and event (C, H, W), from codes (*S, B, D)."""
        likelihood: Distribution = self.likelihood(self._raw(z))
        return likelihood

    def _raw(self, z: Tensor) -> Tensor:
        with self._autocast(z):
            raw: Tensor = self.decoder(z if z.dim() == 2 else z.flatten(0, -2)).float()
        return raw if z.dim() == 2 else raw.unflatten(0, z.shape[:-1])

    def forward(self, x: Tensor, samples: tuple[int, ...] = ()) -> Inference:
        """Pass images (B, C, H, W) through the model once, or with so many draws of z for each."""
        x = self.likelihood.observe(x)  # type: ignore[operator]
        posterior = self.encode(x)
        z = posterior.rsample(torch.Size(samples))
        raw = self._raw(z)
        if self.training:
            self.likelihood.fit(x, raw)  # type: ignore[operator]
        return Inference(x, posterior, z, self.prior(), self.likelihood(raw))
