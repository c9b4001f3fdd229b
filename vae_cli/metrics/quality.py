"""Metrics for claim 5 (price): the quality of images generated from several sources of codes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vae_cli.metrics.base import BATCH, Figure, Metric, SplitName, mean_figure, undefined
from vae_cli.metrics.classifiers import ROWS, distances, nearest
from vae_cli.metrics.features import FeatureNet, feature_net
from vae_cli.runs.codes import MIXTURE_COMPONENTS, prior_codes

SOURCES = ("prior", "aggregate", "mixture", "reconstructions", "midpoints")
KINDS = ("frechet", "precision", "recall", "density", "coverage")
MANIFOLD = 3  # nearest neighbors for precision and recall
DENSITY_NEIGHBORS = 5  # for density and coverage


class Quality(Metric):
    """Generated images compared with the same number of test images, in the 64-dimensional space of the feature net.

    Codes come from five sources: the `prior`; one Gaussian fitted to the training codes (`aggregate`); a `mixture` of
    10 Gaussians fitted to the same codes; the locs of the test images (`reconstructions`); and the midpoints between
    the locs of random pairs of test images (`midpoints`). Codes are decoded to their mean images. For each source, with
    N = budget.pictures images (all test images if there are fewer):

    frechet     |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), Heusel et al., GANs Trained by a Two Time-Scale
                Update Rule, NeurIPS 2017. Biased upward for small N. As a baseline, frechet_floor is the distance
                between N training images and the test images. No source is expected to go below it except
                reconstructions, which are made from the test images themselves
    precision   share of generated images that lie at least as close to some test image as that image's 3rd nearest
                neighbor among the test images
    recall      the same with the roles of generated and test images swapped. Kynkaanniemi et al., Improved Precision
                and Recall Metric for Assessing Generative Models, NeurIPS 2019
    density     mean number of test images' balls (radius: distance to the 5th nearest neighbor) that contain a
                generated image, divided by 5; its expectation is 1 for equal distributions, and it can exceed 1
    coverage    share of test images whose ball contains a generated image; its expectation is 1 - 2^-5 for equal
                distributions and equal N. Naeem et al., Reliable Fidelity and Diversity Metrics for Generative Models,
                ICML 2020

    Standard errors are over generated images for precision and density, and over test images for recall and coverage;
    the balls are treated as fixed. The figures depend on the feature net, whose accuracy is feature_accuracy, so they
    cannot be compared with published values. They are defined for every sigma mode. Test images are used before
    any binarization.
    """

    claim = "price"

    def compute(self) -> dict[str, Figure]:
        net = feature_net(self.subject)
        names = [f"{kind}_{source}" for source in SOURCES for kind in KINDS]
        count = len(self.subject.positions("test", self.subject.budget.pictures))
        reason = ""
        if net is None:
            reason = "there is no feature net, since the images have no labels, or they all have the same label"
        elif count <= DENSITY_NEIGHBORS:
            reason = f"{count} test images are too few for {DENSITY_NEIGHBORS} neighbors each"
        if net is None or reason:
            return dict.fromkeys([*names, "frechet_floor", "feature_accuracy"], undefined(reason))
        real = self._real(net, "test", count)
        balls = Balls(real)
        figures = {}
        for source in SOURCES:
            codes = self._codes(source, count)
            made = self._features(net, (self.subject.model.decode(z).mean for z in codes.split(BATCH)))
            figures[f"frechet_{source}"] = Figure(frechet(made, real), "", count)
            values = neighborhoods(made, real, balls)
            figures |= {f"{kind}_{source}": mean_figure(value) for kind, value in values.items()}
        train = self._real(net, "train", count)
        figures["frechet_floor"] = Figure(frechet(train, real), "", len(train))
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

    def _real(self, net: FeatureNet, split: SplitName, count: int) -> Tensor:
        images = getattr(self.subject.splits, split)
        return self._features(net, (images.batch(rows) for rows in self.subject.positions(split, count).split(BATCH)))

    def _features(self, net: FeatureNet, batches: Iterable[Tensor]) -> Tensor:
        return torch.cat([net.features(x).cpu().double() for x in batches])


def frechet(a: Tensor, b: Tensor) -> float:
    """Return the squared Frechet distance between Gaussians fitted to features a (N, F) and b (M, F)."""
    root = _root(a.T.cov())
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp_min(0).sqrt().sum()
    away = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(away + a.var(0).sum() + b.var(0).sum() - 2 * cross))


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
