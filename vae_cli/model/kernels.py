"""Fully connected layers, whose matrix products are left to the quicker one of torch's two libraries."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORTHWHILE = 4_000_000  # multiplications in a product; in smaller ones the call itself decides


class Dense(nn.Linear):
    """x (B, in) -> x W^T + b (B, out): torch's Linear, with the same parameters and the same numbers but for rounding.

    torch leaves products in float32 to MKL, which uses AVX-512 on Intel's processors only. oneDNN, which torch has for
    convolutions, uses it on AMD's too, and there takes half of the time.
    """

    def forward(self, x: Tensor) -> Tensor:
        if _is_for_onednn(x, self.weight) and mkl_is_slow():
            product: Tensor = Product.apply(x, self.weight, self.bias)
            return product
        return super().forward(x)


@cache
def mkl_is_slow() -> bool:
    """Whether torch multiplies by MKL, and this processor has AVX-512 that MKL does not use."""
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    processor = platform.processor()
    with suppress(OSError):
        processor += Path("/proc/cpuinfo").read_text(errors="replace")[:1000]
    return "AuthenticAMD" in processor and _has_onednn()


def _has_onednn() -> bool:
    """Whether the product is there: its name begins with an underscore, so that another torch may not have it."""
    try:
        one = torch.ones(1, 1, device="cpu")
        return torch.backends.mkldnn.is_available() and torch.equal(_product(one, one), one)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether Product is made for this call: torch.func's jvp, vmap and the like take such a function in a slower form
    only."""
    return (
        not torch.compiler.is_compiling()
        and x.dim() == 2
        and len(x) * weight.numel() >= WORTHWHILE
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


class Product(torch.autograd.Function):
    """x W^T + b by oneDNN, for x (B, in), W (out, in) and b (out,) or none, float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        # What is differentiated twice has to be made of functions that can be.
        product = torch.nn.functional.linear if torch.is_grad_enabled() else _product
        to_x = product(gradient, weight.T) if ctx.needs_input_grad[0] else None
        to_weight = product(gradient.T, x.T) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, gradient.sum(0) if ctx.needs_input_grad[2] else None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = tangents
        tangent = torch.zeros(()) if of_bias is None else of_bias
        if of_x is not None:
            tangent = tangent + of_x @ weight.T
        return tangent if of_weight is None else tangent + x @ of_weight.T


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return product
