"""Metrics for claim 3 (shortcuts): whether sigma has collapsed, and what a code reveals about its image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vae_cli.metrics.base import Figure, Metric, SplitName, mean_figure, parts_of_mean, undefined
from vae_cli.metrics.classifiers import predict_by_neighbors, predict_linearly
from vae_cli.metrics.neighbours import NEIGHBOURS, NO_LABELS, in_spread

COLLAPSED = 0.01  # scale below which a dimension has collapsed, in aggregate standard deviations
PROBE_CODES = 10_000  # training codes that a probe is fitted to; more would hardly change its accuracy
DENSITIES = 1 << 22  # doubles in one intermediate tensor: 32 MiB


class Collapse(Metric):
    """Whether sigma has collapsed, and how far the locations have spread.

    collapsed_share  share of dimensions whose mean scale over the test images is below 1 % of a_j, the aggregate
                     standard deviation; not defined for a point mass
    loc_std          sqrt(mean_j Var_x(loc_j)) over test images
    loc_std_growth   loc_std after the last epoch divided by loc_std after the first, as recorded during training on
                     validation images (on training images if none were held out); needs at least two epochs
    largest_loc      largest |loc_j| over test images and dimensions

    loc_std and largest_loc are in units of z, whose scale differs between sigma modes; to compare modes, use
    collapsed_share and loc_std_growth. loc_std has a bias of order 1/N.
    """

    claim = "shortcuts"

    def compute(self) -> dict[str, Figure]:
        codes = self.subject.codes()
        images, dimensions = codes.loc.shape
        if codes.scale is None:
            collapsed = undefined("a point mass has no noise in any dimension")
        else:
            off = codes.scale.double().mean(0) < COLLAPSED * self.subject.spread
            collapsed = Figure(float(off.double().mean()), count=dimensions)
        spread = codes.loc.double().var(0, correction=0).mean().sqrt()
        return {
            "collapsed_share": collapsed,
            "loc_std": Figure(float(spread), count=images),
            "loc_std_growth": self._growth(),
            "largest_loc": Figure(float(codes.loc.abs().max()), count=images),
        }

    def _growth(self) -> Figure:
        key = "posterior/loc_std"
        spreads = [float(record[key]) for record in self.subject.run.folder.metrics() if key in record]
        if len(spreads) < 2:
            return undefined("fewer than two epochs were recorded")
        if spreads[0] == 0:
            return undefined("all locations were equal after the first epoch")
        return Figure(spreads[-1] / spreads[0], count=len(spreads))


class Reidentification(Metric):
    """Whether a noisy code reveals which image it came from.

    reidentification         share of codes z ~ q(z|x) for which argmax_i log q(z|x_i), over all N test images, is the
                             code's own image; no classifier does better if all images are equally probable
    reidentification_chance  1 / N

    One z is drawn for each of up to budget.draws test images. If k images, including the code's own, tie for the
    largest density, the code counts as 1 / k, the probability that a random choice among them is right. For a point
    mass, the share is therefore the limit of vanishing noise: the number of distinct codes divided by N. The share is
    unbiased for these N images; the more images, the harder they are to tell apart. The error is the standard error of
    the mean.
    """

    claim = "shortcuts"

    def compute(self) -> dict[str, Figure]:
        subject = self.subject
        posteriors = [subject.model.encode(x) for x, _ in subject.batches("test")]
        z = torch.cat([posterior.rsample() for posterior in posteriors])
        images, dimensions = z.shape
        z = z[: subject.budget.draws]
        own = torch.arange(len(z), device=z.device)
        widest = max(posterior.batch_shape[0] for posterior in posteriors)
        hits = []
        for rows in own.split(max(1, DENSITIES // max(images, widest * dimensions))):
            # Double precision: images can be thousands of scales apart, and float32 rounds the squares too coarsely.
            queries = z[rows].double()[:, None]
            density = torch.cat([posterior.log_prob(queries) for posterior in posteriors], 1)
            is_best = density == density.amax(1, keepdim=True)
            hits.append(is_best[torch.arange(len(rows)), rows] / is_best.sum(1))
        note = "" if subject.has_noise else "share of distinct codes, since there is no noise"
        return {
            "reidentification": mean_figure(torch.cat(hits), note=note),
            "reidentification_chance": Figure(1 / images, count=images),
        }


class Generalization(Metric):
    """How much worse the model does on images it was not trained on, in nats per image.

    distortion_train, distortion_test, distortion_gap, elbo_train, elbo_test, elbo_gap: each gap is test minus train, so
    a distortion gap above 0, or an ELBO gap below 0, indicates overfitting. Both splits are measured on the same number
    of random images, with one code drawn for each image. The figures are unbiased, with the standard errors of the
    means. The ELBO is not defined for a point mass.
    """

    claim = "shortcuts"
    decodes = tuple(f"{name}_{part}" for name in ("distortion", "elbo") for part in ("train", "test", "gap"))

    def compute(self) -> dict[str, Figure]:
        subject = self.subject
        count = min(len(subject.positions("train")), len(subject.positions("test")))
        train, test = self._terms("train", count), self._terms("test", count)
        figures: dict[str, Figure] = {}
        for name in ("distortion", "elbo"):
            if name not in train:
                reason = "the rate of a point mass is infinite"
                figures |= {f"{name}_{part}": undefined(reason) for part in ("train", "test", "gap")}
                continue
            seen, unseen = mean_figure(train[name], "nats"), mean_figure(test[name], "nats")
            gap = float(test[name].mean() - train[name].mean())
            error = math.hypot(*[float(values[name].std()) for values in (train, test)]) / math.sqrt(count)
            parts = torch.cat([parts_of_mean(test[name]), -parts_of_mean(train[name])]).cpu()
            difference = Figure(gap, "nats", count, error if count > 1 else None, parts=parts)
            figures |= {f"{name}_train": seen, f"{name}_test": unseen, f"{name}_gap": difference}
        return figures

    def _terms(self, split: SplitName, count: int) -> dict[str, Tensor]:
        """Return distortion and, if defined, ELBO with one code drawn for each image, float64 (count,)."""
        found: dict[str, list[Tensor]] = {}
        for x, _ in self.subject.batches(split, count):
            inference = self.subject.model(x)
            found.setdefault("distortion", []).append(inference.distortion)
            if inference.elbo is not None:
                found.setdefault("elbo", []).append(inference.elbo)
        return {name: torch.cat(values).double() for name, values in found.items()}


class Probes(Metric):
    """How well labels can be predicted from codes; any loss of accuracy from loc to z is due to the noise.

    linear_probe_loc, linear_probe_z            accuracy of a logistic regression with an L2 penalty, on codes
                                                standardized by the statistics of the training codes
    nearest_neighbour_loc, nearest_neighbour_z  accuracy of a majority vote of the 10 nearest training codes, with
                                                distances in units of the aggregate standard deviation

    Probes are fitted to at most 10,000 training codes and tested on all test codes; z is one draw per image in both
    splits. The error is the standard error over test images. With fewer training codes, all accuracies are lower.
    The probes of z are not defined for a point mass, and none is defined if all training images have the same label.
    """

    claim = "shortcuts"

    def compute(self) -> dict[str, Figure]:
        train, test = self.subject.codes("train"), self.subject.codes("test")
        if train.labels is None or test.labels is None:
            return {name: undefined(NO_LABELS) for name in self._names()}
        labels = train.labels[:PROBE_CODES]
        if len(labels.unique()) < 2:
            return {name: undefined("all training images have the same label") for name in self._names()}
        figures: dict[str, Figure] = {}
        for code, fitted, asked in (("loc", train.loc, test.loc), ("z", train.z, test.z)):
            if code == "z" and train.scale is None:
                figures |= {name: undefined("the code has no noise: see the mean code") for name in self._names("z")}
                continue
            linear, near = self._names(code)
            fitted = fitted[:PROBE_CODES]
            in_units, asked_in_units = in_spread(self.subject, fitted), in_spread(self.subject, asked)
            answers = {
                linear: predict_linearly(fitted, labels, asked),
                near: predict_by_neighbors(in_units, labels, asked_in_units, min(NEIGHBOURS, len(labels))),
            }
            figures |= {name: mean_figure((answer == test.labels).double()) for name, answer in answers.items()}
        return figures

    def _names(self, *codes: str) -> list[str]:
        return [f"{probe}_{code}" for code in codes or ("loc", "z") for probe in ("linear_probe", "nearest_neighbour")]
