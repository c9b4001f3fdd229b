"""Statistics over seeds and test images: means with intervals, differences between arms, tests, and interpolation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

LEVEL = 0.95
ROUNDING = 1e-6  # relative error of a figure that is computed in float32


class Statistic(NamedTuple):
    """The mean of a figure over n seeds, and its standard deviation s (n - 1 in the denominator; None for one seed)."""

    mean: float
    sd: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean by Student's t, mean +- t s / sqrt(n).

        None for one seed, and if all values are equal: they say nothing about how much further ones would differ.
        """
        if not self.sd:
            return None
        half = quantile(self.n - 1) * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half


def statistic(values: Sequence[float]) -> Statistic:
    """Return the mean and standard deviation of one or more values."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Statistic(mean, None, 1)
    return Statistic(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)), n)


@cache
def quantile(degrees: float, level: float = LEVEL) -> float:
    """Return the quantile of Student's t for a two-sided interval at this level."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # scipy.stats calls it too, but takes half a second to import

    return float(stdtrit(degrees, (1 + level) / 2))


def tail(degrees: float, t: float) -> float:
    """Return the probability that Student's t is at least as far from 0 as `t`."""
    from scipy.special import stdtr

    return float(2 * stdtr(degrees, -abs(t)))


@dataclass(frozen=True)
class Difference:
    """How much higher a figure is in one arm than in another, with a 95 % interval.

    If the arms have at least two seeds in common, it is a paired comparison: Student's t interval over the differences
    between runs with the same seed, which train on the images in the same order. Otherwise it is Welch's interval. It
    is None if either arm has only one seed, or if the differences of all seeds are equal.
    """

    figure: str
    arm: str
    reference: str
    value: float
    interval: tuple[float, float] | None
    seeds: int
    is_paired: bool
    degrees: float = 0.0  # of freedom, of the interval

    @property
    def is_real(self) -> bool | None:
        """Whether the interval excludes 0. Without an interval: False if several seeds all differ by 0, else None."""
        if self.interval is None:
            return False if self.value == 0 and self.seeds > 1 else None
        return self.interval[0] > 0 or self.interval[1] < 0

    @property
    def why_unknown(self) -> str:
        """Why there is no interval, if there is none."""
        return "one seed" if self.seeds == 1 else f"the same difference in all {self.seeds} seeds"


def difference(
    figure: str, arm: str, of: Mapping[int, float], reference: str, than: Mapping[int, float]
) -> Difference | None:
    """Return the difference between two arms, `of` minus `than`, from their values by seed; None if either is empty."""
    if not of or not than:
        return None
    common = sorted(of.keys() & than.keys())
    if len(common) > 1:
        gaps = statistic([exact_difference(of[seed], than[seed]) for seed in common])
        return Difference(figure, arm, reference, gaps.mean, gaps.interval, len(common), True, len(common) - 1)
    one, other = statistic(list(of.values())), statistic(list(than.values()))
    value, seeds = exact_difference(one.mean, other.mean), min(one.n, other.n)
    if one.sd is None or other.sd is None:
        return Difference(figure, arm, reference, value, None, seeds, False)
    a, b = one.sd**2 / one.n, other.sd**2 / other.n
    if a + b == 0:
        return Difference(figure, arm, reference, value, None, seeds, False)
    degrees = (a + b) ** 2 / (a**2 / (one.n - 1) + b**2 / (other.n - 1))
    half = quantile(degrees) * math.sqrt(a + b)
    return Difference(figure, arm, reference, value, (value - half, value + half), seeds, False, degrees)


