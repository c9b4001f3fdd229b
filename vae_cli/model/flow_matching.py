"""Flow matching: a velocity field that carries Gaussian noise to codes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from vae_cli.model.kernels import Dense

FREQUENCIES = 8  # of the sines and cosines of time that the network sees
STEPS = 50  # of the solver, to draw codes or to compute a density

Solver = Literal["heun", "euler"]


class FlowMatching(nn.Module):
    """A model of codes (B, D): x_1 is a code if x_0 ~ N(0, I) and dx_t / dt = v(x_t, t) for t from 0 to 1.

    The velocity v is learned by regression on straight lines from noise e to codes z:

        loss = |v((1 - t) e + t z, t) - (z - e)|^2,  e ~ N(0, I), t uniform in (0, 1)
        v(x, t) = (2 t - 1) / (t^2 + (1 - t)^2) x + network(x, t)

    The first term is the velocity that carries N(0, I) to N(0, I), so the model starts as N(0, I): it is meant for
    standardized codes. Lipman et al., Flow Matching for Generative Modeling, ICLR 2023; Liu et al., Flow Straight and
    Fast, ICLR 2023.
    """

    def __init__(self, latent: int, hidden: int = 256, layers: int = 3) -> None:
        super().__init__()
        sizes = [latent + 2 * FREQUENCIES, *[hidden] * layers]
        self.latent = latent
        self.hidden = nn.Sequential(*(Dense(before, after) for before, after in pairwise(sizes)))
        self.last = Dense(hidden, latent)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Return v(x, t) (B, D) at points x (B, D) and times t (B, 1)."""
        h = torch.cat([x, _waves(t)], 1)
        for layer in self.hidden:
            h = nn.functional.silu(layer(h))
        linear: Tensor = self.last(h)
        return _slope(t) * x + linear

    def velocity_and_divergence(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return v(x, t) (B, D) and its exact divergence sum_j dv_j / dx_j (B,), without gradients."""
        with torch.no_grad():
            h = torch.cat([x, _waves(t)], 1)
            tangents: Tensor | None = None  # dh / dx, (B, D, units)
            for layer in self.hidden:
                h = layer(h)
                gate = h.sigmoid()
                slope = gate * (1 + h * (1 - gate))  # of silu
                weight: Tensor = layer.weight  # type: ignore[assignment]
                by_x = weight[:, : self.latent].T if tangents is None else tangents @ weight.T
                tangents = by_x * slope[:, None]
                h = h * gate
            assert tangents is not None
            trace = torch.einsum("bdh,dh->b", tangents, self.last.weight)
            return _slope(t) * x + self.last(h), trace + self.latent * _slope(t).squeeze(1)

    def loss(self, z: Tensor) -> Tensor:
        """Return the loss (B,) of codes z (B, D), with one draw of noise and time each."""
        noise, t = torch.randn_like(z), torch.rand(len(z), 1, device=z.device)
        return (self.velocity(torch.lerp(noise, z, t), t) - (z - noise)).square().sum(1)

    @torch.no_grad()
    def draw(self, count: int, temperature: float = 1.0, steps: int = STEPS, solver: Solver = "heun") -> Tensor:
        """Draw codes (count, D); temperature multiplies the noise x_0, steps is the number of steps from 0 to 1."""
        device = self.last.weight.device
        x = temperature * torch.randn(count, self.latent, device=device)
        for now, later in pairwise(torch.linspace(0, 1, steps + 1, device=device)):
            step = later - now
            v = self.velocity(x, now.expand(count, 1))
            if solver == "heun":
                v = (v + self.velocity(x + step * v, later.expand(count, 1))) / 2
            x = x + step * v
        return x

    @torch.no_grad()
    def log_prob(self, z: Tensor, steps: int = STEPS) -> Tensor:
        """Return ln p(z) (B,) in nats, for codes z (B, D): ln N(x_0; 0, I) - int_0^1 div v(x_t, t) dt.

        The path and the integral are computed with Heun's method, from z back to x_0, and with the exact divergence.
        Chen et al., Neural Ordinary Differential Equations, NeurIPS 2018.
        """
        x, change = z, torch.zeros(len(z), device=z.device)
        for now, later in pairwise(torch.linspace(1, 0, steps + 1, device=z.device)):
            step = later - now
            v, divergence = self.velocity_and_divergence(x, now.expand(len(z), 1))
            ahead, ahead_divergence = self.velocity_and_divergence(x + step * v, later.expand(len(z), 1))
            x = x + step * (v + ahead) / 2
            change = change + step * (divergence + ahead_divergence) / 2
        return change - x.square().sum(1) / 2 - self.latent * math.log(2 * math.pi) / 2


def _waves(t: Tensor) -> Tensor:
    angles = math.pi * t * torch.arange(1, FREQUENCIES + 1, device=t.device)
    return torch.cat([angles.sin(), angles.cos()], 1)


def _slope(t: Tensor) -> Tensor:
    return (2 * t - 1) / (t.square() + (1 - t).square())
