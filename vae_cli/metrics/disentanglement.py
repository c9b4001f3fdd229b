"""How codes depend on known factors of variation: the computations behind the metrics in `factors`.

D is the number of latent dimensions, K the number of factors, N the number of images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vae_cli.axes.dataset import Factor

CODE_BINS = 20  # of each latent dimension, for its mutual information with a factor
FACTOR_BINS = 10  # of a factor that is continuous or circular
TREES = 10  # of a forest
LEAF = 5  # smallest number of codes in a leaf of a tree
COST = 0.01  # C of the linear classifier: the weight of an error relative to that of |w|^2 / 2
VOTES = 10_000  # cast to train the vote of the FactorVAE score; half as many test it
VOTERS = 64  # images with nearly the same value of a factor, which together cast a vote
VOTES_TOGETHER = 500  # cast at once, which limits the memory that is needed


class Known(NamedTuple):
    """Images whose factors are known: their mean codes (N, D) and their factors (N, K), float64 on the CPU."""

    codes: Tensor
    factors: Tensor


def varies(values: Tensor) -> bool:
    """Return whether values (N,) differ by more than rounding."""
    return float(values.max() - values.min()) > 1e-6 * float(values.abs().max())


def bins(values: Tensor, count: int) -> Tensor:
    """Return the bin of each value (N,), int64, of `count` bins of equal width between the smallest and the largest
    value; 0 if the values are constant.

    >>> bins(torch.tensor([0.0, 1.0, 4.9, 5.0, 10.0]), 2).tolist()
    [0, 0, 0, 1, 1]
    """
    if not varies(values):
        return torch.zeros_like(values, dtype=torch.int64)
    low, high = values.min(), values.max()
    return ((values - low) / (high - low) * count).long().clamp(max=count - 1)


def factor_bins(values: Tensor, kind: Factor) -> Tensor:
    """Return the bin of each value (N,) of a factor, int64: its class if the factor is categorical."""
    if kind.kind == "categorical":
        return values.unique(return_inverse=True)[1]
    if kind.kind == "circular":
        return (values * FACTOR_BINS).long().clamp(max=FACTOR_BINS - 1)
    return bins(values, FACTOR_BINS)


def surprise(symbols: Tensor) -> Tensor:
    """Return -ln of the frequency of each of the symbols (N,), whole numbers; the mean is their entropy in nats."""
    return math.log(len(symbols)) - symbols.bincount()[symbols].double().log()


def information_gaps(known: Known, kinds: Sequence[Factor]) -> tuple[Tensor, Tensor]:
    """Return the mutual information gap of each factor, (K,), and how much each image moves it, (N, K).

    The derivative of the entropy of a histogram by an image's weight is its surprise minus the entropy, and the rest
    follows from I = H(z) + H(v) - H(z, v) and the rule for quotients.
    """
    codes = torch.stack([bins(column, CODE_BINS) for column in known.codes.T], 1)
    own = torch.stack([surprise(column) for column in codes.T], 1)
    gaps, parts = [], []
    for values, kind in zip(known.factors.T, kinds, strict=True):
        symbols = factor_bins(values, kind)
        of_factor, size = surprise(symbols), int(symbols.max()) + 1
        both = torch.stack([surprise(column * size + symbols) for column in codes.T], 1)
        shared = own + of_factor[:, None] - both  # of each image and dimension; the mean is the mutual information
        gap, lead = _lead(shared)
        entropy = of_factor.mean()
        gaps.append(gap / entropy)
        parts.append((lead - gaps[-1] * of_factor) / (entropy * len(lead)))
    return torch.stack(gaps), torch.stack(parts, 1)


def _lead(scores: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return by how much the largest mean of scores (N, D) exceeds the second largest, or 0 if D = 1.

    The second result is the difference (N,) between these two dimensions in `moves` (N, D), by default in the scores.
    """
    means, best = scores.mean(0).topk(min(2, scores.shape[1]))
    moves = scores if moves is None else moves
    if len(best) == 1:
        return means[0], moves[:, best[0]]
    return means[0] - means[1], moves[:, best[0]] - moves[:, best[1]]


