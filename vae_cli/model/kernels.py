"""Fast paths through torch's private functions: matrix products by oneDNN, and a step of Adam in one kernel.

This is the only module that uses torch's private names, those with a leading underscore. If a name is missing or has
changed, slower public functions are used instead; their results are the same, up to rounding.

name                                        used by           gain                               without the name
torch.ops.mkldnn._linear_pointwise          Dense             half the time on AMD with AVX-512  nn.Linear
torch._C._are_functorch_transforms_active   Dense, Bernoulli  torch.func works on both           slower forms of both
torch._fused_adam_                          FusedAdam         half the time of a small update    Adam.step
__dynamo_disable                            without_compiler  most of a second at startup        slower startup

tests/test_quarantine_torch.py fails if a name is missing or its result differs from that of the public functions.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

WORTHWHILE = 4_000_000  # use oneDNN from this many multiplications; in a smaller product the cost of the call dominates


class Dense(nn.Linear):
    """x (B, in) -> x W^T + b (B, out): torch's Linear, with the same parameters and, up to rounding, the same result.

    torch computes float32 products with MKL, which uses AVX-512 on Intel processors only. oneDNN, which torch includes
    for convolutions, also uses AVX-512 on AMD processors, where it takes half the time of MKL.
    """

    def forward(self, x: Tensor) -> Tensor:
        return dense(x, self.weight, self.bias)  # reads the weight once: a parametrization computes it anew each time


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b (B, out), as Dense does, for x (B, in), W (out, in) and b (out,) or None."""
    if not torch.compiler.is_compiling() and onednn_is_faster() and _is_for_onednn(x, weight):
        product: Tensor = OneDNNLinear.apply(x, weight, bias)
        return product
    return torch.nn.functional.linear(x, weight, bias)


@cache
def onednn_is_faster() -> bool:
    """Return whether oneDNN is faster here than MKL, torch's default, which uses AVX-512 on Intel processors only."""
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    processor = platform.processor()
    with suppress(OSError):
        processor += Path("/proc/cpuinfo").read_text(errors="replace")[:1000]
    return "AuthenticAMD" in processor and has_onednn()


def has_onednn() -> bool:
    """Return whether this build of torch has oneDNN's matrix product, with the signature that we use."""
    try:
        one = torch.ones(1, 1, device="cpu")
        return torch.backends.mkldnn.is_available() and torch.equal(onednn_product(one, one), one)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dim() == 2
        and len(x) * weight.numel() >= WORTHWHILE
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not is_inside_torch_func()
    )


def is_inside_torch_func() -> bool:
    """Return whether this code runs inside a torch.func transform (jvp, vmap ...), which fast paths do not support."""
    try:
        return torch._C._are_functorch_transforms_active()
    except AttributeError:
        return True  # unknown, and the public functions work in both cases


class OneDNNLinear(torch.autograd.Function):
    """x W^T + b, computed by oneDNN, for float32 x (B, in), W (out, in) and b (out,) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        # With create_graph=True the gradient itself is differentiated, but onednn_product has no derivative.
        product = torch.nn.functional.linear if torch.is_grad_enabled() else onednn_product
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


def onednn_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a b^T + bias, computed by oneDNN, for a (B, in) and b (out, in). It cannot be differentiated."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return product


# The settings of a group of parameters, their first moments, their second moments, the step counts of all parameters in
# one tensor, and views of its elements.
Group = tuple[dict[str, Any], list[Tensor], list[Tensor], Tensor, list[Tensor]]


class FusedAdam:
    """The step of torch's Adam with fused=True, which calls the fused kernel directly on the optimizer's own state.

    torch's own step also runs hooks, groups the tensors by device, and converts types to increment the step counts.
    For a small network, this overhead takes as long as the kernel itself.

    On a GPU the learning rates are read from its memory, so that a step can be captured as a CUDA graph and replayed
    with another rate: `set_rates` copies them there, and is not part of the graph.
    """

    def __init__(self, groups: Sequence[Group], is_capturable: bool | None = None) -> None:
        self._groups = groups
        self._set = [float(group["lr"]) for group, *_ in groups]
        device = groups[0][3].device
        self.is_capturable = device.type == "cuda" if is_capturable is None else is_capturable
        self._rates = list(torch.tensor(self._set, device=device)) if self.is_capturable else None

    @classmethod
    def of(cls, optimizer: Optimizer) -> FusedAdam | None:
        """Return a FusedAdam that takes the same steps as `optimizer`.

        Return None if the optimizer is not a plain fused Adam, if the parameters of a group differ in device or dtype,
        or if a parameter has no gradient yet.
        """
        if type(optimizer) is not Adam or not has_fused_adam():
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
            taken = torch.zeros(len(states), dtype=torch.float32, device=parameters[0].device)
            views = list(taken.unbind())  # so that one operation increments the step counts of all parameters
            for parameter, state, steps in zip(parameters, states, views, strict=True):
                if state:
                    steps.copy_(state["step"])
                else:
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["step"] = steps
            means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            groups.append((group, means, squares, taken, views))
        return cls(groups)

    def set_rates(self) -> None:
        """Copy the groups' learning rates to the GPU if they have changed; the next steps use them."""
        if self._rates is None:
            return
        for number, (group, *_) in enumerate(self._groups):
            if group["lr"] != self._set[number]:
                self._set[number] = group["lr"]
                self._rates[number].fill_(group["lr"])

    @torch.no_grad()
    def step(self) -> bool:
        """Take a step and return True, or return False without taking one if a parameter has no gradient."""
        every = [[parameter.grad for parameter in group["params"]] for group, *_ in self._groups]
        if any(gradient is None for gradients in every for gradient in gradients):
            return False
        rates = self._rates or [group["lr"] for group, *_ in self._groups]
        for (group, means, squares, taken, views), gradients, rate in zip(self._groups, every, rates, strict=True):
            taken.add_(1)
            torch._fused_adam_(
                group["params"], gradients, means, squares, [], views, lr=rate, beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                maximize=group["maximize"],
            )  # fmt: skip
        return True


@cache
def has_fused_adam() -> bool:
    """Return whether this version of torch has the private function that FusedAdam calls, with the same signature."""
    try:
        parameter, mean, square = (torch.zeros(1, device="cpu") for _ in range(3))
        parameter.grad = torch.ones(1, device="cpu")
        settings = {"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-8, "maximize": False}
        group = {"params": [parameter], **settings}
        taken = torch.zeros(1, device="cpu")
        return FusedAdam([(group, [mean], [square], taken, [taken[0]])]).step()
    except (AttributeError, RuntimeError, TypeError):
        return False


DISABLE_ATTRIBUTE = "__dynamo_disable"  # the attribute in which torch stores a function's uncompiled form


@contextmanager
def without_compiler() -> Iterator[None]:
    """Let the `with` block create an optimizer, or read or load its state, without importing torch's compiler.

    torch marks the functions for this as not to be compiled. When one is first called, torch imports its compiler,
    which takes most of a second, only to look up the uncompiled function. This context stores the result of the lookup
    beforehand. That changes torch for the entire process until the block ends.
    """
    wrapped: list[Any] = [Optimizer.add_param_group, Optimizer.state_dict, Optimizer.load_state_dict]
    unmarked = [inner for inner in map(inspect.unwrap, wrapped) if not hasattr(inner, DISABLE_ATTRIBUTE)]
    for function in unmarked:
        setattr(function, DISABLE_ATTRIBUTE, function)
    try:
        yield
    finally:
        for function in unmarked:
            delattr(function, DISABLE_ATTRIBUTE)
