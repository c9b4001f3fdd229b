"""What a metric is, what it gives, and what it may ask of the run it measures."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vae_cli.core.compatibility import offers
from vae_cli.core.rng import derive_seed, evaluating
from vae_cli.model.inference import Inference
from vae_cli.runs.run import Run

Claim = Literal["bits", "neighbours", "shortcuts", "scale", "price"]
SplitName = Literal["train", "validation", "test"]
Value = float | list[float]

BATCH = 500
CLAIMS: dict[Claim, str] = {
    "bits": "1. The noise limits the information that passes",
    "neighbours": "2. The noise keeps neighbours alike",
    "shortcuts": "3. Without noise, or a price on small sigma, the network takes a shortcut",
    "scale": "4. The rate pulls sigma towards 1",
    "price": "5. The price of a hard-coded sigma",
}


@dataclass(frozen=True)
class Figure:
    """One figure, with what is needed to trust it.

    value   a number, or a list of them where it is a curve; None where it is not defined, and `reason` says why
    unit    nats, bits, images ...; empty for a ratio or a count
    count   what it is a mean over, mostly images
    error   the standard error of the value over these, where there is one
    note    what a reader has to know, such as that it lies at its ceiling
    """

    value: Value | None
    unit: str = ""
    count: int = 0
    error: Value | None = None
    note: str = ""
    reason: str = ""


def mean_figure(values: Tensor, unit: str = "", note: str = "") -> Figure:
    """The mean of values (N,), one for each image, with its standard error std / sqrt(N)."""
    values = values.detach().cpu().double()  # Apple's GPUs know no doubles
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return Figure(float(values.mean()), unit, len(values), error, note)


def undefined(reason: str) -> Figure:
    """A figure that mathematics does not define for this run, and why."""
    return Figure(None, reason=reason)


@dataclass(frozen=True)
class Budget:
    """How much work an evaluation may do.

    images        test images that are looked at, at most (a random subset, the same for every run of a dataset)
    train_images  training images whose codes are used, at most
    samples       K of the importance-weighted bound, and `iw_images` the test images it is a mean over
    draws         codes drawn for the mutual information
    points        codes at which the decoder's Jacobian is taken
    pairs         pairs of test images between which to interpolate
    pictures      images for each sample quality figure
    """

    images: int
    train_images: int
    samples: int
    iw_images: int
    draws: int
    points: int
    pairs: int
    pictures: int


BUDGETS = {
    "quick": Budget(1000, 5000, 64, 200, 500, 16, 50, 1000),
    "default": Budget(10_000, 60_000, 64, 1000, 2000, 64, 200, 5000),
    "full": Budget(10**9, 10**9, 5000, 10**9, 10_000, 256, 1000, 10_000),
}


class Codes(NamedTuple):
    """The codes of a split's images: their posteriors' loc (N, D) and scale (N, D), which is None for a point mass,
    one draw z (N, D), and the labels (N,) where there are any; float32 on the run's device."""

    loc: Tensor
    scale: Tensor | None
    z: Tensor
    labels: Tensor | None


