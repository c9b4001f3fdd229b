"""Several runs side by side: which of them can be compared, what differs, and what their figures say over seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from os.path import commonpath
from pathlib import Path
from typing import Any, NamedTuple

from vae_cli.config import catalog
from vae_cli.config.naming import AXES, hparams, show
from vae_cli.core.errors import UserError, nearest
from vae_cli.runs.folder import RunDir, last_written

BETA = "regularizer.beta"
LEVEL = 0.95
FEW = 8  # arms that plots and tables show without leaving a ladder of weights out
LISTED = 4  # runs that a message names
MUST_AGREE = ("dataset", "likelihood")
EVALUATED_ALIKE = {"images": "fingerprint of the images", "weights": "weights evaluated", "seed": "evaluation seed"}
FIRST_WORDS = ("sigma", "prior", "regularizer", "network", "optimizer")  # in labels
NO_SETTING = frozenset(["seed", "experiment"])


@dataclass(frozen=True)
class Member:
    """One run of a comparison: its settings without the seed, and its evaluation once there is one."""

    folder: RunDir
    settings: dict[str, Any]
    seed: int
    summary: dict[str, Any]
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.evaluation.get("figures", {})
        return found

    def scalar(self, name: str) -> float | None:
        """A figure that is one number, or None where the run has none of that name."""
        value = self.figures.get(name, {}).get("value")
        return float(value) if isinstance(value, int | float) else None

    def curve(self, name: str) -> list[float] | None:
        """A figure that is a list of numbers, or None."""
        value = self.figures.get(name, {}).get("value")
        return value if isinstance(value, list) and value else None


def read_member(folder: RunDir, summary: dict[str, Any] | None = None) -> Member:
    """A finished run as it lies on the disk; its summary need not be read again. Raises UserError or Failure where a
    file is missing or damaged."""
    config = folder.config()
    settings: dict[str, Any] = {**hparams(config), "epochs": config.get("epochs")}
    # An axis that is told the number of dimensions repeats it.
    repeated = [k for k, v in settings.items() if k.endswith(".latent") and v == settings.get("latent")]
    kept = {k: v for k, v in settings.items() if k not in NO_SETTING and k not in repeated and v is not None}
    return Member(folder, kept, int(config.get("seed", 0)), folder.summary() if summary is None else summary)


def drop_twins(members: Sequence[Member]) -> tuple[list[Member], list[tuple[Member, Member]]]:
    """Keep one of the runs that have the same settings and seed, and say which were left out for which."""
    kept: dict[Any, Member] = {}
    twins = []
    for member in members:
        key = (tuple(sorted(member.settings.items(), key=str)), member.seed)
        if key in kept:
            twins.append((member, kept[key]))
        kept.setdefault(key, member)
    return list(kept.values()), twins


def refuse_incomparable(members: Sequence[Member]) -> None:
    """Raise UserError, naming runs, settings and values, unless all runs have one dataset, split and likelihood, and
    one set of images, seed and kind of weights as far as they are evaluated."""
    shared = [_must_agree(member) for member in members]
    differing = [key for key in _all_keys(shared) if len({one.get(key) for one in shared}) > 1]
    if not differing:
        return
    lines = []
    for key in differing:
        lines.append(f"  {key}:")
        values = list(dict.fromkeys(one.get(key) for one in shared))
        for value in values:
            having = [m for m, one in zip(members, shared, strict=True) if one.get(key) == value]
            lines.append(f"    {'nothing' if value is None else show(value)} in {_named(having)}")
    raise UserError(
        "These runs cannot be compared: their figures are about other images, or in other units.\n"
        + "\n".join(lines)
        + f"\nCompare runs that agree in this, for example: {_suggestion(members, shared, differing)}"
    )


def like_the_newest(members: Sequence[Member]) -> tuple[list[Member], str | None]:
    """Keep the runs that can be compared with the one that was trained last, and say which are left out, and why."""
    newest = max(members, key=lambda member: last_written(member.folder.path))
    wanted = _must_agree(newest)
    kept = [member for member in members if _must_agree(member) == wanted]
    others = [member for member in members if _must_agree(member) != wanted]
    if not others:
        return kept, None
    keys = _all_keys([wanted, *map(_must_agree, others)])
    differing = [key for key in keys if any(_must_agree(member).get(key) != wanted.get(key) for member in others)]
    return kept, (
        f"Left out: {_named(others)}. They cannot be compared with the newest run, {newest.folder.path}: they "
        f"differ from it in {', '.join(differing)}."
    )


def _must_agree(member: Member) -> dict[str, Any]:
    """What has to be the same in runs that are compared."""
    same = {k: v for k, v in member.settings.items() if k.partition(".")[0] in MUST_AGREE}
    return same | {word: member.evaluation[key] for key, word in EVALUATED_ALIKE.items() if key in member.evaluation}


def _suggestion(members: Sequence[Member], shared: Sequence[Mapping[str, Any]], differing: Sequence[str]) -> str:
    """The command for the largest set of runs that agree: their folder where it holds no others."""
    keys = [tuple(one.get(key) for key in differing) for one in shared]
    most = Counter(keys).most_common(1)[0][0]
    own = [m.folder.path for m, key in zip(members, keys, strict=True) if key == most]
    others = [m.folder.path for m, key in zip(members, keys, strict=True) if key != most]
    parent = common_folder(own)
    if parent != Path() and not any(parent in path.parents for path in others):
        return f"vae compare {parent}"
    return "vae compare " + " ".join(str(path) for path in own[:LISTED]) + (" ..." if len(own) > LISTED else "")


def common_folder(paths: Sequence[Path]) -> Path:
    """The folder that holds all of these runs; of one run, the folder it lies in."""
    is_mixed = len({path.is_absolute() for path in paths}) > 1
    return Path(commonpath([(path.absolute() if is_mixed else path).parent for path in paths]))


def _named(members: Sequence[Member]) -> str:
    names = ", ".join(str(member.folder.path) for member in members[:LISTED])
    more = f" and {len(members) - LISTED} more" if len(members) > LISTED else ""
    return f"{len(members)} run{'s' if len(members) > 1 else ''}: {names}{more}"


def _all_keys(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


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
        half = _quantile(self.n - 1) * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half


def partly(stat: Statistic, arm: Arm) -> str:
    """What is said behind a figure that not all runs of an arm have."""
    return f" ({stat.n} of {len(arm.members)})" if stat.n < len(arm.members) else ""


def statistic(values: Sequence[float]) -> Statistic:
    """The statistic of one value or more."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Statistic(mean, None, 1)
    return Statistic(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)), n)


