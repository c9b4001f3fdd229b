"""What is measured over a set of images, one pass of batches: `update(inference)`, then `compute()`.

A metric that is not defined for a model gives no number for it, never a 0 or an infinity.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from vae_cli.inference import Inference


class Metric(Protocol):
    """A figure, or several, over all images that were shown."""

    def update(self, inference: Inference, penalty: Tensor) -> None: ...

    def compute(self) -> dict[str, float]: ...


class Terms:
    """The terms of the loss, nats per image: loss, distortion, penalty, and where they are defined rate, rate_loc,
    rate_scale, elbo, and rate_bits = rate / ln 2."""

    def __init__(self) -> None:
        self.count = 0
        self.names: tuple[str, ...] = ()
        self.sums: Tensor | None = None

    def update(self, inference: Inference, penalty: Tensor) -> None:
        terms = inference.terms(penalty)
        self.names = tuple(terms)
        # Doubles: a float32 sum over a large set would lose the digits that tell two modes apart.
        sums = torch.stack([term.detach() for term in terms.values()]).double().sum(1)
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += len(inference.x)

    def compute(self) -> dict[str, float]:
        if self.sums is None:
            return {}
        values = dict(zip(self.names, (self.sums / self.count).tolist(), strict=True))
        if "rate" in values:
            values["rate_bits"] = values["rate"] / math.log(2)
        return values


class Posterior:
    """Shape of the posterior over the images: active_units, loc_std, and where there is noise scale_mean, scale_min.

    A unit is active where Var_x(loc_j) exceeds 0.01 of the prior's variance in that dimension, which for N(0, I) is
    the definition of Burda et al. (2016) and for a prior of learned scale does not depend on the scale of z.
    loc_std is the root of the mean over dimensions of Var_x(loc_j); scale_mean and scale_min go over images and
    dimensions; collapsed is the share of dimensions whose mean scale is below 1 % of the standard deviation of loc.
    """

    def __init__(self) -> None:
        self.count = 0
        self.loc: Tensor | None = None
        self.square: Tensor | None = None
        self.scale: Tensor | None = None
        self.least: Tensor | None = None
        self.prior_variance: Tensor | None = None

    def update(self, inference: Inference, penalty: Tensor) -> None:
        loc = inference.loc.detach().double()
        self.loc = loc.sum(0) if self.loc is None else self.loc + loc.sum(0)
        self.square = loc.square().sum(0) if self.square is None else self.square + loc.square().sum(0)
        if inference.scale is not None:
            scale = inference.scale.detach()
            total, least = scale.double().sum(0), scale.amin(0)
            self.scale = total if self.scale is None else self.scale + total
            self.least = least if self.least is None else torch.minimum(self.least, least)
        self.prior_variance = inference.prior.variance.detach()
        self.count += len(loc)

    def compute(self) -> dict[str, float]:
        if self.loc is None or self.square is None or self.prior_variance is None:
            return {}
        variance = (self.square / self.count - (self.loc / self.count).square()).clamp_min(0)
        values = {
            "active_units": float((variance > 0.01 * self.prior_variance).sum()),
            "loc_std": float(variance.mean().sqrt()),
        }
        if self.scale is not None and self.least is not None:
            mean = self.scale / self.count
            values["scale_mean"] = float(mean.mean())
            values["scale_min"] = float(self.least.min())
            values["collapsed"] = float((mean < 0.01 * variance.sqrt()).double().mean())
        return values