class MeasuredRun:
    """A run under measurement: what several metrics need is computed once, over batches, and the same for all of them.

    Images are looked at in an order that is random and fixed by `seed`, so that the first n of them are a fair choice.
    What the likelihood observes of an image (a binarization that draws) is drawn once and stays.
    """

    def __init__(self, run: Run, budget: Budget, seed: int = 0) -> None:
        self.run = run
        self.model = run.model
        self.device = run.device
        self.budget = budget
        self.seed = seed
        self.splits = run.splits

    @property
    def has_noise(self) -> bool:
        """Whether the posterior is more than a point mass."""
        return offers(self.model.sigma, "noise")

    def stream(self, *names: object) -> int:
        """A seed for one purpose."""
        return derive_seed(self.seed, "evaluate", *names)

    def positions(self, split: SplitName, most: int | None = None) -> Tensor:
        """The images of a split that are looked at, in their order, (N,)."""
        images = getattr(self.splits, split)
        limit = self.budget.train_images if split == "train" else self.budget.images
        limit = limit if most is None else min(limit, most)
        generator = torch.Generator().manual_seed(self.stream("order", split))
        return torch.randperm(len(images), generator=generator)[:limit]

    def batches(self, split: SplitName = "test", most: int | None = None) -> Iterator[tuple[Tensor, slice]]:
        """Yield what the likelihood observes of the images of a split, x (B, C, H, W), and the rows of its codes that
        belong to them."""
        images = getattr(self.splits, split)
        start = 0
        for positions in self.positions(split, most).split(BATCH):
            x = images.batch(positions).to(self.device)
            with evaluating(self.model, self.stream("observe", split, start), self.device):
                x = self.model.likelihood.observe(x)  # type: ignore[operator]
            yield x, slice(start, start + len(x))
            start += len(x)

    def codes(self, split: SplitName = "test") -> Codes:
        """The codes of a split, in the order of its batches. They are kept: D numbers an image, and no pixels."""
        if split not in self._codes:
            loc, scale, z = [], [], []
            for x, rows in self.batches(split):
                with evaluating(self.model, self.stream("code", split, rows.start), self.device):
                    posterior = self.model.encode(x)
                    z.append(posterior.rsample())
                loc.append(posterior.mean)
                if self.has_noise:
                    scale.append(posterior.stddev.expand_as(posterior.mean))
            images = getattr(self.splits, split)
            labels = None
            if images.labels is not None:
                labels = images.batch_labels(self.positions(split)).to(self.device)
            self._codes[split] = Codes(torch.cat(loc), torch.cat(scale) if scale else None, torch.cat(z), labels)
        return self._codes[split]

    @cached_property
    def _codes(self) -> dict[str, Codes]:
        return {}

    @cached_property
    def spread(self) -> Tensor:
        """a (D,), the standard deviation of the aggregate posterior of the test images in each dimension:
        a_j^2 = Var_x(loc_j) + E_x(scale_j^2)."""
        codes = self.codes("test")
        variance = codes.loc.cpu().double().var(0, correction=0)
        if codes.scale is not None:
            variance = variance + codes.scale.cpu().double().square().mean(0)
        return variance.sqrt().float().to(self.device)

    @cached_property
    def active(self) -> Tensor:
        """Which dimensions (D,) carry something: Var_x(loc_j) > 0.01 E_x(scale_j^2), as `active_units` counts them; for
        a point mass those whose variance exceeds 1e-4 of the largest."""
        codes = self.codes("test")
        variance = codes.loc.cpu().double().var(0, correction=0)
        noise = None if codes.scale is None else codes.scale.cpu().double().square().mean(0)
        least = 1e-4 * variance.max() if noise is None else 0.01 * noise
        return (variance > least).to(self.device)

    def decode(self, z: Tensor) -> Tensor:
        """The mean images (N, C, H, W) of codes (N, D), batch by batch, on the run's device."""
        return torch.cat([self.model.decode(part).mean for part in z.split(BATCH)])

    def distortion(self, x: Tensor, z: Tensor) -> Tensor:
        """-log p(x|z) in nats, (B,), of images (B, C, H, W) at codes (B, D)."""
        return -self.model.decode(z).log_prob(x)


class Metric(ABC):
    """A figure of a run, or several: `update` is shown every batch of test images, `compute` gives the figures.

    Most look at nothing but the codes, and need no update. Both are called without gradients, in evaluation mode, and
    with random numbers of the metric's own. What is not defined for a run is given as `undefined(reason)`.
    """

    claim: ClassVar[Claim]

    def __init__(self, subject: MeasuredRun) -> None:
        self.subject = subject

    def update(self, inference: Inference) -> None:  # noqa: B027 (most have nothing to see)
        """See the next batch of test images."""

    @abstractmethod
    def compute(self) -> dict[str, Figure]:
        """The figures by name, in letters, digits and underscores."""


def compute_metrics(subject: MeasuredRun, kinds: Sequence[type[Metric]]) -> dict[str, dict[str, Figure]]:
    """The figures of each metric by the metric's name.

    A metric draws from a stream of its own, so that its figures do not depend on what else is measured.
    """
    found: dict[str, dict[str, Figure]] = {}
    for kind in kinds:
        with evaluating(subject.model, subject.stream("metric", kind.__name__), subject.device):
            metric = kind(subject)
            if kind.update is not Metric.update:
                for x, _ in subject.batches("test"):
                    metric.update(subject.model(x))
            found[kind.__name__] = metric.compute()
    return found


def as_plain(figure: Figure) -> dict[str, Any]:
    """A figure as JSON has it, without what is empty. Raises ValueError where a number is not finite."""
    empty = {"unit": "", "count": 0, "error": None, "note": "", "reason": ""}
    plain = {key: value for key, value in vars(figure).items() if key == "value" or value != empty[key]}
    numbers = [
        number for part in (figure.value, figure.error) for number in (part if isinstance(part, list) else [part])
    ]
    if not all(number is None or math.isfinite(number) for number in numbers):
        raise ValueError(f"a figure is not finite: {figure}")
    return plain


def standard_error(values: Tensor) -> list[float] | None:
    """The standard error over images of the mean of values (N, K), of each of the K; None for a single image."""
    return (values.std(0) / math.sqrt(len(values))).tolist() if len(values) > 1 else None


def curve_figure(values: Tensor, unit: str) -> Figure:
    """The means over images of values (N, K), a curve of K points, with their standard errors."""
    values = values.double()
    return Figure(values.mean(0).tolist(), unit, len(values), standard_error(values))