@cache
def _quantile(degrees: float) -> float:
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
        gaps = statistic([_exact(of[seed], than[seed]) for seed in common])
        return Difference(figure, arm, reference, gaps.mean, gaps.interval, len(common), True)
    one, other = statistic(list(of.values())), statistic(list(than.values()))
    value, seeds = _exact(one.mean, other.mean), min(one.n, other.n)
    if one.sd is None or other.sd is None:
        return Difference(figure, arm, reference, value, None, seeds, False)
    a, b = one.sd**2 / one.n, other.sd**2 / other.n
    half = 0.0
    if a + b > 0:
        degrees = (a + b) ** 2 / (a**2 / (one.n - 1) + b**2 / (other.n - 1))
        half = _quantile(degrees) * math.sqrt(a + b)
    return Difference(figure, arm, reference, value, (value - half, value + half), seeds, False)


def _exact(a: float, b: float) -> float:
    """a - b, without what rounding leaves of equal numbers."""
    return 0.0 if math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) else a - b


# Arms.


@dataclass(frozen=True)
class Arm:
    """The runs that differ in nothing but the seed."""

    label: str
    settings: dict[str, Any]  # those that differ between arms
    members: list[Member]

    @property
    def seeds(self) -> list[int]:
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
        """The values of a scalar figure by seed; runs that do not have it are not in it."""
        return self._scalars.get(name, {})

    def stat(self, name: str) -> Statistic | None:
        """A scalar figure over seeds, or None where no run has it."""
        return self._stats.get(name)

    def curves(self, name: str) -> list[list[float]]:
        """A figure that is a list, of each run that has it, all of one length."""
        found = [curve for member in self.members if (curve := member.curve(name)) is not None]
        lengths = Counter(len(curve) for curve in found)
        return [curve for curve in found if len(curve) == lengths.most_common(1)[0][0]]

    def reason(self, name: str) -> str | None:
        """Why a figure was left out, where it was."""
        for member in self.members:
            left_out = member.evaluation.get("left_out", {})
            if name in left_out:
                return str(left_out[name].get("reason", "not defined"))
        return None

    @property
    def has_noise(self) -> bool:
        """Whether codes are drawn with noise: whether there is a scale or a rate to speak of."""
        names = ("scale_mean", "rate")
        return any(self.stat(name) for name in names) or not any(self.reason(name) for name in names)

    @property
    def has_constant_scale(self) -> bool:
        """Whether the noise has one scale in all images and dimensions, and so was not chosen by anything learned."""
        pairs = [(member.scalar("scale_min"), member.scalar("scale_max")) for member in self.members]
        return all(a is not None and b is not None and math.isclose(a, b, rel_tol=1e-5) for a, b in pairs)

    @property
    def beta(self) -> float | None:
        """The constant weight of the regularizer, where it has one."""
        value = self.members[0].settings.get(BETA)
        return float(value) if isinstance(value, int | float) else None

    @property
    def has_price(self) -> bool:
        """Whether the code costs anything in training."""
        return self.beta != 0 and self.members[0].settings.get("regularizer") != "none"


