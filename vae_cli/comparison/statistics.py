"""Statistics over seeds and test images: means with intervals, differences between arms, tests, and interpolation."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

LEVEL = 0.95
ROUNDING = 1e-6  # relative error of a figure that is computed in float32
RESAMPLES = 2000  # bootstrap samples for the interval of a correlation
FEWEST = 5  # points for the interval of a correlation: with fewer, most bootstrap samples repeat one or two of them


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


def along(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """Interpolate linearly along a path through the points (x, y), in their order, and return y where x = `at`.

    None if the path does not reach x = `at`, or reaches it more than once with different y.

    >>> along([(0.0, 1.0), (2.0, 5.0), (3.0, 5.0)], 1.0)
    3.0
    >>> along([(0.0, 1.0), (2.0, 5.0), (1.0, 6.0)], 1.5) is None
    True
    """
    found = []
    for (x0, y0), (x1, y1) in pairwise(points):
        if min(x0, x1) <= at <= max(x0, x1):
            found += [y0, y1] if x1 == x0 else [y0 + (y1 - y0) * (at - x0) / (x1 - x0)]
    if not found or not all(math.isclose(y, found[0], rel_tol=1e-9, abs_tol=1e-12) for y in found):
        return None
    return found[0]


def could_be_lowest(arms: Sequence[Mapping[int, float]], alpha: float = 1 - LEVEL) -> list[bool]:
    """Return, for each arm's values by seed, whether its true mean could be the lowest of all k arms.

    With probability 1 - alpha or more, the arm whose true mean is the lowest is among those that could be: an arm is
    ruled out only if, for some other arm, the hypothesis that its mean is not higher than the other's is rejected by a
    one-sided t-test at level alpha / (k - 1). The tests are those of `difference`: paired if the arms have at least two
    seeds in common, otherwise Welch's. Bonferroni's inequality over the k - 1 tests of the best arm gives the bound.
    This is the set of Hsu, Simultaneous Confidence Intervals for all Distances from the "Best", Annals of Statistics
    1981, without its assumption of equal variances. Comparing every arm only with the one that has the lowest observed
    mean, at the usual level, would ignore that this one was chosen because it was observed to be low, and would rule
    out the best arm too often.

    An arm without values is never ruled out, and rules out none; nor does a difference without an interval.
    """
    share = alpha / max(1, len(arms) - 1)
    return [not any(_is_higher(one, other, share) for other in arms if other is not one) for one in arms]


def _is_higher(one: Mapping[int, float], other: Mapping[int, float], alpha: float) -> bool:
    """Return whether a one-sided t-test at level alpha says that the mean of `one` is higher."""
    found = difference("", "", one, "", other)
    if found is None or found.interval is None or found.value <= 0:
        return False
    seeds = (found.interval[1] - found.interval[0]) / 2 / quantile(found.degrees)
    rounding = ROUNDING * max(abs(statistic(list(values.values())).mean) for values in (one, other))
    return tail(found.degrees, found.value / math.hypot(seeds, rounding)) / 2 <= alpha


class Correlation(NamedTuple):
    """Spearman's rank correlation of n points, with a 95 % interval; the interval is None if there are few points."""

    value: float
    interval: tuple[float, float] | None
    n: int


def correlation(points: Sequence[tuple[float, float]], resamples: int = RESAMPLES) -> Correlation | None:
    """Return Spearman's rank correlation of points (x, y), with a percentile bootstrap interval over the points.

    Equal values have the mean of their ranks. The interval treats the points as independent draws from a population of
    points. None if there are fewer than two points, or if all x or all y are equal.
    """
    value = _spearman(points)
    if value is None:
        return None
    if len(points) < FEWEST:
        return Correlation(value, None, len(points))
    draw = random.Random(0)  # the same points always have the same interval
    samples = (_spearman(draw.choices(points, k=len(points))) for _ in range(resamples))
    found = sorted(sample for sample in samples if sample is not None)
    cut = round((1 - LEVEL) / 2 * (len(found) - 1))
    return Correlation(value, (found[cut], found[-1 - cut]), len(points))


def _spearman(points: Sequence[tuple[float, float]]) -> float | None:
    if len(points) < 2:
        return None
    x, y = (_ranks([point[axis] for point in points]) for axis in (0, 1))
    middle = (len(points) - 1) / 2
    spread = math.sqrt(math.fsum((a - middle) ** 2 for a in x) * math.fsum((b - middle) ** 2 for b in y))
    if spread == 0:
        return None
    value = math.fsum((a - middle) * (b - middle) for a, b in zip(x, y, strict=True)) / spread
    return max(-1.0, min(1.0, value))


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the ranks of values, from 0; equal values have the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            ranks[place] = (start + end) / 2
        start = end + 1
    return ranks
