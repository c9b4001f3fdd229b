"""Arms: runs grouped by the settings that differ, and compared with one of the arms, the reference."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vae_cli.comparison.labels import BETA, labels_of, usual_value
from vae_cli.comparison.members import Member, all_keys
from vae_cli.comparison.statistics import (
    Contrast,
    Difference,
    Sample,
    Statistic,
    contrast,
    difference,
    interpolate,
    statistic,
)
from vae_cli.config import catalog
from vae_cli.config.naming import show
from vae_cli.core.errors import UserError, nearest

FEW = 8  # if there are more arms, plots and tables show only the usual weight of the regularizer and weight 0


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed."""

    label: str
    settings: dict[str, Any]  # only the settings that differ between arms
    members: list[Member]

    @property
    def seeds(self) -> list[int]:
        """The seed of each run, in the order of `members`."""
        return [member.seed for member in self.members]

    @cached_property
    def _scalars(self) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {}
        for member in self.members:
            for name in member.figures:
                if (value := member.scalar(name)) is not None:
                    found.setdefault(name, {})[member.seed] = value
        return found

    @cached_property
    def _stats(self) -> dict[str, Statistic]:
        return {name: statistic(list(values.values())) for name, values in self._scalars.items()}

    def by_seed(self, name: str) -> Mapping[int, float]:
        """Return the values of a scalar figure by seed; runs that lack the figure are left out."""
        return self._scalars.get(name, {})

    def stat(self, name: str) -> Statistic | None:
        """Return the statistics of a scalar figure over seeds; None if no run has the figure."""
        return self._stats.get(name)

    def sample(self, name: str) -> Sample:
        """Return the values of a scalar figure by seed, and their deviations under resampling of the test images."""
        stored = {member.seed: member.figures.get(name, {}).get("resampled", []) for member in self.members}
        return Sample(self.by_seed(name), stored)

    def curves(self, name: str) -> list[list[float]]:
        """Return a curve (a figure that is a list of numbers) from each run that has it. If the lengths differ, return
        only the curves of the most common length."""
        found = [curve for member in self.members if (curve := member.curve(name)) is not None]
        lengths = Counter(len(curve) for curve in found)
        return [curve for curve in found if len(curve) == lengths.most_common(1)[0][0]]

    def reason(self, name: str) -> str | None:
        """Return why a figure was left out of the evaluations; None if it was not left out."""
        for member in self.members:
            left_out = member.evaluation.get("left_out", {})
            if name in left_out:
                return str(left_out[name].get("reason", "not defined"))
        return None

    @property
    def has_noise(self) -> bool:
        """Whether the encoder has noise."""
        return "noise" in self.members[0].noise

    @property
    def has_constant_scale(self) -> bool:
        """Whether sigma is the same for all images and dimensions; it is then treated as hard-coded.

        Noise that is not normal differs from learned noise in more than its scale.
        """
        if not {"dimensions", "smooth"} <= self.members[0].noise:
            return False
        pairs = [(member.scalar("scale_min"), member.scalar("scale_max")) for member in self.members]
        return all(a is not None and b is not None and math.isclose(a, b, rel_tol=1e-5) for a, b in pairs)

    @property
    def latent(self) -> int:
        """The number of latent dimensions, also of a code with positions, such as 2x4x4."""
        latent = self.members[0].settings["latent"]
        return math.prod(map(int, latent.split("x"))) if isinstance(latent, str) else int(latent)

    @property
    def positions(self) -> str:
        """The height and width of the code, such as 4x4; empty if it is a vector."""
        found = str(self.members[0].settings["latent"]).partition("x")[2]
        return "" if found == "1x1" else found

    @property
    def learns_sigma(self) -> bool:
        """Whether the encoder learns sigma for each image."""
        return self.members[0].settings.get("sigma") == "learned"

    @property
    def has_standard_prior(self) -> bool:
        """Whether the prior is N(0, I)."""
        return self.members[0].settings.get("prior") == "standard_normal"

    @property
    def learns_width_of_prior(self) -> bool:
        """Whether the prior is a normal whose mean and width are learned."""
        return self.members[0].settings.get("prior") == "scaled_normal"

    def differs_only_in(self, axes: Sequence[str], other: Arm) -> bool:
        """Whether two arms have equal settings, except for those of these axes."""
        keys = {key for key in (*self.settings, *other.settings) if key.partition(".")[0] not in axes}
        return all(self.settings.get(key) == other.settings.get(key) for key in keys)

    @property
    def beta(self) -> float | None:
        """The weight of the regularizer's KL term; None if it has no weight or a weight that is not constant."""
        settings = self.members[0].settings
        value = None if settings.get("regularizer") == "total_correlation" else settings.get(BETA)
        return float(value) if isinstance(value, int | float) else None

    @property
    def has_price(self) -> bool:
        """Whether the training loss has a penalty on the code: a regularizer with a weight that is not 0."""
        settings = self.members[0].settings
        others = [settings.get(f"regularizer.{name}") for name in ("weight", "lambda_od", "lambda_d")]
        return settings.get("regularizer") != "none" and (self.beta != 0 or any(others))


