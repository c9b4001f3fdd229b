"""Statistics over seeds: means with intervals, differences between arms, and interpolation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

LEVEL = 0.95


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
def quantile(degrees: float) -> float:
    """Return the quantile of Student's t for a two-sided interval at LEVEL."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # scipy.stats calls it too, but takes half a second to import

    return float(stdtrit(degrees, (1 + LEVEL) / 2))


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
        return Difference(figure, arm, reference, gaps.mean, gaps.interval, len(common), True)
    one, other = statistic(list(of.values())), statistic(list(than.values()))
    value, seeds = exact_difference(one.mean, other.mean), min(one.n, other.n)
    if one.sd is None or other.sd is None:
        return Difference(figure, arm, reference, value, None, seeds, False)
    a, b = one.sd**2 / one.n, other.sd**2 / other.n
    if a + b == 0:
        return Difference(figure, arm, reference, value, None, seeds, False)
    degrees = (a + b) ** 2 / (a**2 / (one.n - 1) + b**2 / (other.n - 1))
    half = quantile(degrees) * math.sqrt(a + b)
    return Difference(figure, arm, reference, value, (value - half, value + half), seeds, False)


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
