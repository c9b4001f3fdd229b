"""Metrics for claim 5 (price): the quality of images generated from several sources of codes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vae_cli.metrics.base import BATCH, Figure, MeasuredRun, Metric, SplitName, mean_figure, parts_of_mean, undefined
from vae_cli.metrics.classifiers import ROWS, distances, nearest
from vae_cli.metrics.features import FeatureNet, feature_net
from vae_cli.runs.codes import MIXTURE_COMPONENTS, prior_codes

SOURCES = ("prior", "aggregate", "mixture", "reconstructions", "midpoints")
KINDS = ("frechet", "kid", "precision", "recall", "density", "coverage")
MANIFOLD = 3  # nearest neighbors for precision and recall
DENSITY_NEIGHBORS = 5  # for density and coverage
SEEN = "compared with training images, which the feature net was trained on"


class Quality(Metric):
    """Generated images compared with the same number of test images, in the 64-dimensional space of the feature net.

    Codes come from five sources: the `prior`; one Gaussian fitted to the training codes (`aggregate`); a `mixture` of
    10 Gaussians fitted to the same codes; the locs of the test images (`reconstructions`); and the midpoints between
    the locs of random pairs of test images (`midpoints`). Codes are decoded to their mean images. For each source, with
    N = budget.pictures images (all test images if there are fewer):

    frechet     |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), Heusel et al., GANs Trained by a Two Time-Scale
                Update Rule, NeurIPS 2017. Biased upward for small N: compare it only at equal N
    kid         mean of k(a, a') + k(b, b') - 2 k(a, b) over pairs of different images, with k(a, b) = (a . b / 64 +
                1)^3: the squared distance in the kernel's feature space, unbiased for any N, so it can be negative.
                Binkowski et al., Demystifying MMD GANs, ICLR 2018
    precision   share of generated images that lie at least as close to some test image as that image's 3rd nearest
                neighbor among the test images
    recall      the same with the roles of generated and test images swapped. Kynkaanniemi et al., Improved Precision
                and Recall Metric for Assessing Generative Models, NeurIPS 2019
    density     mean number of test images' balls (radius: distance to the 5th nearest neighbor) that contain a
                generated image, divided by 5; its expectation is 1 for equal distributions, and it can exceed 1
    coverage    share of test images whose ball contains a generated image; its expectation is 1 - 2^-5 for equal
                distributions and equal N. Naeem et al., Reliable Fidelity and Diversity Metrics for Generative Models,
                ICML 2020

    As a baseline, frechet_floor and kid_floor compare validation images, which the feature net was not trained on
    (training images if none were held out, as their note says), with the test images. No source is expected to go below
    them except reconstructions, which are made from the test images themselves. If fewer than N images are held out,
    frechet_floor has a larger bias than the sources; kid_floor has none.

    Standard errors are over generated images for precision and density, and over test images for recall and coverage;
    the balls are treated as fixed. The figures depend on the feature net, whose accuracy is feature_accuracy, so they
    cannot be compared with published values. They are defined for every sigma mode. Test images are used before
    any binarization.
    """

    claim = "price"

    def compute(self) -> dict[str, Figure]:
        net = feature_net(self.subject)
        names = [f"{kind}_{source}" for source in SOURCES for kind in KINDS] + ["frechet_floor", "kid_floor"]
        count = len(self.subject.positions("test", self.subject.budget.pictures))
        reason = ""
        if net is None:
            reason = "there is no feature net, since the images have no labels, or they all have the same label"
        elif count <= DENSITY_NEIGHBORS:
            reason = f"{count} test images are too few for {DENSITY_NEIGHBORS} neighbors each"
        if net is None or reason:
            return dict.fromkeys([*names, "feature_accuracy"], undefined(reason))
        real = real_features(self.subject, net, "test", count)
        balls = Balls(real)
        figures: dict[str, Figure] = {}
        for source in SOURCES:
            made = decoded_features(self.subject, net, self._codes(source, count))
            figures |= compared(source, made, real, balls)
        split: SplitName = "validation" if len(self.subject.splits.validation) > 1 else "train"
        others, note = real_features(self.subject, net, split, count), "" if split == "validation" else SEEN
        figures["frechet_floor"] = Figure(frechet(others, real), "", len(others), note=note)
        figures["kid_floor"] = replace(kid(others, real), note=note)
        share, tested = net.accuracy, len(self.subject.splits.test)
        figures["feature_accuracy"] = Figure(share, "", tested, (share * (1 - share) / tested) ** 0.5)
        return figures

    def _codes(self, source: str, count: int) -> Tensor:
        """Return codes (count, D) from a source, on the run's device."""
        run, device = self.subject.run, self.subject.device
        loc = self.subject.codes("test").loc[:count]
        if source == "prior":
            return prior_codes(run, count)
        if source == "reconstructions":
            return loc
        if source == "midpoints":
            order = torch.randperm(count, device=device)
            return (loc[order] + loc[order.roll(1)]) / 2
        most = len(self.subject.codes("train").z) - 1
        components = 1 if source == "aggregate" else min(MIXTURE_COMPONENTS, most)
        return self.subject.mixture(components).draw(count).to(device)