def as_numbers(values: Tensor, kind: Factor, classes: Tensor) -> Tensor:
    """Return a factor (N,) as variables (N, E) that a regression can predict: one for each of the classes of a
    categorical factor, cosine and sine of a circular one."""
    if kind.kind == "categorical":
        return (values[:, None] == classes).double()
    if kind.kind == "circular":
        return torch.stack([(2 * math.pi * values).cos(), (2 * math.pi * values).sin()], 1)
    return values[:, None]


def fit_forests(train: Known, test: Known, kinds: Sequence[Factor], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Predict each factor from the codes by a random forest (see Dci).

    Returns the importance of each dimension for each factor, (D, K), where each column sums to 1, or to 0 if no
    dimension helps; R^2 for the test images, (K,); and how much each of them moves it, (N, K).
    """
    from sklearn.ensemble import RandomForestRegressor

    importances, r2, parts = [], [], []
    for values, tested, kind in zip(train.factors.T, test.factors.T, kinds, strict=True):
        classes = torch.cat([values, tested]).unique() if kind.kind == "categorical" else values
        target, truth = as_numbers(values, kind, classes), as_numbers(tested, kind, classes)
        forest = RandomForestRegressor(TREES, min_samples_leaf=LEAF, random_state=seed)
        forest.fit(train.codes.numpy(), target.squeeze(1).numpy())
        importances.append(torch.from_numpy(forest.feature_importances_))
        predicted = torch.from_numpy(forest.predict(test.codes.numpy())).reshape(truth.shape)
        error, away = (truth - predicted).square().sum(1), (truth - truth.mean(0)).square().sum(1)
        share = error.mean() / away.mean()
        r2.append(1 - share)
        parts.append((share * away - error) / (away.mean() * len(away)))
    return torch.stack(importances, 1), torch.stack(r2), torch.stack(parts, 1)


def concentration(importances: Tensor) -> tuple[float, Tensor]:
    """Return how concentrated each row of importances (N, M) is on one column: the mean over rows, and each row, (N,).

    The value of a row is 1 minus the entropy of its shares divided by ln M, or 0 for a row of zeros. The mean is
    weighted by the sums of the rows.

    >>> concentration(torch.tensor([[0.75, 0.0], [0.125, 0.125], [0.0, 0.0]]))
    (0.75, tensor([1., 0., 0.]))
    """
    total = importances.sum(1)
    share = importances / total.clamp_min(1e-30)[:, None]
    each = torch.where(total > 0, 1 - torch.special.entr(share).sum(1) / math.log(importances.shape[1]), 0)
    return float((total * each).sum() / total.sum().clamp_min(1e-30)), each


def predictability_gaps(train: Known, test: Known, kinds: Sequence[Factor]) -> tuple[Tensor, Tensor]:
    """Return the gap of each factor between the scores of the two best dimensions, (K,), and how much each test image
    moves it, (N, K); for the scores, see Sap."""
    gaps, parts = [], []
    for number, kind in enumerate(kinds):
        known, asked = train.factors[:, number], test.factors[:, number]
        if kind.kind == "categorical":
            pairs = zip(train.codes.T, test.codes.T, strict=True)
            scores = torch.stack([_is_right(codes, known, tested, asked) for codes, tested in pairs], 1)
            moves = scores - scores.mean(0)
        else:
            variables = as_numbers(asked, kind, asked)
            scores, moves = _determination(test.codes, variables)
        gap, lead = _lead(scores, moves)
        gaps.append(gap)
        parts.append(lead / len(asked))
    return torch.stack(gaps), torch.stack(parts, 1)


def _is_right(codes: Tensor, labels: Tensor, queries: Tensor, truth: Tensor) -> Tensor:
    """Return 1 for each query (M,) whose label a support vector machine predicts, else 0, float64 (M,).

    The machine is linear, and fitted to codes (N,) with their labels; `truth` are the labels of the queries.
    """
    from sklearn.svm import LinearSVC

    if not varies(codes):
        return (truth == labels.mode().values).double()
    center, unit = codes.mean(), codes.std(correction=0)
    # Without the dual problem, no random numbers are used.
    machine = LinearSVC(C=COST, class_weight="balanced", dual=False)
    machine.fit(((codes - center) / unit)[:, None].numpy(), labels.numpy())
    return (torch.from_numpy(machine.predict(((queries - center) / unit)[:, None].numpy())) == truth).double()


def _determination(codes: Tensor, variables: Tensor) -> tuple[Tensor, Tensor]:
    """Return R^2 of a linear regression of each dimension of codes (N, D) on variables (N, E), and each image's
    influence on it, (N, D) each: the former is the same for all images."""
    inputs = torch.cat([torch.ones(len(variables), 1, dtype=torch.float64), variables], 1)
    center, spread = codes.mean(0), codes.std(0, correction=0)
    constant = torch.tensor([not varies(column) for column in codes.T])
    unit = torch.where(constant, 0, (codes - center) / torch.where(constant, 1, spread))
    rest = unit - inputs @ (torch.linalg.pinv(inputs) @ unit)
    share = rest.square().mean(0)  # of the variance that is not explained
    r2 = torch.where(constant, 0, 1 - share)
    return r2.expand(codes.shape), share * unit.square() - rest.square()


def vote_accuracy(train: Known, test: Known, kinds: Sequence[Factor]) -> float:
    """Return the share of votes of test images for the factor that is fixed (see FactorVaeScore); 1 / K if D = 0."""
    if train.codes.shape[1] == 0:
        return 1 / len(kinds)
    variance = train.codes.var(0, correction=0).clamp_min(1e-30)
    table = cast_votes(train, kinds, variance, VOTES // len(kinds)).argmax(0)
    votes = cast_votes(test, kinds, variance, VOTES // 2 // len(kinds))
    return int(votes[table, torch.arange(len(table))].sum()) / int(votes.sum())


def cast_votes(known: Known, kinds: Sequence[Factor], variance: Tensor, count: int) -> Tensor:
    """Return how often each dimension varies least, relative to its variance (D,), if each factor is fixed, (K, D).

    Each factor is fixed `count` times.
    """
    found = []
    for values, kind in zip(known.factors.T, kinds, strict=True):
        least = [
            (known.codes[rows].var(1, correction=0) / variance).argmin(1)
            for rows in alike(values, kind, count).split(VOTES_TOGETHER)
        ]
        found.append(torch.cat(least).bincount(minlength=len(variance)))
    return torch.stack(found)


def alike(values: Tensor, kind: Factor, count: int) -> Tensor:
    """Draw `count` sets of images with nearly the same value of a factor (N,), and return their rows, int64 (count, L).

    Each set belongs to a random image. It contains L = min(64, N / 10), but at least 2, random images of the same class
    or, for factors with an order, the image and its neighbors in this order; a circular order has no end.
    """
    images = len(values)
    size = max(2, min(VOTERS, images // 10))
    shuffled = torch.randperm(images)
    order = shuffled[values[shuffled].argsort(stable=True)]
    chosen = torch.randint(images, (count, 1))
    if kind.kind == "categorical":
        sizes = values.unique(return_counts=True)[1]
        ends = sizes.cumsum(0)
        group = torch.searchsorted(ends, chosen, right=True)
        drawn = (torch.rand(count, size, dtype=torch.float64) * sizes[group]).long()
        return order[(ends - sizes)[group] + drawn]
    first = chosen - size // 2
    if kind.kind == "continuous":
        first = first.clamp(0, images - size)
    return order[(first + torch.arange(size)).remainder(images)]
