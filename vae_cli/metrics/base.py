"""The interface of metrics: the measured run that they read, and the figures that they return."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vae_cli.config.claims import GroupName
from vae_cli.core.compatibility import offers
from vae_cli.core.rng import derive_seed, evaluating
from vae_cli.metrics.record import RESAMPLINGS
from vae_cli.model.distributions import location
from vae_cli.model.inference import Inference
from vae_cli.runs.codes import FITTED
from vae_cli.runs.mixture import Mixture, fit_mixture
from vae_cli.runs.run import Run

SplitName = Literal["train", "validation", "test"]
Value = float | list[float]

CODES_PER_IMAGE = 8  # draws of z for each image, except for the importance-weighted bound
BATCH = 500  # images or codes that are processed together


@dataclass(frozen=True)
class Figure:
    """A measured quantity, with its unit, sample size and standard error.

    value   a number, or a list for a curve; None if the quantity is not defined for the run
    unit    nats, bits, draws ...; empty for a ratio or a count
    count   sample size, usually the number of images; 0 if there is no sample
    error   standard error of the value over the sample; None if unknown
    note    a caveat for the reader, for example that the value is at its upper limit
    reason  why the value is None
    parts   how much each image of the sample moves the value, to first order, in the order of the sample; None if
            unknown. They are not stored
    resampled  deviations of the value if images are resampled (see `resample`); empty if unknown
    """

    value: Value | None
    unit: str = ""
    count: int = 0
    error: Value | None = None
    note: str = ""
    reason: str = ""
    parts: Tensor | None = field(default=None, compare=False, repr=False)
    resampled: Sequence[float] = ()


def mean_figure(values: Tensor, unit: str = "", note: str = "") -> Figure:
    """Return the mean of values (N,), one per image, with its standard error std / sqrt(N)."""
    values = values.detach().cpu().double()  # Apple's GPUs have no double precision
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return Figure(float(values.mean()), unit, len(values), error, note, parts=parts_of_mean(values))


def measured(value: float, unit: str, parts: Tensor) -> Figure:
    """Return a figure of N images from its value and how much each image moves it, (N,); the standard error is
    sqrt(sum of squares N / (N - 1)), as for a mean."""
    count = len(parts)
    error = float(parts.square().sum().sqrt()) * math.sqrt(count / (count - 1)) if count > 1 else None
    return Figure(value, unit, count, error, parts=parts)


def resample(parts: Tensor, seed: int) -> tuple[float, ...]:
    """Return RESAMPLINGS deviations of a value under random changes of the sample of images, whose parts are (N,).

    Deviation b is sum_n s_bn part_n with random signs s (a multiplier bootstrap: Wu, Jackknife, Bootstrap and Other
    Resampling Methods in Regression Analysis, Annals of Statistics 1986), so its mean square is the variance of the
    value over samples of images. The signs depend only on the seed. Runs measured on the same images thus have the same
    signs, and the deviations of the difference between two runs, or of a mean over runs, are the differences or means
    of their deviations.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (len(parts), RESAMPLINGS), generator=generator, dtype=torch.float64) * 2 - 1
    return tuple(float(f"{value:.6g}") for value in (parts.cpu().double() @ signs).tolist())


def parts_of_mean(values: Tensor) -> Tensor:
    """Return how much each value moves the mean of values (N,): its deviation from the mean, divided by N."""
    return (values - values.mean()) / len(values)


def undefined(reason: str) -> Figure:
    """Return a figure without a value, with the reason why the quantity is not defined for this run."""
    return Figure(None, reason=reason)