def real_features(subject: MeasuredRun, net: FeatureNet, split: SplitName, most: int | None = None) -> Tensor:
    """Return the features of the images of a split, or of `most` of them, float64 (N, F), on the CPU."""
    images = getattr(subject.splits, split)
    batches = (images.batch(rows) for rows in subject.positions(split, most).split(BATCH))
    return torch.cat([net.features(x).cpu().double() for x in batches])


def decoded_features(subject: MeasuredRun, net: FeatureNet, codes: Tensor) -> Tensor:
    """Return the features of the mean images of codes (N, D), float64 (N, F), on the CPU."""
    return torch.cat([net.features(subject.model.decode(z).mean).cpu().double() for z in codes.split(BATCH)])


def compared(source: str, made: Tensor, real: Tensor, balls: Balls) -> dict[str, Figure]:
    """Return the figures of KINDS for images from one source: their features made (M, F), those of real images (N, F),
    and the balls around the latter."""
    figures = {f"frechet_{source}": Figure(frechet(made, real), "", len(made)), f"kid_{source}": kid(made, real)}
    values = neighborhoods(made, real, balls)
    return figures | {f"{kind}_{source}": mean_figure(value) for kind, value in values.items()}


def frechet(a: Tensor, b: Tensor) -> float:
    """Return the squared Frechet distance between Gaussians fitted to features a (N, F) and b (M, F)."""
    root = _root(a.T.cov())
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp_min(0).sqrt().sum()
    away = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(away + a.var(0).sum() + b.var(0).sum() - 2 * cross))


def kid(a: Tensor, b: Tensor) -> Figure:
    """Return the kernel distance between features a (N, F) and b (M, F), with its standard error over the images of
    both: the unbiased estimate of the squared maximum mean discrepancy for k(a, b) = (a . b / F + 1)^3."""
    within = []
    for points in (a, b):
        total = torch.cat([_kernel(part, points).sum(1) for part in points.split(ROWS)])
        within.append((total - _kernel_of_itself(points)) / (len(points) - 1))  # each image's mean over all others
    across = torch.cat([_kernel(part, b).mean(1) for part in a.split(ROWS)])
    back = torch.cat([_kernel(part, a).mean(1) for part in b.split(ROWS)])
    value = float(within[0].mean() + within[1].mean() - 2 * across.mean())
    # Each image takes part in all pairs: to first order, it moves the value by twice its own share.
    moves = [2 * parts_of_mean(own - other) for own, other in zip(within, (across, back), strict=True)]
    error = float(torch.cat(moves).square().sum().sqrt())
    return Figure(value, "", len(a), error)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return the kernel of each pair of features a (N, F) and b (M, F), (N, M)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _kernel_of_itself(points: Tensor) -> Tensor:
    return (points.square().mean(1) + 1) ** 3


def _root(matrix: Tensor) -> Tensor:
    """Return the square root of a symmetric positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


class Balls:
    """Radii of balls around points (N, F): each point's distances to its 3rd and 5th nearest neighbors, (N,) each."""

    def __init__(self, points: Tensor) -> None:
        found, _ = nearest(points, DENSITY_NEIGHBORS)
        self.manifold, self.neighbors = found[:, [MANIFOLD - 1, DENSITY_NEIGHBORS - 1]].T


def neighborhoods(made: Tensor, real: Tensor, balls: Balls) -> dict[str, Tensor]:
    """Return precision and density for each generated image, (M,), and recall and coverage for each real image, (N,).

    made (M, F) and real (N, F) are features of generated and real images; balls are the balls around the real images.
    """
    others = Balls(made)
    precision, density = [], []
    recall, coverage = (torch.zeros(len(real), dtype=torch.bool) for _ in range(2))
    for part, radius in zip(made.split(ROWS), others.manifold.split(ROWS), strict=True):
        gaps = distances(part, real)
        precision.append((gaps <= balls.manifold).any(1))
        within = gaps <= balls.neighbors
        density.append(within.sum(1).double() / DENSITY_NEIGHBORS)
        coverage |= within.any(0)
        recall |= (gaps <= radius[:, None]).any(0)
    return {
        "precision": torch.cat(precision),
        "recall": recall,
        "density": torch.cat(density),
        "coverage": coverage,
    }
