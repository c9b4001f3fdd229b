"""Nearest neighbors, and two classifiers that predict labels from codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_cli.model.kernels import without_compiler
from vae_cli.model.scales import standardization

ROWS = 256  # rows of a distance matrix that are computed together
LINEAR_STEPS = 2000  # more than L-BFGS usually needs


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Return Euclidean distances (N, M) between a (N, D) and b (M, D). The distance between equal points is exactly 0,
    because no matrix product is used."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def nearest(points: Tensor, count: int, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the distances (M, count) from queries (M, D) to their nearest points, in ascending order, and the row
    indices of these points, int64 (M, count). If queries is None, each point is a query, and its neighbors do not
    include the point itself."""
    found = []
    for part in torch.arange(len(points if queries is None else queries), device=points.device).split(ROWS):
        matrix = distances((points if queries is None else queries)[part], points)
        if queries is None:
            matrix.scatter_(1, part[:, None], torch.inf)
        found.append(matrix.topk(count, largest=False))
    values, rows = zip(*found, strict=True)
    return torch.cat(values), torch.cat(rows)


def predict_by_neighbors(codes: Tensor, labels: Tensor, queries: Tensor, count: int) -> Tensor:
    """Return the most frequent label among each query's `count` nearest codes, (M,); ties go to the smallest label.

    codes is (N, D), labels (N,) and queries (M, D).
    """
    known, classes = labels.unique(return_inverse=True)
    votes = F.one_hot(classes[nearest(codes, count, queries)[1]], len(known)).sum(1)
    return known[votes.argmax(1)]


@torch.enable_grad()
def predict_linearly(codes: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Fit a logistic regression to codes (N, D) with labels (N,), and return its predictions for queries (M, D), (M,).

    Codes are standardized by the mean and standard deviation of each dimension. The weights W and the bias b minimize
    the convex loss sum_n -log softmax(W z_n + b)[label_n] + |W|^2 / 2; the optimizer is L-BFGS (Liu and Nocedal 1989).
    """
    known, classes = labels.unique(return_inverse=True)
    center, unit = standardization(codes)  # a constant dimension is 0, so its weights stay 0
    inputs = (codes - center) / unit
    layer = torch.nn.Linear(inputs.shape[1], len(known), device=codes.device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    with without_compiler():
        optimizer = torch.optim.LBFGS(
            layer.parameters(), max_iter=LINEAR_STEPS, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
        )

    def loss() -> Tensor:
        layer.zero_grad()
        penalty = layer.weight.square().sum() / (2 * len(inputs))
        value = F.cross_entropy(layer(inputs), classes) + penalty
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return known[layer((queries - center) / unit).argmax(1)]
