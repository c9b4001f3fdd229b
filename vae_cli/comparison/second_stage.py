"""Which noise, at which level, gives codes that a second stage learns best: the statistics, without words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from vae_cli.comparison.arms import Arm, Comparison
from vae_cli.comparison.labels import BETA
from vae_cli.comparison.noise_families import (
    LEAST,
    RECONSTRUCTION,
    NoiseFamily,
    generation,
    noise_families,
    stages_of,
    without_noise,
)
from vae_cli.comparison.statistics import (
    Correlation,
    Difference,
    Statistic,
    along,
    correlation,
    could_be_lowest,
    difference,
    statistic,
)

RATE = "rate"
PREDICTOR, PREDICTED = "viv", "frechet_flow"
PLACES = (0.05, 0.35, 0.65, 0.95)  # of the common rates, as shares of the logarithmic range of the reference family


@dataclass(frozen=True)
class BestLevel:
    """The arm of a family whose images have the lowest mean figure, and the arms that could have it in truth.

    candidates  the arms that `could_be_lowest` keeps: with 95 % probability, the best level is one of theirs
    is_judged   whether there is more than one level, and more than one seed to judge them by
    """

    family: NoiseFamily
    stage: str
    arm: Arm
    candidates: list[Arm]
    is_judged: bool

    @property
    def is_decided(self) -> bool:
        """Whether a single level is left."""
        return self.is_judged and len(self.candidates) == 1

    @property
    def is_flat(self) -> bool:
        """Whether every level could be the best."""
        return len(self.candidates) == len(self.family.at(generation(self.stage)))

    @property
    def edge(self) -> str:
        """`lowest` or `highest` if the best level is at an end of the levels tried, otherwise empty."""
        arms = self.family.at(generation(self.stage))
        if len(arms) == 1:
            return ""
        return {arms[0].label: "lowest", arms[-1].label: "highest"}.get(self.arm.label, "")


@dataclass(frozen=True)
class Rank:
    """A noise family in the ranking of a second stage: its figure by seed, and whether its mean could be the lowest.

    family  None for the arm without noise
    values  for each seed, the figure at the level with the lowest mean over the other seeds. A level that is chosen by
            the same seeds by which it is measured would look better than it is, and more so the more levels a family
            has; this one has no such advantage.
    """

    label: str
    family: NoiseFamily | None
    values: Mapping[int, float]
    could_be_best: bool

    @property
    def stat(self) -> Statistic:
        """The mean and the standard deviation over seeds."""
        return statistic(list(self.values.values()))


@dataclass(frozen=True)
class AtEqual:
    """A family's figure at a given rate (or reconstruction), minus that of the reference family at the same one.

    at          the common rate or reconstruction; None for an arm that is compared at its own
    own         the mean of its own rate or reconstruction if `at` is None
    difference  None for the reference family itself, and if either family does not reach it in every seed, or reaches
                it at several levels
    stat        the family's own figure there, if all of its seeds reach it
    """

    family: str
    stage: str
    at: float | None
    own: float | None
    difference: Difference | None
    stat: Statistic | None


class SecondStages:
    """The second stages of a comparison: the best levels, a ranking of the noises, and comparisons at equal rate and at
    equal reconstruction.

    stages  from the one that decides to the simplest
    silent  the arm without noise, or None
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.families = noise_families(comparison)
        self.stages = stages_of(comparison)[::-1]
        self.silent = without_noise(comparison)

    @property
    def is_reportable(self) -> bool:
        """Whether some family has enough levels."""
        return any(len(family.at(generation(stage))) >= LEAST for family in self.families for stage in self.stages)

    def best(self, family: NoiseFamily, stage: str) -> BestLevel | None:
        """Return the best level of a family for a second stage; None if the family has no figure for it."""
        name = generation(stage)
        arms = family.at(name)
        if not arms:
            return None
        kept = could_be_lowest([arm.by_seed(name) for arm in arms])
        best = min(arms, key=lambda arm: statistic(list(arm.by_seed(name).values())).mean)
        candidates = [arm for arm, could in zip(arms, kept, strict=True) if could or arm is best]
        is_judged = len(arms) > 1 and all(len(arm.by_seed(name)) > 1 for arm in arms)
        return BestLevel(family, stage, best, candidates, is_judged)

    def ranking(self, stage: str) -> list[Rank]:
        """Return the families and the arm without noise in ascending order of their mean figure. Those without two
        seeds (of a family: two that all of its levels share) are left out."""
        name = generation(stage)
        rows: list[tuple[str, NoiseFamily | None, Mapping[int, float]]] = [
            (family.label, family, tuned(family, name)) for family in self.families if family.at(name)
        ]
        if self.silent is not None:
            rows.append((self.silent.label, None, self.silent.by_seed(name)))
        kept = [row for row in rows if len(row[2]) > 1]
        could = could_be_lowest([values for *_, values in kept])
        ranks = [Rank(*row, could_be_best=best) for row, best in zip(kept, could, strict=True)]
        return sorted(ranks, key=lambda rank: rank.stat.mean)

    def cost(self, arm: Arm) -> Difference | None:
        """Return how much worse an arm reconstructs than the arm without noise; None if either lacks the figure."""
        return None if self.silent is None else self.comparison.difference(RECONSTRUCTION, arm, self.silent)

    @cached_property
    def reference(self) -> NoiseFamily | None:
        """The family that the others are compared with at equal rate: the one whose sigma is learned or, if there is
        none, the reference arm's own, or the one with the most levels."""
        ladders = [family for family in self.families if len(family.arms) > 1]
        own = self.comparison.reference.label

        def fitness(family: NoiseFamily) -> tuple[bool, bool, int]:
            is_own = any(arm.label == own for arm in family.arms)
            return family.arms[0].learns_sigma and family.key == BETA, is_own, len(family.arms)

        return max(ladders, key=fitness, default=None)

    @cached_property
    def at_equal_rate(self) -> list[AtEqual]:
        """Every family's figure minus that of the reference family, at common rates."""
        return self._at_equal(RATE)

    @cached_property
    def at_equal_reconstruction(self) -> list[AtEqual]:
        """Every family's figure minus that of the reference family, at common Fréchet distances of reconstructions."""
        return self._at_equal(RECONSTRUCTION)

    def _at_equal(self, equal: str) -> list[AtEqual]:
        if self.reference is None:
            return []
        places = common_places(self.reference, equal)
        found = []
        for stage in self.stages:
            name = generation(stage)
            other = Curve(self.reference, equal, name)
            for family in self.families:
                if len(family.at(name)) > 1:
                    curve = Curve(family, equal, name)
                    found += [_compared(curve, other, stage, place) for place in places]
                elif family.at(name) and family is not self.reference:
                    found += _at_its_own(family.label, family.arms[0], other, stage, equal)
            if self.silent is not None:
                found += _at_its_own(self.silent.label, self.silent, other, stage, equal)
        return found

    @cached_property
    def prediction(self) -> Correlation | None:
        """The rank correlation over arms between the velocity's irreducible variance and the figure of flow matching,
        each a mean over seeds; None if fewer than two arms have both."""
        return correlation([(x, y) for _, x, y in self.predicted])

    @cached_property
    def predicted(self) -> list[tuple[Arm, float, float]]:
        """The arms that have both, with the means of both."""
        pairs = [(arm, arm.stat(PREDICTOR), arm.stat(PREDICTED)) for arm in self.comparison.arms]
        return [(arm, x.mean, y.mean) for arm, x, y in pairs if x is not None and y is not None]

    @cached_property
    def comparisons(self) -> int:
        """The number of differences at equal rate and at equal reconstruction that have an interval."""
        found = [*self.at_equal_rate, *self.at_equal_reconstruction]
        return sum(one.difference is not None and one.difference.interval is not None for one in found)