@dataclass(frozen=True)
class Budget:
    """How many images and draws an evaluation uses. Numbers of images are upper limits: a dataset may have fewer.

    images        test images (a random subset, the same for all runs on a dataset)
    train_images  training images whose codes are used
    samples       K, the number of draws for the importance-weighted bound, which is averaged over `iw_images` images
    iw_images     test images for the importance-weighted bound
    draws         codes drawn for the mutual information and for reidentification
    points        codes at which the decoder's Jacobian is computed, for each kind of code (see Jacobian)
    pairs         pairs of test images to interpolate between
    pictures      images generated from each source of codes (see Quality), to measure sample quality
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
    "default": Budget(10_000, 60_000, 5000, 200, 2000, 64, 200, 5000),
    "full": Budget(10**9, 10**9, 5000, 10**9, 10_000, 256, 1000, 10_000),
}


class Codes(NamedTuple):
    """The codes of a split: float32, on the run's device.

    loc     the codes without noise (N, D)
    scale   the posteriors' standard deviations (N, D); None for point masses
    z       one draw of each posterior (N, D)
    labels  (N,), or None
    mean    the posteriors' means (N, D): loc, unless noise moves the mean (see `location`)
    noise   the mean over images of the posteriors' covariance (D, D); None if their dimensions are uncorrelated, so
            that `scale` determines it
    """

    loc: Tensor
    scale: Tensor | None
    z: Tensor
    labels: Tensor | None
    mean: Tensor
    noise: Tensor | None


class MeasuredRun:
    """A run, with the quantities that several metrics need, such as codes: each is computed once, in batches.

    Images come in a random order fixed by `seed`, so that the first n are a random sample. If the likelihood observes a
    random binarization of an image, `seed` fixes that, too.
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
        """Whether the posterior has noise; False for a point mass."""
        return offers(self.model.sigma, "noise")

    @property
    def is_on_sphere(self) -> bool:
        """Whether all codes lie on the sphere |z| = 1, where a Gaussian in all dimensions has no density."""
        return offers(self.model.prior, "sphere")

    @property
    def no_decoder(self) -> str:
        """The reason why codes from a file cannot be decoded; empty if there is a decoder, as every run has."""
        return getattr(self.run, "no_decoder", "")

    @property
    def channels(self) -> int | None:
        """The number of channels C if codes have the shape (C, h, w), flattened channel by channel; otherwise None."""
        latent = getattr(self.run, "config", {}).get("latent")
        return latent[0] if isinstance(latent, list | tuple) and len(latent) == 3 else None

    def stream(self, *names: object) -> int:
        """Return a seed for the purpose that the names describe, derived from the evaluation's seed."""
        return derive_seed(self.seed, "evaluate", *names)

    def positions(self, split: SplitName, most: int | None = None) -> Tensor:
        """Return the positions (N,), in a split, of the images to measure: at most `most`, in random order."""
        images = getattr(self.splits, split)
        limit = self.budget.train_images if split == "train" else self.budget.images
        limit = limit if most is None else min(limit, most)
        generator = torch.Generator().manual_seed(self.stream("order", split))
        return torch.randperm(len(images), generator=generator)[:limit]

    def batches(self, split: SplitName = "test", most: int | None = None) -> Iterator[tuple[Tensor, slice]]:
        """Yield batches of a split: images x (B, C, H, W) as the likelihood observes them, and their rows in Codes."""
        images = getattr(self.splits, split)
        start = 0
        for positions in self.positions(split, most).split(BATCH):
            x = images.batch(positions).to(self.device)
            with evaluating(self.model, self.stream("observe", split, start), self.device):
                x = self.model.likelihood.observe(x)  # type: ignore[operator]
            yield x, slice(start, start + len(x))
            start += len(x)

    def codes(self, split: SplitName = "test") -> Codes:
        """Return the codes of a split, in the order of its batches. They are cached, since they need little memory."""
        if split not in self._codes:
            loc, scale, z, mean, noise = [], [], [], [], []
            for x, rows in self.batches(split):
                with evaluating(self.model, self.stream("code", split, rows.start), self.device):
                    posterior = self.model.encode(x)
                    z.append(posterior.rsample())
                    if (covariance := getattr(posterior, "covariance_matrix", None)) is not None:
                        noise.append(covariance.double().sum(0))
                loc.append(location(posterior))
                mean.append(posterior.mean)
                if self.has_noise:
                    scale.append(posterior.stddev.expand_as(posterior.mean))
            images = getattr(self.splits, split)
            labels = None
            if images.labels is not None:
                labels = images.batch_labels(self.positions(split)).to(self.device)
            whole = torch.stack(noise).sum(0) / sum(map(len, loc)) if noise else None
            self._codes[split] = Codes(
                torch.cat(loc), torch.cat(scale) if scale else None, torch.cat(z), labels, torch.cat(mean), whole
            )
        return self._codes[split]

    def factors(self, split: SplitName = "test") -> Tensor | None:
        """Return the known factors of variation of a split's images, in the order of `codes`; None if they are unknown.

        They are float64 (N, F), on the CPU. `splits.factors` describes the columns.
        """
        images = getattr(self.splits, split)
        return None if images.factors is None else images.batch_factors(self.positions(split)).cpu().double()

    @cached_property
    def _codes(self) -> dict[str, Codes]:
        return {}

    @cached_property
    def terms(self) -> tuple[Tensor, Tensor | None]:
        """The distortion, averaged over CODES_PER_IMAGE draws of z, and the rate of each test image, float64 (N,) each,
        in nats. The rate is None for a point mass."""
        distortions, rates = [], []
        for x, rows in self.batches("test"):
            with evaluating(self.model, self.stream("terms", rows.start), self.device):
                inference = self.model(x)
                distortion = inference.distortion
                if inference.rate is not None:
                    rates.append(inference.rate)
                    for _ in range(CODES_PER_IMAGE - 1):  # one at a time: more would need much memory in a conv network
                        distortion = distortion + self.distortion(x, inference.posterior.rsample())
                    distortion = distortion / CODES_PER_IMAGE
            distortions.append(distortion)
        rate = torch.cat(rates).cpu().double() if rates else None
        return torch.cat(distortions).cpu().double(), rate

    def mixture(self, components: int) -> Mixture:
        """Return a Gaussian mixture fitted to one drawn code per training image, at most FITTED codes. It is cached."""
        if components not in self._mixtures:
            self._mixtures[components] = fit_mixture(self.codes("train").z[:FITTED], components)
        return self._mixtures[components]

    def too_few_for(self, components: int) -> str:
        """Return the reason why a mixture of this many Gaussians is no density of the training codes; empty if it is.

        A covariance matrix in D dimensions needs D + 1 codes; with fewer, the density depends on the ridge alone.
        """
        count, dimensions = self.codes("train").z.shape
        least = components * (dimensions + 1)
        if min(count, FITTED) >= least:
            return ""
        return (
            f"a mixture of {components} Gaussians in {dimensions} dimensions needs at least {least:,} training codes, "
            f"and {min(count, FITTED):,} are used"
        )

    @cached_property
    def _mixtures(self) -> dict[int, Mixture]:
        return {}

    @cached_property
    def spread(self) -> Tensor:
        """Standard deviation a (D,) of the aggregate posterior of the test images: a_j^2 = Var_x(mean_j) +
        E_x(scale_j^2)."""
        codes = self.codes("test")
        variance = codes.mean.cpu().double().var(0, correction=0)
        if codes.scale is not None:
            variance = variance + codes.scale.cpu().double().square().mean(0)
        return variance.sqrt().float().to(self.device)

    @cached_property
    def active(self) -> Tensor:
        """Whether each dimension (D,) is active: Var_x(loc_j) > 0.01 E_x(scale_j^2), as counted by `active_units`. For
        a point mass, whether Var_x(loc_j) exceeds 1e-4 of the largest such variance."""
        codes = self.codes("test")
        variance = codes.loc.cpu().double().var(0, correction=0)
        noise = None if codes.scale is None else codes.scale.cpu().double().square().mean(0)
        least = 1e-4 * variance.max() if noise is None else 0.01 * noise
        return (variance > least).to(self.device)

    def decode(self, z: Tensor) -> Tensor:
        """Return the mean images (N, C, H, W) of codes (N, D), decoded in batches on the run's device."""
        return torch.cat([self.model.decode(part).mean for part in z.split(BATCH)])

    def distortion(self, x: Tensor, z: Tensor) -> Tensor:
        """Return -ln p(x|z) in nats, (B,), for images x (B, C, H, W) and their codes z (B, D)."""
        return -self.model.decode(z).log_prob(x)