@dataclass(frozen=True)
class Contrast:
    """How much higher a figure is in one arm than in another, with the uncertainty from seeds and from test images.

    The squared error is V_s + V_i. V_s is the variance of the mean difference over seeds: paired if the arms have at
    least two seeds in common, otherwise as in Welch's test. V_i is its variance over samples of test images, with the
    seeds as they are; runs are measured on the same images, so what all of them share cancels. V_s and V_i both contain
    the variance due to single images in single seeds, which makes the error slightly too large. (value - truth) / error
    is compared with Student's t with the degrees of freedom of V_s alone. This errs on the safe side: V_i is known
    better. Satterthwaite's approximation does not: with few seeds, V_s is often much too small by chance, and then V_i
    would dominate the degrees of freedom.

    Figures are computed in float32. Their rounding error, ROUNDING times the larger of the two, is added to the error,
    so that two figures that are equal but for rounding do not differ.

    error and degrees are None if there is no error: with one seed, if the difference is the same in all seeds, or if
    the dependence on the images is unknown.
    """

    figure: str
    arm: str
    reference: str
    value: float
    error: float | None
    degrees: float | None
    seeds: int
    why_unknown: str = ""

    @property
    def p(self) -> float | None:
        """The two-sided p-value of the hypothesis that the figure is the same in both arms."""
        if self.error is None or self.degrees is None:
            return None
        return tail(self.degrees, self.value / self.error)

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """Return the interval of the difference at this level; None without an error."""
        if self.error is None or self.degrees is None:
            return None
        half = quantile(self.degrees, level) * self.error
        return self.value - half, self.value + half


class Sample(NamedTuple):
    """A figure in one arm, by seed: its values, and their deviations under resampling of the test images."""

    values: Mapping[int, float]
    deviations: Mapping[int, Sequence[float]]


def contrast(figure: str, arm: str, of: Sample, reference: str, than: Sample) -> Contrast | None:
    """Return the contrast between two arms, `of` minus `than`; None if either has no value."""
    found = difference(figure, arm, of.values, reference, than.values)
    if found is None:
        return None
    seeds = sorted(of.values.keys() & than.values.keys()) if found.is_paired else []
    chosen = [(sample, seeds or sorted(sample.values)) for sample in (of, than)]
    if found.interval is None:
        return Contrast(figure, arm, reference, found.value, None, None, found.seeds, found.why_unknown)
    if not all(sample.deviations.get(seed) for sample, own in chosen for seed in own):
        why = "how it depends on the test images was not measured"
        return Contrast(figure, arm, reference, found.value, None, None, found.seeds, why)
    one, other = (_mean_of([sample.deviations[seed] for seed in own]) for sample, own in chosen)
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    of_images = math.fsum(gap * gap for gap in gaps) / len(gaps)
    half = (found.interval[1] - found.interval[0]) / 2
    rounding = ROUNDING * max(abs(statistic([sample.values[seed] for seed in own]).mean) for sample, own in chosen)
    error = math.hypot(half / quantile(found.degrees), math.sqrt(of_images), rounding)
    return Contrast(figure, arm, reference, found.value, error, found.degrees, found.seeds)


def _mean_of(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of each column."""
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def holm(p_values: Sequence[float], alpha: float = 1 - LEVEL) -> list[float]:
    """Return the level of the interval of each hypothesis, such that the intervals that exclude 0 are those of the
    hypotheses that Holm's procedure rejects: the probability of rejecting any true one is at most alpha.

    The hypothesis with the i-th smallest of m p-values has the level 1 - alpha / (m - i + 1); those after the first one
    that is not rejected have the level of that one. Holm, A Simple Sequentially Rejective Multiple Test Procedure,
    Scandinavian Journal of Statistics 1979.

    >>> [round(level, 4) for level in holm([0.04, 0.001, 0.03])]
    [0.975, 0.9833, 0.975]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    levels, rank = [0.0] * len(p_values), 0
    for place in order:
        share = alpha / (len(p_values) - rank)
        levels[place] = 1 - share
        if p_values[place] <= share:
            rank += 1
        else:
            for later in order[order.index(place) :]:
                levels[later] = 1 - share
            break
    return levels


def exact_difference(a: float, b: float) -> float:
    """Return a - b, or exactly 0 if the two differ only by rounding."""
    return 0.0 if math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) else a - b


def interpolate(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """Interpolate linearly between points (x, y), and return y at x = `at`; None outside of their range.

    >>> interpolate([(0.0, 1.0), (2.0, 5.0)], 1.0)
    3.0
    """
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if x0 <= at <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None
