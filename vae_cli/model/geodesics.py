"""Geodesics of the decoder: the shortest paths between codes, if length is measured between decoded images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vae_cli.model.kernels import without_compiler

SEGMENTS = 32  # of the path whose energy is minimized; with 128, lengths on the digits are 0.1 to 0.3 % smaller
PIECES = 8  # of each segment, between which images are decoded to measure a length
ROUND = 20  # iterations of L-BFGS between two checks of the energy
ROUNDS = 50  # at most
TOLERANCE = 1e-4  # relative decrease of the energy in a round, below which the path has converged
METRIC_DIMENSIONS = 256  # with more latent dimensions, the metric would take longer than the iterations it saves
METRIC_POINTS = 5  # of the straight line, over which the metric is averaged
DAMPING = 1e-2  # of the metric, relative to its mean eigenvalue: dimensions that the decoder ignores do not blow up
AT_ONCE = 64  # codes decoded at a time where no gradient is needed

Decode = Callable[[Tensor], Tensor]


class Paths(NamedTuple):
    """P paths between codes, as codes (P, steps, D) that are evenly spaced by length, and the lengths (P,), float64.

    The length of a path is the sum of Euclidean distances between consecutive decoded images.
    """

    z: Tensor
    length: Tensor


class Geodesics(NamedTuple):
    """The geodesics between P pairs of codes, and what to compare them with.

    shortest  the geodesics; they are never longer than the straight lines
    straight  the straight lines
    distance  (P,) float64, the distance between the decoded ends, which no path undercuts
    reached   (P,) bool, whether the search for the geodesic converged
    """

    shortest: Paths
    straight: Paths
    distance: Tensor
    reached: Tensor


def geodesics(decode: Decode, a: Tensor, b: Tensor, steps: int) -> Geodesics:
    """Find the geodesic between each pair of codes, a and b (P, D), under the decoder's pullback metric J^T J.

    decode maps codes (B, D) to images (B, C, H, W). A geodesic minimizes the energy of the decoded path,

        E(z_1 ... z_{n-1}) = n sum_i |g(z_{i+1}) - g(z_i)|^2,  z_0 = a, z_n = b,

    which is at least the squared length, and equal to it if the speed is constant. Arvanitidis et al., Latent Space
    Oddity, ICLR 2018; Shao et al., The Riemannian Geometry of Deep Generative Models, CVPR Workshops 2018.

    L-BFGS starts from the straight line at constant speed and ends when ROUND iterations decrease E by less than a
    share of TOLERANCE, or after ROUNDS * ROUND iterations. It finds a local minimum: a shorter path that is far away
    from the straight line is not found. No random number is drawn, and each pair is treated alone.
    """
    found = [_geodesic(decode, *pair, steps) for pair in zip(a, b, strict=True)]
    shortest, straight, distance, reached = zip(*found, strict=True)
    return Geodesics(_stacked(shortest), _stacked(straight), torch.stack(distance), torch.tensor(reached))


def _stacked(paths: tuple[Paths, ...]) -> Paths:
    return Paths(torch.stack([path.z for path in paths]), torch.stack([path.length for path in paths]))


def _geodesic(decode: Decode, a: Tensor, b: Tensor, steps: int) -> tuple[Paths, Paths, Tensor, bool]:
    ends = torch.stack([a, b])
    straight = evenly_spaced(decode, ends, steps, SEGMENTS * PIECES)
    start = evenly_spaced(decode, ends, SEGMENTS + 1, SEGMENTS * PIECES)
    distance = _lengths(decode, ends)[0]
    if float(start.length) <= float(distance) * (1 + 1e-9):  # no path is shorter; it may also be 0
        return straight, straight, distance, True
    nodes, reached = _least_energy(decode, start)
    shortest = evenly_spaced(decode, nodes, steps, PIECES)
    return (shortest if shortest.length <= straight.length else straight), straight, distance, reached


def evenly_spaced(decode: Decode, nodes: Tensor, steps: int, pieces: int) -> Paths:
    """Return `steps` codes, evenly spaced by length, on the polygon with these nodes (N, D), as one path.

    The length is measured between images that are decoded at the ends of `pieces` parts of each side. If it is 0, the
    codes are evenly spaced by number of side instead.
    """
    sides = len(nodes) - 1
    at = torch.linspace(0, sides, sides * pieces + 1, dtype=torch.float64)
    fine = _on_polygon(nodes, at)
    parts = _lengths(decode, fine)
    travelled = torch.cat([parts.new_zeros(1), parts.cumsum(0)])
    length = travelled[-1].clone()
    if not float(length) > 0:
        travelled = at
    wanted = torch.linspace(0, 1, steps, dtype=torch.float64) * travelled[-1]
    right = torch.searchsorted(travelled, wanted).clamp(1, len(travelled) - 1)
    before, after = travelled[right - 1], travelled[right]
    z = _on_polygon(fine, right - 1 + ((wanted - before) / (after - before).clamp_min(1e-300)).clamp(0, 1))
    z[0], z[-1] = nodes[0], nodes[-1]
    return Paths(z, length)


def _on_polygon(nodes: Tensor, at: Tensor) -> Tensor:
    """Return the codes (M, D) at these places (M,) of a polygon with nodes (N, D): 0 is the first, N - 1 the last."""
    left = at.long().clamp(0, len(nodes) - 2)
    share = (at - left).to(nodes.device, nodes.dtype).unsqueeze(1)
    left = left.to(nodes.device)
    return torch.lerp(nodes[left], nodes[left + 1], share)


def _images(decode: Decode, z: Tensor) -> Tensor:
    """Decode codes (B, D) to (B, C * H * W), float64 on the CPU (other devices may lack it), without gradients."""
    with torch.no_grad():
        return torch.cat([decode(codes).flatten(1).cpu().double() for codes in z.split(AT_ONCE)])


def _lengths(decode: Decode, z: Tensor) -> Tensor:
    """Return the distances between consecutive decoded codes, float64 (B - 1,) for z (B, D)."""
    return _images(decode, z).diff(dim=0).norm(dim=1)


def _least_energy(decode: Decode, start: Paths) -> tuple[Tensor, bool]:
    """Return the nodes (SEGMENTS + 1, D) of the path with the least energy, and whether the search converged.

    The energy is quadratic for a linear decoder; its Hessian is then the Kronecker product of the second difference
    along the path and the metric J^T J. The nodes are therefore z = start + S c M^(-1/2), with S the scaled sines that
    turn the second difference into the identity, and M the metric, averaged over the start. L-BFGS minimizes over c,
    where the Hessian of a nearly linear decoder is close to a multiple of the identity.
    """
    nodes, scale = start.z, float(start.length)
    sines, across = _sines(SEGMENTS).to(nodes), scale / SEGMENTS**0.5 * _inverse_root_of_metric(decode, nodes).to(nodes)
    c = torch.zeros_like(nodes[1:-1]).requires_grad_()

    def path() -> Tensor:
        return torch.cat([nodes[:1], nodes[1:-1] + sines @ c @ across, nodes[-1:]])

    def energy() -> Tensor:  # relative to the square of the starting length
        return SEGMENTS * (decode(path()).flatten(1).diff(dim=0) / scale).square().sum()

    def with_gradient() -> Tensor:
        with torch.enable_grad():
            found = energy()
            (c.grad,) = torch.autograd.grad(found, c)
        return found.detach()

    with without_compiler():
        optimizer = torch.optim.LBFGS(
            [c],
            max_iter=ROUND,
            tolerance_grad=1e-6,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
    with torch.no_grad():
        least, best = float(energy()), path()
        for _ in range(ROUNDS):
            optimizer.step(with_gradient)
            found = float(energy())
            is_better, has_converged = found < least, not found < least * (1 - TOLERANCE)
            if is_better:
                least, best = found, path()
            if has_converged:
                return best, True
    return best, False


def _sines(segments: int) -> Tensor:
    """Return S (n - 1, n - 1) such that S^T L S = I, with L the second difference (-1, 2, -1) between fixed ends.

    Column k is the eigenvector sqrt(2 / n) sin(pi i k / n) of L, divided by the root of its eigenvalue,
    2 sin(pi k / 2n).
    """
    number = torch.arange(1, segments, dtype=torch.float64)
    vectors = math.sqrt(2 / segments) * torch.sin(math.pi / segments * torch.outer(number, number))
    return vectors / (2 * torch.sin(math.pi / (2 * segments) * number))


def _inverse_root_of_metric(decode: Decode, nodes: Tensor) -> Tensor:
    """Return W (D, D) with W M W^T = I, up to damping, float64 on the CPU; M is J^T J, averaged over a few nodes.

    It only speeds up the search, so differences of decoded images replace the derivatives. With more than
    METRIC_DIMENSIONS dimensions, a multiple of the identity takes the place of M.
    """
    dimensions, ends = nodes.shape[1], nodes[[0, -1]]
    identity = torch.eye(dimensions, dtype=torch.float64)
    if dimensions > METRIC_DIMENSIONS:
        return float((ends[1] - ends[0]).norm() / max(float(_lengths(decode, ends)[0]), 1e-12)) * identity
    if torch.equal(ends[0], ends[1]):  # equal codes, so that the path is a point
        return identity
    step = 1e-2 * float((ends[1] - ends[0]).norm()) / dimensions**0.5
    offsets = step * identity.to(nodes)
    metric = torch.zeros_like(identity)
    for place in torch.linspace(0, len(nodes) - 1, METRIC_POINTS).long().tolist():
        change = _images(decode, nodes[place] + offsets) - _images(decode, nodes[place] - offsets)
        jacobian = change / (2 * step)  # (D, C * H * W): its transpose
        metric += jacobian @ jacobian.T / METRIC_POINTS
    metric += max(DAMPING * float(metric.trace()) / dimensions, 1e-12) * identity
    return torch.linalg.solve_triangular(torch.linalg.cholesky(metric), identity, upper=False)