class Metric(ABC):
    """A measurement of a run: `update` receives every batch of test images, `compute` returns one or more figures.

    Most metrics need only the codes and do not override `update`. Both methods run without gradients, in evaluation
    mode, and with a random seed for each metric. A figure that is not defined for a run is returned as
    `undefined(reason)`.

    decodes  the names of all figures of a metric that decodes codes: it is not computed for codes from a file without
             their decoder. {k} stands for budget.samples
    """

    claim: ClassVar[GroupName]
    decodes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, subject: MeasuredRun) -> None:
        self.subject = subject

    def update(self, inference: Inference) -> None:  # noqa: B027 (optional)
        """Receive the model's results for the next batch of test images."""

    @abstractmethod
    def compute(self) -> dict[str, Figure]:
        """Return the figures by name (letters, digits, underscores). Titles and definitions: config/figures.toml."""


def compute_metrics(subject: MeasuredRun, kinds: Sequence[type[Metric]]) -> dict[str, dict[str, Figure]]:
    """Return the figures of each metric, keyed by the name of the metric's class.

    Each metric has its own random seed, so its figures do not depend on which other metrics are computed.
    """
    found: dict[str, dict[str, Figure]] = {}
    for kind in kinds:
        if kind.decodes and subject.no_decoder:
            names = [name.replace("{k}", str(subject.budget.samples)) for name in kind.decodes]
            found[kind.__name__] = dict.fromkeys(names, undefined(subject.no_decoder))
            continue
        with evaluating(subject.model, subject.stream("metric", kind.__name__), subject.device):
            metric = kind(subject)
            if kind.update is not Metric.update:
                for x, _ in subject.batches("test"):
                    metric.update(subject.model(x))
            found[kind.__name__] = metric.compute()
    return found


def as_plain(figure: Figure) -> dict[str, Any]:
    """Return a figure as a dictionary for JSON, without empty fields. Raises ValueError if a number is not finite."""
    empty = {"unit": "", "count": 0, "error": None, "note": "", "reason": "", "resampled": ()}
    fields = {key: getattr(figure, key) for key in ("value", *empty)}
    plain = {key: value for key, value in fields.items() if key == "value" or value != empty[key]}
    lists = (figure.value, figure.error, list(figure.resampled))
    numbers = [number for part in lists for number in (part if isinstance(part, list) else [part])]
    if not all(number is None or math.isfinite(number) for number in numbers):
        raise ValueError(f"a figure is not finite: {figure}")
    return plain


def standard_error(values: Tensor) -> list[float] | None:
    """Return the standard errors of the K column means of values (N, K) over N images; None for a single image."""
    return (values.std(0) / math.sqrt(len(values))).tolist() if len(values) > 1 else None


def curve_figure(values: Tensor, unit: str) -> Figure:
    """Return a curve of K points: the means over images of values (N, K), with their standard errors."""
    values = values.double()
    return Figure(values.mean(0).tolist(), unit, len(values), standard_error(values))