@dataclass(frozen=True)
class Family:
    """Arms that differ only in the regularizer's weight, in ascending order of the weight."""

    label: str
    arms: list[Arm]

    @property
    def ladder(self) -> list[Arm]:
        """The points of the family's rate-distortion curve: the arms that have a rate, a distortion and a positive
        weight. Empty if there are fewer than two."""
        rungs = [arm for arm in self.arms if arm.beta and arm.stat("rate") and arm.stat("distortion")]
        return rungs if len(rungs) > 1 else []


@dataclass(frozen=True)
class AtEqualRate:
    """The distortion of a family at the rate of the reference arm, minus the reference's own distortion.

    The family's distortion is interpolated linearly between its arms, which overestimates it if the curve is convex.
    `outside` is the family's range of rates if the reference's rate is outside of this range, else None.
    """

    family: str
    rate: float
    difference: Difference | None
    outside: tuple[float, float] | None


@dataclass(frozen=True)
class Info:
    """The unit, metric and claim of a figure (a measured quantity), and whether its value is a list of numbers."""

    unit: str
    metric: str
    claim: str
    is_curve: bool


class Comparison:
    """Evaluated runs, grouped into arms by the settings that differ, and compared with one arm, the reference.

    Raises UserError if no arm has the label `reference`.
    """

    def __init__(self, members: Sequence[Member], reference: str | None = None) -> None:
        self.members = list(members)
        everything = [member.settings for member in members]
        keys = all_keys(everything)
        self.differing = [key for key in keys if len({row.get(key) for row in everything}) > 1]
        self.equal = {key: everything[0].get(key) for key in keys if key not in self.differing}
        arms = _group(self.members, self.differing)
        self.reference = find_reference(arms, reference)
        self.arms = sorted(arms, key=self._place)
        self.families = self._families()
        self.usual = self.shown  # also in a view that shows other arms (see `only`)

    def _place(self, arm: Arm) -> tuple[Any, ...]:
        first = arm.label.partition(",")[0]
        own = self.reference.label.partition(",")[0]
        return arm is not self.reference, first != own, not arm.has_noise, first, arm.beta or 0.0, arm.label

    @cached_property
    def figures(self) -> dict[str, Info]:
        """The figures that at least one run has, by name, in the order of the evaluations."""
        found: dict[str, Info] = {}
        for member in self.members:
            for name, figure in member.figures.items():
                is_curve = isinstance(figure.get("value"), list)
                if name not in found or not found[name].unit:
                    info = Info(
                        str(figure.get("unit", "")),
                        str(figure.get("metric", "")),
                        str(figure.get("claim", "")),
                        is_curve,
                    )
                    found[name] = info
        return found

    @cached_property
    def base_beta(self) -> float | None:
        """The usual weight of the regularizer: the most common one among the arms."""
        value = usual_value(BETA, [{BETA: arm.beta} for arm in self.arms])
        return None if value is None else float(value)

    @cached_property
    def shown(self) -> list[Arm]:
        """The arms in plots and tables: all arms or, if there are more than FEW, only the reference and the arms whose
        regularizer has the usual weight, weight 0 or no constant weight."""
        if len(self.arms) <= FEW:
            return self.arms
        usual = (None, 0.0, self.base_beta)
        return [arm for arm in self.arms if arm.beta in usual or arm is self.reference]

    def only(self, arms: Sequence[Arm]) -> Comparison:
        """Return the same comparison, whose plots and tables show only these arms, with the same looks."""
        view = copy(self)
        view.shown = list(arms)
        return view

    def _families(self) -> list[Family]:
        groups: dict[Any, list[Arm]] = {}
        for arm in self.arms:
            # A beta that is not the weight of a KL term tells families apart, like any other setting.
            key = tuple(arm.settings.get(key) for key in self.differing if key != BETA or arm.beta is None)
            groups.setdefault(key, []).append(arm)
        usual = [next((arm for arm in arms if arm.beta == self.base_beta), arms[0]) for arms in groups.values()]
        labels = [without_beta(arm, self.differing) if arm.beta is not None else "" for arm in usual]
        families = []
        for arm, label, arms in zip(usual, labels, groups.values(), strict=True):
            # Families that differ in a setting that no label mentions are told apart by the weight.
            unique = label if labels.count(label) == 1 else ""
            families.append(Family(unique or arm.label, sorted(arms, key=lambda arm: arm.beta or 0.0)))
        return families

    def difference(self, figure: str, arm: Arm, reference: Arm | None = None) -> Difference | None:
        """Return how much higher a figure is in an arm than in the reference; None if one of them lacks the figure."""
        other = reference or self.reference
        return difference(figure, arm.label, arm.by_seed(figure), other.label, other.by_seed(figure))

    def contrast(self, figure: str, arm: Arm, reference: Arm) -> Contrast | None:
        """Return how much higher a figure is in one arm than in another, with the uncertainty from seeds and images."""
        return contrast(figure, arm.label, arm.sample(figure), reference.label, reference.sample(figure))

    @cached_property
    def differences(self) -> list[Difference]:
        """The difference between every arm and the reference in every scalar figure."""
        names = [name for name, info in self.figures.items() if not info.is_curve]
        pairs = [(name, arm) for name in names for arm in self.arms if arm is not self.reference]
        return [found for name, arm in pairs if (found := self.difference(name, arm)) is not None]

    @cached_property
    def at_equal_rate(self) -> list[AtEqualRate]:
        """The distortion of each family at the reference's rate. The reference's own family, and families without a
        rate-distortion curve, are left out."""
        rates, distortions = self.reference.by_seed("rate"), self.reference.by_seed("distortion")
        if not rates or not distortions:
            return []
        rate = statistic(list(rates.values())).mean
        found = []
        for family in self.families:
            if family.ladder and self.reference not in family.arms:
                found.append(self._at_rate(family, rate, rates, distortions))
        return found

    def _at_rate(
        self, family: Family, rate: float, rates: Mapping[int, float], distortions: Mapping[int, float]
    ) -> AtEqualRate:
        means = [stat.mean for arm in family.ladder if (stat := arm.stat("rate")) is not None]
        if not min(means) <= rate <= max(means):
            return AtEqualRate(family.label, rate, None, (min(means), max(means)))
        values = {}
        for seed in {seed for arm in family.ladder for seed in arm.seeds}:
            pairs = [(arm.by_seed("rate").get(seed), arm.by_seed("distortion").get(seed)) for arm in family.ladder]
            points = [(x, y) for x, y in pairs if x is not None and y is not None]
            # Interpolate each seed at the reference's rate for that seed: otherwise, the variation of the reference's
            # rate between seeds would add to the variation of the difference.
            value = interpolate(points, rates.get(seed, rate))
            if value is not None:
                values[seed] = value
        gap = difference("distortion", family.label, values, self.reference.label, distortions)
        return AtEqualRate(family.label, rate, gap, None)

    @property
    def tightest_bound(self) -> str | None:
        """The name of the importance-weighted bound with the largest K that any run has."""
        found = [name for name in self.figures if name.startswith("iw_bound_k")]
        return max(found, key=lambda name: int(name.removeprefix("iw_bound_k") or 0), default=None)

    @cached_property
    def comparisons(self) -> int:
        """The number of differences that have an interval; each interval could exclude 0 by chance."""
        gaps = [*self.differences, *(found.difference for found in self.at_equal_rate)]
        return sum(gap is not None and gap.interval is not None for gap in gaps)

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds of all runs, without duplicates."""
        return sorted({member.seed for member in self.members})


def _group(members: Sequence[Member], differing: Sequence[str]) -> list[Arm]:
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        groups.setdefault(tuple(member.settings.get(key) for key in differing), []).append(member)
    rows = [dict(zip(differing, values, strict=True)) for values in groups]
    labels = labels_of(rows, [group[0].settings for group in groups.values()])
    return [
        Arm(label, row, sorted(group, key=lambda member: member.seed))
        for label, row, group in zip(labels, rows, groups.values(), strict=True)
    ]


def find_reference(arms: Sequence[Arm], label: str | None) -> Arm:
    """Return the arm with this label or, without a label, the arm closest to the default settings. Raises UserError."""
    if label is not None:
        for arm in arms:
            if arm.label == label:
                return arm
        labels = [arm.label for arm in arms]
        named = "\n".join(f"  {name}" for name in labels)
        raise UserError(f"--reference: there is no arm '{label}'.{nearest(label, labels)} The arms are:\n{named}")
    axes = catalog.defaults()
    usual = {key: usual_value(key, [arm.settings for arm in arms]) for key in arms[0].settings}

    def nearness(arm: Arm) -> tuple[Any, ...]:
        words = [key for key, value in arm.settings.items() if key in axes and axes[key].default == value]
        others = [key for key, value in arm.settings.items() if key not in axes and value == usual[key]]
        return arm.has_noise, arm.has_price, len(words), len(others), len(arm.members), -len(arm.label)

    return max(arms, key=nearness)


def without_beta(arm: Arm, differing: Sequence[str]) -> str:
    """Return an arm's label with the regularizer's weight removed from it."""
    weight = f"beta {show(arm.settings[BETA])}" if arm.settings.get(BETA) is not None else ""
    if BETA not in differing or not weight:
        return arm.label
    parts = [part.removesuffix(weight).strip() for part in arm.label.split(", ")]
    return ", ".join(part for part in parts if part)
