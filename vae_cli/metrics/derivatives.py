"""Derivatives of a function of codes: norms of its Jacobian, and the variance of codes after its linearization."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_DIRECTIONS = 256  # in which a function is differentiated; with more dimensions, some directions stand for all
POWER_TOLERANCE = 1e-5  # relative change of a singular value at which the power iteration ends
POWER_ITERATIONS = 200
PIXELS_DIFFERENTIATED = 1 << 17  # pixels in one batch: the autograd graph stores many numbers for each


class Derivative:
    """The derivative of a function at each of the codes z (B, D), as products with the Jacobian J: J v and J^T w.

    J v is the derivative of v . J^T w with respect to w, so reverse-mode differentiation gives both products.
    Forward-mode differentiation would import torch's compiler; the import alone takes longer than a quick evaluation.
    Gradients of a non-scalar function would import sympy, which takes half a second.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], z: Tensor) -> None:
        with torch.enable_grad():
            self._z = z.detach().requires_grad_()
            self._value = function(self._z)
            self._w = torch.zeros_like(self._value, requires_grad=True)
            (self._pulled,) = torch.autograd.grad((self._value * self._w).sum(), self._z, create_graph=True)

    def push(self, v: Tensor) -> Tensor:
        """Return J v (B, C, H, W) for directions v (B, D)."""
        with torch.enable_grad():
            return torch.autograd.grad((self._pulled * v).sum(), self._w, retain_graph=True)[0]

    def pull(self, w: Tensor) -> Tensor:
        """Return J^T w (B, D) for images w (B, C, H, W)."""
        with torch.enable_grad():
            return torch.autograd.grad((self._value * w).sum(), self._z, retain_graph=True)[0]


def frobenius_norm(function: Callable[[Tensor], Tensor], z: Tensor, unit: Tensor) -> Tensor:
    """Return |J U|_F at each of the codes z (B, D), float64 (B,), with J = d function(z) / dz and U the
    diagonal matrix of the unit (D,): J U is the Jacobian with respect to z / unit.

    The result is exact for up to R = MAX_DIRECTIONS dimensions: each column of J takes one product. With more
    dimensions, the norm is estimated as the root of the mean of |J v|^2 over R random sign vectors v (Hutchinson 1990).
    That mean is unbiased with a relative standard deviation of at most sqrt(2 / R). The relative standard deviation of
    the norm is therefore at most 1 / sqrt(2 R), or 4.4 %, and the norm is biased low by at most 0.1 %.
    """
    jacobian, dimensions = Derivative(function, z), z.shape[1]
    exact = dimensions <= MAX_DIRECTIONS
    total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for direction in range(min(dimensions, MAX_DIRECTIONS)):
        if exact:
            tangent = torch.zeros_like(z)
            tangent[:, direction] = 1
        else:
            tangent = torch.randint_like(z, 2) * 2 - 1
        total += jacobian.push(unit * tangent).flatten(1).double().square().sum(1)
    return (total if exact else total / MAX_DIRECTIONS).sqrt()


def variance_after_linear_maps(
    function: Callable[[Tensor], Tensor], places: Tensor, codes: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the variance of codes (N, D) after the linear maps J_p = d function(z_p) / dz at the places z (P, D), as
    two float64 tensors with the same mean: the variance after each map, (P,), and the part of each code in it, (N,).

    With c_n the deviation of a code from the mean code, they are the means of |J_p c_n|^2 over the codes, which is
    tr(J_p Cov(z) J_p^T), and over the places. Beyond R = MAX_DIRECTIONS dimensions, only the first R codes are used,
    and the second tensor has the shape (R,).
    """
    deviations = codes.double() - codes.double().mean(0)
    exact = codes.shape[1] <= MAX_DIRECTIONS
    if exact:
        directions = torch.eye(codes.shape[1], dtype=codes.dtype, device=codes.device)
    else:
        deviations = deviations[:MAX_DIRECTIONS]
        directions = deviations.to(codes.dtype)
    after, of_codes = [], torch.zeros(len(deviations), dtype=torch.float64, device=codes.device)
    pixels = function(places[:1]).numel()
    for z in places.split(max(1, PIXELS_DIFFERENTIATED // pixels)):
        jacobian = Derivative(function, z)
        pushed = [jacobian.push(direction.expand_as(z)).flatten(1).double() for direction in directions]
        if exact:
            columns = torch.stack(pushed, 1)
            products = columns @ columns.mT  # J^T J, (B, D, D)
            covariance = deviations.T @ deviations / len(deviations)
            after.append((products * covariance).sum((1, 2)))
            of_codes += (deviations @ products.sum(0) * deviations).sum(1)
        else:
            squares = torch.stack([images.square().sum(1) for images in pushed])  # (R, B)
            after.append(squares.mean(0))
            of_codes += squares.sum(1)
    return torch.cat(after), of_codes / len(places)


def largest_singular_value(function: Callable[[Tensor], Tensor], z: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest singular values (B,) of J = d function(z) / d (z / unit) at codes z (B, D), and whether each
    has converged, bool (B,).

    Power iteration v <- J^T J v / |J^T J v| from a random start, until the relative change of |J v| is below
    POWER_TOLERANCE, for at most POWER_ITERATIONS. |J v| approaches the largest singular value from below. If the second
    largest is close to it, the result lies between the two.
    """
    value = torch.zeros(len(z), device=z.device)
    left = torch.arange(len(z), device=z.device)  # codes that have not converged
    jacobian = Derivative(function, z)
    v = torch.randn_like(z)
    for _ in range(POWER_ITERATIONS):
        v = v / v.norm(dim=1, keepdim=True).clamp_min(1e-30)
        pushed = jacobian.push(unit * v)
        norm = pushed.flatten(1).norm(dim=1)
        moves = (norm - value[left]).abs() > POWER_TOLERANCE * norm
        value[left] = norm
        left = left[moves]
        if not len(left):
            break
        if not moves.all():
            jacobian = Derivative(function, z[left])
        # Pull back normalized images, so that small derivatives do not underflow when they are squared.
        v = unit * jacobian.pull(pushed[moves] / norm[moves].reshape(-1, 1, 1, 1))
    return value, torch.ones_like(value, dtype=torch.bool).index_fill(0, left, False)
