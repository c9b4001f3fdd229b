"""The KL divergence between diagonal normals, whose gradient takes a few operations instead of a dozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vae_cli.model.kernels import is_inside_torch_func


def normal_kl_parts(distance: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return the location part and the scale part of KL(N(m, s^2) || N(a, t^2)) in each dimension, in nats, (B, D).

        d^2 / 2   and   (r - 1 - ln r) / 2,   with distance d = (m - a) / t and ratio r = s^2 / t^2

    distance is (B, D); log_ratio = ln(s / t) broadcasts to it.
    """
    of_location, of_scale = _twice_parts(distance, log_ratio, torch.expm1(2 * log_ratio))
    return of_location / 2, of_scale.expand_as(distance) / 2


def normal_kl(distance: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(N(m, s^2) || N(a, t^2)) and its location part, both summed over dimensions, in nats (B,).

    The arguments are those of `normal_kl_parts`. The location part has no gradient.
    """
    # A scale that is not learned has no gradient, and the rest of the gradient is as fast without NormalKL.
    if not log_ratio.requires_grad or torch.compiler.is_compiling() or is_inside_torch_func():
        kl, of_locations = _sums(distance, log_ratio, torch.expm1(2 * log_ratio))
        return kl, of_locations.detach()
    both: tuple[Tensor, Tensor] = NormalKL.apply(distance, log_ratio)
    return both


class NormalKL(torch.autograd.Function):
    """`normal_kl` for a learned scale. In training, operations on codes take about as long as calling them.

    The gradient is d with respect to the distance, and r - 1 with respect to ln(s / t). Neither torch.func nor
    torch.compile is supported.
    """

    @staticmethod
    def forward(ctx: Any, distance: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        excess = torch.expm1(2 * log_ratio)
        ctx.save_for_backward(distance, log_ratio, excess)
        ctx.save_for_forward(distance, log_ratio)
        kl, of_locations = _sums(distance, log_ratio, excess)
        ctx.mark_non_differentiable(of_locations)
        return kl, of_locations

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor]:
        distance, log_ratio, excess = ctx.saved_tensors
        by_image = gradients[0].unsqueeze(-1)
        if torch.is_grad_enabled():  # the gradient itself is differentiated, so it must depend on the scale
            excess = torch.expm1(2 * log_ratio)
        to_distance = distance * by_image if ctx.needs_input_grad[0] else None
        return to_distance, (excess.expand_as(distance) * by_image).sum_to_size(log_ratio.shape)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        distance, log_ratio = ctx.saved_tensors
        of_distance, of_log_ratio = tangents
        along = torch.zeros_like(distance) if of_distance is None else distance * of_distance
        if of_log_ratio is not None:
            along = along + torch.expm1(2 * log_ratio) * of_log_ratio
        return along.sum(-1), None


def _twice_parts(distance: Tensor, log_ratio: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """Return both parts in each dimension, times 2, from excess = r - 1; the scale part broadcasts to (B, D)."""
    return distance.square(), torch.sub(excess, log_ratio, alpha=2)


def _sums(distance: Tensor, log_ratio: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """Return the KL divergence and its location part, (B,) each; halving sums is cheaper than halving every element."""
    of_location, of_scale = _twice_parts(distance, log_ratio, excess)
    location = of_location.sum(-1)
    return (location + of_scale.expand_as(distance).sum(-1)) / 2, location / 2