def second_stages(comparison: Comparison) -> SecondStages | None:
    """Return the second stages of a comparison; None unless some family of noise levels has their figures."""
    found = SecondStages(comparison)
    return found if found.is_reportable else None


def tuned(family: NoiseFamily, name: str) -> dict[int, float]:
    """Return, for each seed, a figure at the level with the lowest mean over the other seeds.

    With a single level, these are its own values. Empty if the levels do not share at least two seeds.
    """
    rows = [arm.by_seed(name) for arm in family.at(name)]
    if len(rows) == 1:
        return dict(rows[0])
    seeds = sorted(set(rows[0]).intersection(*rows[1:]))
    if len(seeds) < 2:
        return {}

    def without(seed: int) -> Mapping[int, float]:
        return min(rows, key=lambda row: math.fsum(row[other] for other in seeds if other != seed))

    return {seed: without(seed)[seed] for seed in seeds}


class Curve:
    """A figure of a family against another one, `equal`, for each seed: a path from level to level.

    `equal` is on a logarithmic scale, since rates and distances differ by factors; the figure is on a linear one.
    """

    def __init__(self, family: NoiseFamily, equal: str, name: str) -> None:
        self.family, self.name = family, name
        self.paths: dict[int, list[tuple[float, float]]] = {}
        for arm in family.arms:
            x, y = arm.by_seed(equal), arm.by_seed(name)
            for seed in x.keys() & y.keys():
                if x[seed] > 0:
                    self.paths.setdefault(seed, []).append((math.log(x[seed]), y[seed]))

    def values(self, at: Callable[[int], float | None]) -> dict[int, float]:
        """Return the figure of each seed at a place that may differ between seeds; seeds that do not reach it, or reach
        it at several levels, are left out."""
        found = {}
        for seed, path in self.paths.items():
            place = at(seed)
            value = None if place is None or place <= 0 else along(path, math.log(place))
            if value is not None:
                found[seed] = value
        return found


