"""Metrics of the second stage: how well models of the codes, trained after the run, learn them."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vae_cli.metrics.base import BATCH, Figure, MeasuredRun, Metric, mean_figure, undefined
from vae_cli.metrics.features import FeatureNet, feature_net
from vae_cli.metrics.price import ON_SPHERE
from vae_cli.metrics.quality import DENSITY_NEIGHBORS, KINDS, Balls, compared, decoded_features, real_features
from vae_cli.runs.second_stage import second_stage

STAGES = {"aggregate": 1, "mixture": 10, "mixture_50": 50}  # the numbers of Gaussians
TRAINED = ("vae", "flow")
COMPARED_BEFORE = ("aggregate", "mixture")  # by Quality
DENSITIES = 1000  # codes, at most, whose density is computed, which for the flow takes seconds
NO_NOISE = "the rate of a point mass is infinite"


class Drawn(Protocol):
    """A second stage: a distribution of codes (N, D)."""

    def draw(self, count: int) -> Tensor:
        """Draw codes (count, D)."""

    def log_prob(self, codes: Tensor) -> Tensor:
        """Return the log density of codes (N, D), (N,), in nats, or a lower bound on it."""


class SecondStage(Metric):
    """Images from second stages: models of the training codes, which `vae` trains after the run and keeps with it.

    The second stages are one Gaussian (`aggregate`), mixtures of 10 and of 50 Gaussians (`mixture`, `mixture_50`), a
    second VAE (`vae`; Dai and Wipf, ICLR 2019) and flow matching (`flow`; Lipman et al., ICLR 2023). Codes drawn from
    them are decoded to mean images, and compared with test images as Quality does. Besides:

    novelty     the mean distance of generated images from the nearest training image, divided by that of test images,
                in the space of the feature net. About 1 for images as new as test images, 0 for copies of training
                images. A blurred image is closer to its neighbors than a sharp one: novelty_reconstructions, that of
                reconstructions of test images, is what to compare with
    nll         -ln p(z) of held-out codes under the second stage: one drawn code for each of DENSITIES test images.
                For the second VAE, an upper bound from 100 draws. It depends on the units of z
    rate  E[ln q(z|x) - ln p(z)] of the same codes: the rate if the second stage were the prior, which does not
                depend on the units of z. -(distortion + rate) is then a lower bound on ln p(x). Undefined for a
                point mass

    A mixture with many components memorizes: low distances and low novelty go together.
    """

    claim = "second_stage"

    def compute(self) -> dict[str, Figure]:
        figures: dict[str, Figure] = {}
        scene = Scene.of(self.subject)
        count = len(self.subject.positions("test", self.subject.budget.pictures))
        held_out = HeldOut.of(self.subject)
        for name in (*STAGES, *TRAINED):
            stage = self._stage(name)
            if stage is None:
                reason = f"the training codes are too few for {STAGES[name]} Gaussians"
                figures |= dict.fromkeys(_names(name), undefined(reason))
                continue
            if isinstance(scene, Scene):
                made = decoded_features(self.subject, scene.net, stage.draw(count).to(self.subject.device))
                if name not in COMPARED_BEFORE:
                    figures |= compared(name, made, scene.test, scene.balls)
                figures[f"novelty_{name}"] = scene.novelty(made)
            else:
                kinds = ("novelty",) if name in COMPARED_BEFORE else (*KINDS, "novelty")
                figures |= {f"{kind}_{name}": undefined(scene) for kind in kinds}
            figures |= held_out.figures(name, stage)
        figures["novelty_reconstructions"] = undefined(scene) if isinstance(scene, str) else scene.of_reconstructions()
        return figures

    def _stage(self, name: str) -> Drawn | None:
        """Return a second stage, fitted or loaded; None if there are too few codes for it."""
        if name in STAGES:
            if STAGES[name] >= len(self.subject.codes("train").z):
                return None
            return self.subject.mixture(STAGES[name])
        return second_stage(self.subject.run, "flow" if name == "flow" else "vae")


def _names(stage: str) -> list[str]:
    kinds = ("novelty", "nll", "rate") if stage in COMPARED_BEFORE else (*KINDS, "novelty", "nll", "rate")
    return [f"{kind}_{stage}" for kind in kinds]


class HeldOut(NamedTuple):
    """Codes of test images, one each, and ln q(z|x): z (N, D) and log_posterior (N,), or None for a point mass. On a
    sphere, ln q(z|x) is a density per area, and a model of all dimensions has none."""

    z: Tensor
    log_posterior: Tensor | None
    is_on_sphere: bool

    @classmethod
    def of(cls, subject: MeasuredRun) -> HeldOut:
        """Return the codes of the first DENSITIES test images."""
        drawn, log_posterior = subject.codes("test").z[:DENSITIES], []
        for x, rows in subject.batches("test", DENSITIES):
            log_posterior.append(subject.model.encode(x).log_prob(drawn[rows]).cpu().double())
        return cls(drawn, torch.cat(log_posterior) if subject.has_noise else None, subject.is_on_sphere)

    def figures(self, name: str, stage: Drawn) -> dict[str, Figure]:
        """Return nll and rate under a second stage."""
        is_mixture = name in STAGES  # which computes in float64, on the CPU
        if self.is_on_sphere:
            return {f"{kind}_{name}": undefined(ON_SPHERE) for kind in ("nll", "rate")}
        codes = self.z.cpu().double() if is_mixture else self.z
        log_prob = torch.cat([stage.log_prob(some) for some in codes.split(BATCH)]).cpu().double()
        note = "an upper bound, from the importance-weighted bound with 100 draws" if name == "vae" else ""
        rate = undefined(NO_NOISE)
        if self.log_posterior is not None:
            rate = mean_figure(self.log_posterior - log_prob, "nats", note)
        return {f"nll_{name}": mean_figure(-log_prob, "nats", note), f"rate_{name}": rate}


class Scene(NamedTuple):
    """What generated images are compared with, in the feature space: features (N, F) of test and training images, the
    balls around the test images, and the distances (N,) from test images to the nearest training image."""

    subject: MeasuredRun
    net: FeatureNet
    test: Tensor
    train: Tensor
    balls: Balls
    usual: Tensor

    @classmethod
    def of(cls, subject: MeasuredRun) -> Scene | str:
        """Return the scene of a run, or the reason why images cannot be compared."""
        if subject.no_decoder:
            return subject.no_decoder
        net = feature_net(subject)
        if net is None:
            return "there is no feature net, since the images have no labels, or they all have the same label"
        count = len(subject.positions("test", subject.budget.pictures))
        if count <= DENSITY_NEIGHBORS:
            return f"{count} test images are too few for {DENSITY_NEIGHBORS} neighbors each"
        test, train = real_features(subject, net, "test", count), real_features(subject, net, "train")
        return cls(subject, net, test, train, Balls(test), from_nearest(test, train))

    def novelty(self, made: Tensor) -> Figure:
        """Return the novelty of generated images with features made (M, F)."""
        away = from_nearest(made, self.train)
        value = float(away.mean() / self.usual.mean())
        shares = [float(gaps.std() / gaps.mean()) / math.sqrt(len(gaps)) for gaps in (away, self.usual)]
        return Figure(value, "", len(away), value * math.hypot(*shares))

    def of_reconstructions(self) -> Figure:
        """Return the novelty of the reconstructions of test images."""
        return self.novelty(decoded_features(self.subject, self.net, self.subject.codes("test").loc[: len(self.test)]))


def from_nearest(points: Tensor, others: Tensor) -> Tensor:
    """Return the distance (N,) from each point (N, F) to the nearest of the others (M, F)."""
    return torch.cat([torch.cdist(some, others).amin(1) for some in points.split(BATCH)])


class VelocityVariance(Metric):
    """The velocity irreducible variance, a cheap predictor of how well flow matching learns the codes.

        viv = mean over classes of (pi / 2) sum_j sqrt(eigenvalue_j of the covariance of the codes of a class)

    The codes are one drawn code per training image, each dimension divided by its standard deviation. The value grows
    with the number of dimensions. It needs labels. arXiv 2606.03578, 2026.
    """

    claim = "second_stage"

    def compute(self) -> dict[str, Figure]:
        codes = self.subject.codes("train")
        if codes.labels is None:
            return {"viv": undefined("the images have no labels")}
        value = velocity_variance(codes.z.cpu().double(), codes.labels.cpu())
        if value is None:
            return {"viv": undefined("every class has a single training image")}
        return {"viv": Figure(value, "", len(codes.z))}


def velocity_variance(codes: Tensor, labels: Tensor) -> float | None:
    """Return the velocity irreducible variance of codes (N, D) float64 with labels (N,).

    Constant dimensions and classes of a single code are left out. None if no class is left.
    """
    spread = codes.std(0)
    standardized = codes[:, spread > 0] / spread[spread > 0]
    found = []
    for label in labels.unique():
        members = standardized[labels == label]
        if len(members) > 1:
            found.append(torch.linalg.eigvalsh(members.T.cov().reshape(members.shape[1], -1)).clamp_min(0).sqrt().sum())
    return math.pi / 2 * float(torch.stack(found).mean()) if found else None
