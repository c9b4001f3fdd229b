"""Metrics for claim 4 (scale): the values of sigma after training, and how they changed during training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae_cli.metrics.base import Figure, Metric, mean_figure, undefined
from vae_cli.metrics.information import NO_RATE

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS_PER_DECADE = 10

NO_SCALE = "a point mass has no scale"


class ScaleDistribution(Metric):
    """The scales of q(z|x) over test images and dimensions, separately for active and idle dimensions.

    scale_mean, scale_median, scale_min, scale_max         over all images and dimensions
    scale_distance_from_1                                  mean of |scale - 1|
    scale_active_quantiles, scale_idle_quantiles           the 5, 25, 50, 75 and 95 % quantiles
    scale_histogram_edges                                  K + 1 bin edges, in log10 scale
    scale_histogram_active, scale_histogram_idle           share of all scales that fall into each of the K bins

    Scales are in the unit of z. Bins are a tenth of a decade wide and centered on multiples of that width, so the
    bins of different runs coincide, and a scale of exactly 1 is in the middle of its bin. The shares in both histograms
    (active and idle dimensions) together sum to 1. A dimension is active if Var_x(loc_j) > 0.01 E_x(scale_j^2), and
    idle otherwise.

    The mean and the shares are unbiased; the mean has a standard error over images. Quantiles and extremes are those of
    the sample, so the extremes move outward with more images. None of these figures is defined for a point mass, and
    the quantiles for active (or idle) dimensions are not defined if there are no such dimensions.
    """

    claim = "scale"

    def compute(self) -> dict[str, Figure]:
        names = ["scale_mean", "scale_distance_from_1", "scale_median", "scale_min", "scale_max"]
        names += ["scale_active_quantiles", "scale_idle_quantiles"]
        names += ["scale_histogram_edges", "scale_histogram_active", "scale_histogram_idle"]
        codes = self.subject.codes("test")
        if codes.scale is None:
            return dict.fromkeys(names, undefined(NO_SCALE))
        scale, active = codes.scale.cpu().double(), self.subject.active.cpu()
        bins = (scale.log10() * BINS_PER_DECADE).round().long()
        first, count = int(bins.min()), int(bins.max() - bins.min()) + 1
        edges = ((torch.arange(count + 1) + first - 0.5) / BINS_PER_DECADE).tolist()
        histograms = [
            (torch.bincount((bins[:, kind] - first).flatten(), minlength=count) / bins.numel()).tolist()
            for kind in (active, ~active)
        ]
        images = len(scale)
        figures = [
            mean_figure(scale.mean(1)),
            mean_figure((scale - 1).abs().mean(1)),
            Figure(float(np.median(scale.numpy())), count=images),
            Figure(float(scale.min()), count=images),
            Figure(float(scale.max()), count=images),
            _quantiles(scale[:, active], "active"),
            _quantiles(scale[:, ~active], "idle"),
            Figure(edges, "log10 scale"),
            *(Figure(histogram, count=images) for histogram in histograms),
        ]
        return dict(zip(names, figures, strict=True))


class PullOverTraining(Metric):
    """How the scales and the parts of the rate changed during training: one point per epoch, from metrics.jsonl.

    training_epochs                             epoch numbers, starting at 1
    training_rate_scale, training_rate_loc      the parts of the rate, nats per image (see Rate)
    training_scale_mean                         mean scale over images and dimensions
    training_loc_std                            sqrt(mean_j Var_x(loc_j)), with the mean over dimensions

    All are measured on the validation images at the end of each epoch. If no images were held out, the parts of the
    rate are averaged over the training images while the weights change during the epoch, and scale_mean and loc_std are
    measured on some of those images. Standard errors are not recorded. A point mass has neither rate nor scale, and the
    rate has parts only if posterior and prior are normal with independent dimensions.
    """

    claim = "scale"

    def compute(self) -> dict[str, Figure]:
        subject = self.subject
        records = subject.run.folder.metrics()
        curves = {
            "training_rate_scale": (("validation/rate_scale", "train/rate_scale"), "nats", NO_RATE),
            "training_rate_loc": (("validation/rate_loc", "train/rate_loc"), "nats", NO_RATE),
            "training_scale_mean": (("posterior/scale_mean",), "", NO_SCALE),
            "training_loc_std": (("posterior/loc_std",), "", ""),
        }
        if not records:
            return dict.fromkeys(("training_epochs", *curves), undefined("the run has no record of its training"))
        held_out = len(subject.splits.validation)
        note = "" if held_out else "measured on training images, since no images were held out"
        figures = {"training_epochs": Figure([float(record["epoch"]) for record in records], "epochs")}
        for name, (keys, unit, reason) in curves.items():
            curve = _curve(records, keys)
            if curve is None:
                missing = "the run has no record of this curve"
                figures[name] = undefined(missing if subject.has_noise else reason or missing)
            else:
                figures[name] = Figure(curve, unit, held_out or len(subject.splits.train), note=note)
        return figures


def _curve(records: list[dict[str, Any]], keys: tuple[str, ...]) -> list[float] | None:
    """Return the values, one per epoch, of the first key that occurs in all records; None if no key does."""
    for key in keys:
        if all(key in record for record in records):
            return [record[key] for record in records]
    return None


def _quantiles(scale: Tensor, kind: str) -> Figure:
    """Return the quantiles of scales (N, D), where all D dimensions are of the given kind, active or idle."""
    if scale.numel() == 0:
        return undefined(f"no dimension is {kind}")
    return Figure(np.quantile(scale.numpy(), QUANTILES).tolist(), count=len(scale))
