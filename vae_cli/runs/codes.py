"""Draw latent codes from a prior, a Gaussian or a mixture, interpolate between codes, and decode codes to images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from vae_cli.axes.dataset import Split
from vae_cli.machine.memory import refuse_oversize
from vae_cli.model.inference import Inference
from vae_cli.runs.mixture import fit_mixture
from vae_cli.runs.run import Run

FITTED = 10_000  # training codes used to fit a mixture; more would hardly change it
MIXTURE_COMPONENTS = 10  # as in Ghosh et al. (2020)
BATCH = 500  # images or codes per batch

Path = Literal["linear", "slerp", "norm-corrected"]


def prior_codes(run: Run, count: int, temperature: float = 1.0) -> Tensor:
    """Draw codes (count, D) from the prior. temperature multiplies their distance from the prior's mean."""
    with torch.no_grad():
        prior = run.model.prior()
        z: Tensor = prior.sample((count,))
        # The mean is left out where it is not needed, because some priors have to estimate it.
        return z if temperature == 1 else torch.lerp(prior.mean, z, temperature)


def training_codes(run: Run, most: int = FITTED) -> Tensor:
    """Draw a code from the posterior of each training image, for at most `most` images; return the codes (N, D)."""
    return torch.cat([inference.z for inference in inferences(run, run.splits.train, most)]).cpu()


def inferences(run: Run, split: Split, most: int) -> list[Inference]:
    """Run the model on at most `most` evenly spaced images of a split, and return an Inference for each batch."""
    split = split.to(run.device)
    chosen = torch.linspace(0, len(split) - 1, min(most, len(split))).long().to(run.device)
    with torch.no_grad():
        return [run.model(split.batch(positions)) for positions in chosen.split(BATCH)]


def decode(run: Run, z: Tensor, draw: bool = False) -> Tensor:
    """Decode codes (N, D) to images (N, C, H, W) on the CPU: the likelihood's mean, or a draw from it."""
    # Three float32 copies are in memory at once: the decoded batches, one tensor of all images, and its NumPy array.
    refuse_oversize(12 * len(z) * math.prod(run.shape), f"Decoding {len(z)} images", "ask for fewer")
    images = []
    for codes in z.split(BATCH):
        likelihood = run.decode(codes)
        images.append((likelihood.sample() if draw else likelihood.mean).cpu())
    return torch.cat(images)


def draw_codes(
    run: Run,
    source: str,
    count: int,
    temperature: float,
    components: int,
    seed: int,
    solver: Mapping[str, Any] = MappingProxyType({}),
) -> Tensor:
    """Draw codes (count, D) from the distribution that `source` names.

    source  `prior`, `aggregate` (one Gaussian fitted to training codes), `mixture` (`components` Gaussians fitted to
            training codes), or `flow` or `vae` (a second stage, which is trained on first use)
    solver  with `flow`, the settings `steps` and `solver` of FlowMatching.draw
    """
    if source == "prior":
        return prior_codes(run, count, temperature).cpu()
    if source in ("flow", "vae"):
        from vae_cli.runs.second_stage import second_stage

        stage = second_stage(run, "flow" if source == "flow" else "vae", print)
        return torch.cat(
            [stage.draw(len(some), temperature, **solver) for some in torch.arange(count).split(BATCH)]
        ).cpu()
    fitted = fit_mixture(training_codes(run), 1 if source == "aggregate" else components, seed)
    return fitted.draw(count, temperature)


def between(a: Tensor, b: Tensor, steps: int, path: Path) -> Tensor:
    """Return codes (steps, *, D) on a path from a to b, both of shape (*, D). The path includes a and b.

    linear          (1 - t) a + t b
    slerp           along the great circle between the directions of a and b; the norm changes linearly from |a| to |b|
    norm-corrected  the linear path, each point rescaled to the norm (1 - t) |a| + t |b|; the origin is not rescaled
    """
    t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device).reshape(steps, *[1] * a.dim())
    straight = torch.lerp(a, b, t)
    if path == "linear":
        return straight
    norm_a, norm_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    norm = torch.lerp(norm_a, norm_b, t)
    direction = straight
    if path == "slerp":
        unit_a, unit_b = a / norm_a.clamp_min(1e-12), b / norm_b.clamp_min(1e-12)
        angle = (unit_a * unit_b).sum(-1, keepdim=True).clamp(-1, 1).acos()
        # Rotate from a towards the component of b that is orthogonal to a. For opposite codes it is zero, and any
        # direction orthogonal to a is used. In one dimension, and for parallel codes, the path is linear.
        side = unit_b - (unit_a * unit_b).sum(-1, keepdim=True) * unit_a
        axis = torch.zeros_like(unit_a).scatter_(-1, unit_a.abs().argmin(-1, keepdim=True), 1.0)
        other = axis - (unit_a * axis).sum(-1, keepdim=True) * unit_a
        is_opposite = (side.norm(dim=-1, keepdim=True) < 1e-4) & (angle > 1)
        side = torch.where(is_opposite, other, side)
        length = side.norm(dim=-1, keepdim=True)
        turned = (t * angle).cos() * unit_a + (t * angle).sin() * side / length.clamp_min(1e-12)
        if a.shape[-1] == 1:
            return straight
        direction = torch.where(length > 1e-6, turned, straight)
    return direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-12) * norm
