"""Statistics over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

LEVEL = 0.95


# Statistics over seeds.


class Statistic(NamedTuple):
    """A figure over n seeds: its mean, standard deviation (n - 1 in the denominator), and the 95 % interval of the
    mean by Student's t, mean +- t s / sqrt(n). One seed has neither of the last two."""

    mean: float
    sd: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.sd is None:
            return None
        half = quantile(self.n - 1) * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half


def statistic(values: Sequence[float]) -> Statistic:
    """The statistic of one value or more."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Statistic(mean, None, 1)
    return Statistic(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)), n)


@cache
def quantile(degrees: float) -> float:
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # what scipy.stats asks, without its half second

    return float(stdtrit(degrees, (1 + LEVEL) / 2))


@dataclass(frozen=True)
class Difference:
    """How much higher a figure is in one arm than in another, with the 95 % interval of that.

    Where both arms have at least two seeds in common, the interval is Student's over the differences of runs of the
    same seed (which share the order of the images); else it is Welch's. With one seed in either arm there is none.
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
        """Whether the interval excludes 0; None where there is no interval."""
        return None if self.interval is None else self.interval[0] > 0 or self.interval[1] < 0


def difference(
    figure: str, arm: str, of: Mapping[int, float], reference: str, than: Mapping[int, float]
) -> Difference | None:
    """The difference between the values by seed of two arms, or None where one of them has no value."""
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
    half = 0.0
    if a + b > 0:
        degrees = (a + b) ** 2 / (a**2 / (one.n - 1) + b**2 / (other.n - 1))
        half = quantile(degrees) * math.sqrt(a + b)
    return Difference(figure, arm, reference, value, (value - half, value + half), seeds, False)


def exact_difference(a: float, b: float) -> float:
    """a - b, without what rounding leaves of equal numbers."""
    return 0.0 if math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) else a - b


def interpolate(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """The height at `at` of the straight lines between points (x, y), or None outside their range."""
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if x0 <= at <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None