@dataclass(frozen=True)
class Family:
    """Arms that differ in the regularizer's weight only, by rising weight."""

    label: str
    arms: list[Arm]

    @property
    def ladder(self) -> list[Arm]:
        """The arms with a weight above 0, where there are two or more: points of one rate-distortion curve."""
        rungs = [arm for arm in self.arms if arm.beta and arm.stat("rate") and arm.stat("distortion")]
        return rungs if len(rungs) > 1 else []


@dataclass(frozen=True)
class AtEqualRate:
    """The distortion of a family at the rate of the reference arm, less the reference's own distortion.

    It is read from the straight lines between the family's arms, which lie above a convex curve. `outside` is the
    family's range of rates where the reference's rate does not lie in it.
    """

    family: str
    rate: float
    difference: Difference | None
    outside: tuple[float, float] | None


@dataclass(frozen=True)
class Info:
    """What is known of a figure, whichever run it is from."""

    unit: str
    metric: str
    claim: str
    is_curve: bool


class Comparison:
    """Evaluated runs, grouped into arms by the settings that differ, and set against one arm, the reference.

    Raises UserError where no arm has the label `reference`.
    """

    def __init__(self, members: Sequence[Member], reference: str | None = None) -> None:
        self.members = list(members)
        everything = [member.settings for member in members]
        keys = _all_keys(everything)
        self.differing = [key for key in keys if len({row.get(key) for row in everything}) > 1]
        self.equal = {key: everything[0].get(key) for key in keys if key not in self.differing}
        arms = _group(self.members, self.differing)
        self.reference = _find_reference(arms, reference)
        self.arms = sorted(arms, key=self._place)
        self.families = self._families()

    def _place(self, arm: Arm) -> tuple[Any, ...]:
        first = arm.label.partition(",")[0]
        own = self.reference.label.partition(",")[0]
        return arm is not self.reference, first != own, not arm.has_noise, first, arm.beta or 0.0, arm.label

    @cached_property
    def figures(self) -> dict[str, Info]:
        """All figures that any run has or had left out, in the order of the evaluations."""
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
        """The weight that most arms have."""
        value = _usual(BETA, [{BETA: arm.beta} for arm in self.arms])
        return None if value is None else float(value)

    @cached_property
    def shown(self) -> list[Arm]:
        """The arms of plots and tables: all of them where they are few; else those of the usual weight or of none, and
        not the ladder of weights."""
        if len(self.arms) <= FEW:
            return self.arms
        usual = (None, 0.0, self.base_beta)
        return [arm for arm in self.arms if arm.beta in usual or arm is self.reference]

    def _families(self) -> list[Family]:
        groups: dict[Any, list[Arm]] = {}
        for arm in self.arms:
            key = tuple(arm.settings.get(key) for key in self.differing if key != BETA)
            groups.setdefault(key, []).append(arm)
        families = []
        for arms in groups.values():
            usual = [arm for arm in arms if arm.beta == self.base_beta] or arms
            label = _without_beta(usual[0], self.differing) or usual[0].label
            families.append(Family(label, sorted(arms, key=lambda arm: arm.beta or 0.0)))
        return families

    def difference(self, figure: str, arm: Arm, reference: Arm | None = None) -> Difference | None:
        """How much higher a figure is in an arm than in the reference."""
        other = reference or self.reference
        return difference(figure, arm.label, arm.by_seed(figure), other.label, other.by_seed(figure))

    @cached_property
    def differences(self) -> list[Difference]:
        """The difference of every scalar figure between every arm and the reference."""
        names = [name for name, info in self.figures.items() if not info.is_curve]
        pairs = [(name, arm) for name in names for arm in self.arms if arm is not self.reference]
        return [found for name, arm in pairs if (found := self.difference(name, arm)) is not None]

    @cached_property
    def at_equal_rate(self) -> list[AtEqualRate]:
        """What each family with a ladder of weights does at the reference's rate, the reference's own left out."""
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
            # Each seed at its own rate: how the reference's seeds differ in rate is no part of the difference.
            value = interpolate(points, rates.get(seed, rate))
            if value is not None:
                values[seed] = value
        gap = difference("distortion", family.label, values, self.reference.label, distortions)
        return AtEqualRate(family.label, rate, gap, None)

    @cached_property
    def comparisons(self) -> int:
        """How many differences have an interval and might have been called one by chance."""
        gaps = [*self.differences, *(found.difference for found in self.at_equal_rate)]
        return sum(gap is not None and gap.interval is not None for gap in gaps)

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({member.seed for member in self.members})


