"""Metrics of known factors of variation: whether dimensions are disentangled, that is, encode one factor each.

They are defined for datasets whose factors are known, such as `shapes`, and belong to no claim. They follow the
definitions that Locatello et al. (Challenging Common Assumptions in the Unsupervised Learning of Disentangled
Representations, ICML 2019) compare, on mean codes; what differs is stated for each. D is the number of latent
dimensions, K the number of factors, N the number of test images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vae_cli.axes.dataset import Factor
from vae_cli.metrics.base import Figure, Metric, SplitName, measured, undefined
from vae_cli.metrics.disentanglement import (
    Known,
    concentration,
    fit_forests,
    information_gaps,
    predictability_gaps,
    varies,
    vote_accuracy,
)

FOREST_CODES = 10_000  # at most this many training codes are fitted, and at most twice as many as images are tested

NO_FACTORS = "the dataset has no known factors of variation"
CONSTANT = "no factor varies both among the training images and among the test images that are measured"
ONE_FACTOR = "only one factor varies among the images that are measured"
ONE_DIMENSION = "the code has only one latent dimension"
NOT_FINITE = "the mean codes are not finite"


class FactorMetric(Metric):
    """A metric of known factors. Factors that do not vary in both splits are left out, which the notes say.

    names  the figures that the metric returns; all are undefined if the dataset has no factors
    """

    claim = "factors"
    names: ClassVar[tuple[str, ...]]

    def compute(self) -> dict[str, Figure]:
        kinds = self.subject.splits.factors
        if kinds is None:
            return dict.fromkeys(self.names, undefined(NO_FACTORS))
        train, test = (self._known("train"), self._known("test"))
        if not all(bool(part.codes.isfinite().all()) for part in (train, test)):
            return dict.fromkeys(self.names, undefined(NOT_FINITE))
        varying = [
            column for column in range(len(kinds)) if all(varies(part.factors[:, column]) for part in (train, test))
        ]
        if not varying:
            return dict.fromkeys(self.names, undefined(CONSTANT))
        train, test = (Known(part.codes, part.factors[:, varying]) for part in (train, test))
        found = self.measure(train, test, [kinds[column] for column in varying])
        return {name: found[name] for name in self.names}

    @abstractmethod
    def measure(self, train: Known, test: Known, kinds: Sequence[Factor]) -> dict[str, Figure]:
        """Return the figures for factors that all vary in both splits."""

    def note(self, kinds: Sequence[Factor]) -> str:
        """Return a note that names the factors that are left out because they do not vary; empty if all vary."""
        constant = [kind.name for kind in self.subject.splits.factors or () if kind not in kinds]
        return f"without the factors that do not vary: {', '.join(constant)}" if constant else ""

    def mean_and_each(self, kinds: Sequence[Factor], values: Tensor, parts: Tensor) -> list[Figure]:
        """Return two figures: the mean of values (K,) over the factors, and the values. The parts (N, K) are how much
        each image moves them, and give the standard errors over test images."""
        count = len(parts)
        mean = measured(float(values.mean()), "", parts.mean(1))
        errors = (parts.square().sum(0) * count / (count - 1)).sqrt().tolist() if count > 1 else None
        each = Figure(values.tolist(), "", count, errors, f"factors: {', '.join(kind.name for kind in kinds)}")
        return [Figure(mean.value, "", count, mean.error, self.note(kinds), parts=mean.parts), each]

    def _known(self, split: SplitName) -> Known:
        factors = self.subject.factors(split)
        assert factors is not None  # `Splits.factors` describes them
        return Known(self.subject.codes(split).loc.cpu().double(), factors)


class Mig(FactorMetric):
    """The mutual information gap: whether one dimension of the mean code knows more about a factor than all others.

    mig             mean over factors of (I(z_a; v) - I(z_b; v)) / H(v), where z_a and z_b are the dimensions with the
                    largest and second largest mutual information with the factor v; with a single dimension,
                    I(z_b; v) = 0
    mig_per_factor  the gap of each factor, in the order that the note gives

    It is 1 if each factor is a function of a dimension of its own, and no other dimension knows about it; 0 if two
    dimensions know equally much. Mutual information and entropy are those of the N test images' histograms: codes in 20
    bins of equal width between a dimension's smallest and largest value, continuous and circular factors in 10. An
    unrelated dimension thus has about 19 * 9 / (2 N) nats instead of 0 (0.09 nats for 1,000 images, of 2.3), so the gap
    is biased low for small N. Standard errors come from each image's influence on the ratio, with a and b fixed. Idle
    dimensions count, too: with their noise left out, what little they know shows. Chen et al., Isolating Sources of
    Disentanglement in Variational Autoencoders, NeurIPS 2018, who use draws of z instead of means.
    """

    names = ("mig", "mig_per_factor")

    def measure(self, train: Known, test: Known, kinds: Sequence[Factor]) -> dict[str, Figure]:
        return dict(zip(self.names, self.mean_and_each(kinds, *information_gaps(test, kinds)), strict=True))


class Dci(FactorMetric):
    """Disentanglement, completeness and informativeness of the mean code, from the importance R_ij of each dimension i
    for the prediction of each factor j.

    dci_disentanglement  sum_i w_i D_i with D_i = 1 - H(R_i. / sum_j R_ij) / ln K, w_i = sum_j R_ij / sum_ij R_ij: 1 if
                         each dimension is important for one factor only
    dci_disentanglement_per_dimension  D_i of each dimension, in index order; 0 for a dimension without importance
    dci_completeness     the same with the roles of dimensions and factors swapped: 1 if for each factor, one dimension
                         is important only
    dci_completeness_per_factor        that of each factor, in the order that the note gives
    dci_informativeness  mean over factors of R^2 = 1 - (squared error / variance) of the predictions for test images;
                         1 - NRMSE^2 in the notation of the paper. It is below 0 if they are worse than the mean
    dci_informativeness_per_factor     R^2 of each factor

    Each factor is predicted by a random forest (10 trees of unlimited depth, whose leaves have at least 5 codes),
    fitted to training codes. The importance is the share of the reduction of variance that is due to a dimension. A
    categorical factor is predicted as one 0-1 variable for each class (the reduction of variance is then that of the
    Gini impurity), a circular one as cosine and sine. Informativeness has a standard error over test images, for the
    given forests. Disentanglement is not defined for a single factor, nor completeness for a single dimension. Eastwood
    and Williams, A Framework for the Quantitative Evaluation of Disentangled Representations, ICLR 2018, who choose the
    depth of the trees instead of the size of their leaves; Breiman, Random Forests, Machine Learning 2001.
    """

    names = (
        *("dci_disentanglement", "dci_disentanglement_per_dimension", "dci_completeness"),
        *("dci_completeness_per_factor", "dci_informativeness", "dci_informativeness_per_factor"),
    )

    def measure(self, train: Known, test: Known, kinds: Sequence[Factor]) -> dict[str, Figure]:
        most = min(FOREST_CODES, 2 * self.subject.budget.images)
        train = Known(train.codes[:most], train.factors[:most])
        importances, r2, parts = fit_forests(train, test, kinds, seed=int(torch.randint(2**31 - 1, ())))
        dimensions, factors = importances.shape
        figures = dict.fromkeys(self.names[:2], undefined(ONE_FACTOR))
        figures |= dict.fromkeys(self.names[2:4], undefined(ONE_DIMENSION))
        note, order = self.note(kinds), f"factors: {', '.join(kind.name for kind in kinds)}"
        if factors > 1:
            value, each = concentration(importances)
            figures["dci_disentanglement"] = Figure(value, "", len(train.codes), note=note)
            figures["dci_disentanglement_per_dimension"] = Figure(each.tolist(), "", len(train.codes), note=note)
        if dimensions > 1:
            value, each = concentration(importances.T)
            figures["dci_completeness"] = Figure(value, "", len(train.codes), note=note)
            figures["dci_completeness_per_factor"] = Figure(each.tolist(), "", len(train.codes), note=order)
        return figures | dict(zip(self.names[4:], self.mean_and_each(kinds, r2, parts), strict=True))


class Sap(FactorMetric):
    """Separated attribute predictability: whether one dimension of the mean code predicts a factor better than others.

    sap             mean over factors of the gap between the two dimensions with the largest scores; with a single
                    dimension, its score
    sap_per_factor  the gap of each factor, in the order that the note gives

    The score of a dimension for a continuous factor is R^2 of a linear regression, the squared correlation. For a
    circular factor, it is R^2 of a regression of the dimension on the cosine and sine of the factor, which does not
    depend on where the circle begins. For a categorical factor, it is the accuracy of a linear support vector machine
    that predicts the class from the dimension, standardized; it is fitted to training codes, with classes weighted
    equally. All scores are those of test images. A constant dimension has R^2 = 0 and the accuracy of always answering
    the most frequent class, so the gap of a factor with C equally frequent classes is at most 1 - 1 / C. Standard
    errors come from each image's influence, with the two dimensions fixed. Kumar et al., Variational Inference of
    Disentangled Latent Concepts from Unlabeled Observations, ICLR 2018.
    """

    names = ("sap", "sap_per_factor")

    def measure(self, train: Known, test: Known, kinds: Sequence[Factor]) -> dict[str, Figure]:
        return dict(zip(self.names, self.mean_and_each(kinds, *predictability_gaps(train, test, kinds)), strict=True))


class FactorVaeScore(FactorMetric):
    """The FactorVAE score: how often the dimension that varies least reveals which factor is fixed.

    factor_vae_score  accuracy, 0 to 1; the note gives that of guessing, 1 / K

    To cast a vote, 64 images are chosen in which one factor is nearly fixed, and the dimension of their mean codes with
    the least variance, relative to the variance of all codes, is found. A table says which factor each dimension votes
    for: the factor for which it was found most often in 10,000 votes of training images. The score is the share of
    5,000 votes of test images for the factor that was fixed. Each factor is fixed in an equal number of votes, and
    dimensions that are not active (see `active_units`) have no vote. If no dimension is active, the score is that of
    guessing.

    Images with nearly the same value are those of the same class or, for continuous and circular factors, 64 neighbors
    in the order of the factor; if there are fewer than 640 images, a tenth of them. The paper fixes the factor exactly,
    and decides which dimensions collapsed by a threshold in units of the prior. Votes share images, so the figure has
    no standard error. It is not defined for a single factor. Kim and Mnih, Disentangling by Factorising, ICML 2018.
    """

    names = ("factor_vae_score",)

    def measure(self, train: Known, test: Known, kinds: Sequence[Factor]) -> dict[str, Figure]:
        if len(kinds) == 1:
            return {"factor_vae_score": undefined(ONE_FACTOR)}
        active = self.subject.active.cpu()
        train, test = (Known(part.codes[:, active], part.factors) for part in (train, test))
        guessing = f"guessing: {1 / len(kinds):.3g}"
        note = "; ".join(filter(None, (guessing, self.note(kinds))))
        return {"factor_vae_score": Figure(vote_accuracy(train, test, kinds), "", len(test.codes), note=note)}
