"""The logarithm of the modified Bessel function of the second kind, for any order that is a multiple of 1/2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGE = 20.0  # an order from which three terms of the expansion for large orders are exact to 1e-6
TINY = 1e-30  # a smaller argument is replaced by it, so that no ratio overflows in float32


def log_bessel_k(order: float, x: Tensor) -> Tensor:
    """Return ln K_order(x), elementwise, for x > 0 and an order of 0, 1/2, 1, 3/2 ...

    Orders up to 20 follow from K_0 and K_1, or from K_1/2 = sqrt(pi / (2 x)) e^-x, by the recurrence

        rho_n = K_(n+1) / K_n = 1 / rho_(n-1) + 2 n / x

    which is stable upwards; its derivative is d ln K_n / dx = -1 / rho_(n-1) - n / x. Larger orders use the uniform
    asymptotic expansion. NIST Digital Library of Mathematical Functions, 10.29 and 10.41.

    >>> log_bessel_k(0.5, torch.tensor([2.0])), math.log(math.sqrt(math.pi / 4)) - 2
    (tensor([-2.1208]), -2.1207822376352454)
    """
    x = x.clamp_min(TINY)
    if order > LARGE:
        return _expansion(order, x)
    log_k: Tensor = LogBesselK.apply(x, order)
    return log_k


class LogBesselK(torch.autograd.Function):
    """ln K_order(x) by the recurrence of `log_bessel_k`. Its gradient cannot be differentiated again: torch's Bessel
    functions have no derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: float) -> Tensor:
        at = order % 1  # 0 or 1/2
        if at:
            log_k, before, ratio = math.log(math.pi / 2) / 2 - x.log() / 2 - x, torch.ones_like(x), 1 + 1 / x
        else:
            first, second = torch.special.scaled_modified_bessel_k0(x), torch.special.scaled_modified_bessel_k1(x)
            log_k, before, ratio = first.log() - x, first / second, second / first
        while at < order:  # before = K_at / K_(at-1), ratio = K_(at+1) / K_at
            at += 1
            log_k = log_k + ratio.log()
            before, ratio = ratio, 1 / ratio + 2 * at / x
        ctx.save_for_backward(-1 / before - order / x)
        return log_k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


def _expansion(order: float, x: Tensor) -> Tensor:
    """Return ln K_order(x) for a large order, with a relative error of K of less than 1e-6."""
    z = x / order
    root = (1 + z.square()).sqrt()
    p = 1 / root
    square = p.square()
    u1 = p * (3 - 5 * square) / 24
    u2 = square * (81 + square * (-462 + square * 385)) / 1152
    u3 = p * square * (30375 + square * (-369603 + square * (765765 - square * 425425))) / 414720
    correction = -u1 / order + u2 / order**2 - u3 / order**3
    eta = root + (z / (1 + root)).log()
    return math.log(math.pi / (2 * order)) / 2 - order * eta - root.log() / 2 + correction.log1p()
