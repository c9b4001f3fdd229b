"""Fully connected layers, whose matrix products are left to the quicker one of torch's two libraries."""

from __future__ import annotations

import inspect
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

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


class FusedAdam:
    """A step of torch's Adam with fused=true, on its own state: the one kernel, and nothing else.

    What torch does around it (hooks, sorting by device, counting each tensor's steps by a number of another type) takes
    as long as the kernel where a network is small, and imports a compiler the first time, which takes most of a second.
    """

    def __init__(self, groups: list[tuple[dict[str, Any], tuple[list[Tensor], ...]]]) -> None:
        self._groups = groups

    @classmethod
    def of(cls, optimizer: Optimizer) -> FusedAdam | None:
        """The same step as this optimizer's; None where that does, or may do, anything else, or a parameter that learns
        has no gradient yet."""
        if type(optimizer) is not Adam or not hasattr(torch, "_fused_adam_"):
            return None
        others = ("amsgrad", "differentiable", "capturable", "decoupled_weight_decay")
        groups = []
        for group in optimizer.param_groups:
            if not group["fused"] or any(map(group.get, others)):
                return None
            parameters = group["params"]
            kinds = {(parameter.device, parameter.dtype) for parameter in parameters}
            if len(kinds) > 1 or any(parameter.grad is None for parameter in parameters):
                return None
            states = [optimizer.state[parameter] for parameter in parameters]
            for parameter, state in zip(parameters, states, strict=True):
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            held = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
            groups.append((group, tuple(held)))
        return cls(groups)

    @torch.no_grad()
    def step(self) -> bool:
        """Take a step, or none and say so where a parameter has no gradient."""
        every = [[parameter.grad for parameter in group["params"]] for group, _ in self._groups]
        if any(gradient is None for gradients in every for gradient in gradients):
            return False
        for (group, (means, squares, steps)), gradients in zip(self._groups, every, strict=True):
            torch._foreach_add_(steps, torch.ones_like(steps[0]))
            torch._fused_adam_(
                group["params"], gradients, means, squares, [], steps, lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                maximize=group["maximize"],
            )  # fmt: skip
        return True


def _spare_the_compiler() -> None:
    """Tell torch what to call for these functions: themselves. Else, to ask its compiler for the same, it imports that
    when an optimizer is made, which takes most of a second."""
    for function in (Optimizer.add_param_group, Optimizer.state_dict, Optimizer.load_state_dict):
        inner: Any = inspect.unwrap(function)
        inner.__dynamo_disable = inner


_spare_the_compiler()
