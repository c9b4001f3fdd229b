"""The decoder of codes from a file: a user's own function from codes to images."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vae_cli.core.errors import UserError, first_line
from vae_cli.metrics.derivatives import Derivative

Decode = Callable[[Tensor], Any]

DECODED_PIXELS = 1 << 21  # of the images that one call decodes
CHECKED = 8  # codes that are decoded to check the function
FAR, FEW = 0.25, 0.05  # at most this share of the checked pixels may be further than FAR outside [0, 1]


class GivenDecoder(nn.Module):
    """A decoder that calls a function: codes z (B, D), or (B, C, h, w) if `code` is such a shape, to images in [0, 1].

    The function gets codes on the device of the evaluation, and may return images on any device. Exact bounds are not
    enforced, because a decoder without an output activation exceeds them a little.
    """

    def __init__(self, name: str, function: Decode, code: tuple[int, ...], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.name, self.function, self.code, self.shape = name, function, code, shape
        self.is_differentiable = True

    def forward(self, z: Tensor) -> Tensor:
        """Decode codes (B, D) to images (B, C, H, W), a few at a time. Raises UserError if the function fails."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_differentiable), _second_derivatives():
            parts = z.split(max(1, DECODED_PIXELS // math.prod(self.shape)))
            return torch.cat([self._call(part) for part in parts])

    def _call(self, z: Tensor) -> Tensor:
        try:
            images = self.function(z.unflatten(1, self.code))
        except Exception as error:  # the function is the user's own
            raise UserError(
                f"--decoder {self.name} fails for codes of the shape {(len(z), *self.code)}: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
        wanted = (len(z), *self.shape)
        if not isinstance(images, Tensor):
            raise UserError(
                f"--decoder {self.name} returns {type(images).__name__}, but must return images as a tensor of the "
                f"shape {wanted}."
            )
        if images.shape != wanted or not images.is_floating_point():
            raise UserError(
                f"--decoder {self.name} returns {images.dtype} of the shape {tuple(images.shape)}, but must return "
                f"floats in [0, 1] of the shape of the images, {wanted}."
            )
        return images.to(z.device, torch.float32)

    @torch.no_grad()
    def check(self, z: Tensor) -> None:
        """Decode some of the codes z (N, D), and find out whether the function can be differentiated twice.

        Raises UserError if it fails, or if its images are not finite or not in [0, 1].
        """
        images = self(z[:CHECKED])
        if not bool(images.isfinite().all()):
            raise UserError(f"--decoder {self.name} returns values that are not finite (NaN or infinity).")
        if float(((images < -FAR) | (images > 1 + FAR)).float().mean()) > FEW:
            least, most = float(images.min()), float(images.max())
            raise UserError(
                f"--decoder {self.name} returns values from {least:.3g} to {most:.3g}, but must return images in "
                "[0, 1]: for values from -1 to 1, return (x + 1) / 2."
            )
        try:
            Derivative(self, z[:1]).push(torch.ones_like(z[:1]))
        except RuntimeError:  # no gradient, or an operation whose gradient torch cannot differentiate
            self.is_differentiable = False


def _second_derivatives() -> AbstractContextManager[object]:
    """Return a context in which the gradient of torch's attention can be differentiated, if gradients are recorded.

    The Jacobian of the decoder needs it, and torch's faster kernels of scaled_dot_product_attention do not support it.
    """
    if not torch.is_grad_enabled():
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