def interpolate(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """The height at `at` of the straight lines between points (x, y), or None outside their range."""
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if x0 <= at <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None


def _group(members: Sequence[Member], differing: Sequence[str]) -> list[Arm]:
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        groups.setdefault(tuple(member.settings.get(key) for key in differing), []).append(member)
    rows = [dict(zip(differing, values, strict=True)) for values in groups]
    labels = _labels(rows, [group[0].settings for group in groups.values()])
    return [
        Arm(label, row, sorted(group, key=lambda member: member.seed))
        for label, row, group in zip(labels, rows, groups.values(), strict=True)
    ]


def _find_reference(arms: Sequence[Arm], label: str | None) -> Arm:
    """The arm of this label, or the one nearest to the defaults of the configuration."""
    if label is not None:
        for arm in arms:
            if arm.label == label:
                return arm
        labels = [arm.label for arm in arms]
        named = "\n".join(f"  {name}" for name in labels)
        raise UserError(f"--reference: there is no arm '{label}'.{nearest(label, labels)} The arms are:\n{named}")
    axes = catalog.defaults()
    usual = {key: _usual(key, [arm.settings for arm in arms]) for key in arms[0].settings}

    def nearness(arm: Arm) -> tuple[Any, ...]:
        words = [key for key, value in arm.settings.items() if key in axes and axes[key].default == value]
        others = [key for key, value in arm.settings.items() if key not in axes and value == usual[key]]
        return arm.has_noise, arm.has_price, len(words), len(others), len(arm.members), -len(arm.label)

    return max(arms, key=nearness)


# Labels.


def _labels(rows: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fewest words that tell arms apart, given what differs between them and all of their settings."""
    keys = _needed(rows)
    usual = {key: _usual(key, rows) for key in keys}
    labels = [
        _label(row, whole, keys, usual) or _label(row, whole, keys, {})
        for row, whole in zip(rows, settings, strict=True)
    ]
    if len(rows) == 1:
        return [str(settings[0].get("sigma", "all runs"))]
    if len(set(labels)) < len(labels):
        labels = [", ".join(f"{k} {show(v)}" for k, v in row.items() if v is not None) or "the rest" for row in rows]
    return labels


def _needed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that a label must speak of. What another setting says as well is left out, but for the numbers of
    sigma and the weight, which are what runs are compared for."""
    keys = sorted(_all_keys(rows), key=lambda key: (key not in AXES, key != BETA, key))
    for key in reversed(list(keys)):
        rest = [other for other in keys if other != key]
        if key in AXES or key == BETA or key.startswith("sigma."):
            continue
        if len({tuple(row.get(k) for k in rest) for row in rows}) == len(rows):
            keys = rest
    return keys


def _usual(key: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """The value that goes without saying: the commonest; of several the configuration's own or, of weights, the 1 of
    the ELBO; and if it is none of these, none."""
    counts = Counter(row.get(key) for row in rows if row.get(key) is not None)
    most = max(counts.values(), default=0)
    tied = [value for value, count in counts.items() if count == most]
    if len(tied) == 1:
        return tied[0]
    default = catalog.defaults().get(key)
    own = 1 if key == BETA else None if default is None else default.default
    return own if own in tied else None


def _label(row: Mapping[str, Any], whole: Mapping[str, Any], keys: Sequence[str], usual: Mapping[str, Any]) -> str:
    axes = list(dict.fromkeys([*FIRST_WORDS, *(key.partition(".")[0] for key in keys)]))
    parts = []
    for axis in axes:
        words = []
        of_axis = [key for key in keys if key.partition(".")[0] == axis]
        for key in sorted(of_axis, key=lambda key: (key != axis, not key.endswith(".value"), key)):
            value = row.get(key)
            if value is None or (axis != "sigma" and value == usual.get(key)):
                continue
            name = key.rpartition(".")[2]
            if key == axis and axis in AXES:
                words.append(show(value))
            elif name == "value":
                words += [show(value)] if words else [show(whole.get(axis, axis)), show(value)]
            else:
                words.append(f"{name} {show(value)}")
        if words:
            parts.append(" ".join(words))
    return ", ".join(parts)


def _without_beta(arm: Arm, differing: Sequence[str]) -> str:
    """The label of an arm without its weight."""
    weight = f"beta {show(arm.settings[BETA])}" if arm.settings.get(BETA) is not None else ""
    if BETA not in differing or not weight:
        return arm.label
    parts = [part.removesuffix(weight).strip() for part in arm.label.split(", ")]
    return ", ".join(part for part in parts if part)