def common_places(family: NoiseFamily, equal: str) -> list[float]:
    """Return a few rates (or reconstructions) that every seed of a family reaches, rounded to two digits: evenly spaced
    in their logarithms. Empty if the seeds have no range in common."""
    rows = [arm.by_seed(equal) for arm in family.arms if arm.by_seed(equal)]
    seeds = set[int]().union(*rows)
    ranges = [[row[seed] for row in rows if row.get(seed, 0.0) > 0] for seed in seeds]
    ranges = [values for values in ranges if len(values) > 1]
    if not ranges:
        return []
    low, high = max(map(min, ranges)), min(map(max, ranges))
    if low >= high:
        return []
    places = [float(f"{low * (high / low) ** share:.2g}") for share in PLACES]
    return [place for place in dict.fromkeys(places) if low <= place <= high]


def _compared(curve: Curve, other: Curve, stage: str, place: float) -> AtEqual:
    """Return the comparison of two families at one place; without a number unless every seed of both reaches it."""
    own, than = curve.values(lambda seed: place), other.values(lambda seed: place)
    label = curve.family.label
    stat = statistic(list(own.values())) if own and len(own) == len(curve.paths) else None
    if stat is None or len(than) < len(other.paths) or curve.family is other.family:
        return AtEqual(label, stage, place, None, None, stat)
    return AtEqual(label, stage, place, None, _gap(curve.name, label, own, other, than), stat)


def _at_its_own(label: str, arm: Arm, other: Curve, stage: str, equal: str) -> list[AtEqual]:
    """Return the comparison of an arm with the reference family at the arm's own rate (or reconstruction), in a list;
    empty if the arm has none, as the rate of a point mass."""
    x, y = arm.by_seed(equal), arm.by_seed(other.name)
    stat, own = arm.stat(other.name), arm.stat(equal)
    if stat is None or own is None:
        return []
    than = other.values(x.get)
    values = {seed: y[seed] for seed in than.keys() & y.keys()}
    if len(values) < len(y):
        return [AtEqual(label, stage, None, own.mean, None, stat)]
    return [AtEqual(label, stage, None, own.mean, _gap(other.name, label, values, other, than), stat)]


def _gap(name: str, label: str, own: Mapping[int, float], other: Curve, than: Mapping[int, float]) -> Difference | None:
    return difference(name, label, own, other.family.label, than)
