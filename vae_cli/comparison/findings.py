"""Sentences that each describe one figure (a measured quantity), written by the same rules for all arms."""

from __future__ import annotations

import math

from vae_cli.comparison.arms import Arm, AtEqualRate, Comparison
from vae_cli.comparison.statistics import Difference, Statistic
from vae_cli.config.claims import entry
from vae_cli.core.wording import digits_for, number, quoted, signed

NAMED = 4  # at most this many arms are named in a list


def unit_of(comparison: Comparison, name: str) -> str:
    """Return the unit recorded in the evaluations or, without one, the unit in the register of figures."""
    info = comparison.figures.get(name)
    return info.unit if info and info.unit else entry(name).unit


def amount(stat: Statistic, unit: str = "", digits: int | None = None) -> str:
    """Return a mean and its standard deviation over seeds: 23.40 ± 0.20 nats."""
    digits = digits_for([stat.mean]) if digits is None else digits
    if 0 < abs(stat.mean) < 0.5 * 10 ** (1 - digits) and abs(stat.mean) >= 1e-6:  # show two significant digits
        digits = 1 - math.floor(math.log10(abs(stat.mean)))
    spread = "" if stat.sd is None else f" ± {number(stat.sd, digits)}"
    return f"{number(stat.mean, digits)}{spread}{f' {unit}' if unit else ''}"


def amount_in(arm: Arm, stat: Statistic, digits: int) -> str:
    """Return a mean and its standard deviation for a table, with the number of runs if some runs lack the figure."""
    runs = f" ({stat.n} of {len(arm.members)})" if stat.n < len(arm.members) else ""
    return amount(stat, "", digits) + runs


def gap(found: Difference, unit: str = "") -> str:
    """Return a difference with its interval: +3.20 nats [+2.90, +3.50]."""
    digits = digits_for([found.value, *(found.interval or ())])
    tail = f" {unit}" if unit else ""
    if found.interval is None:
        return f"{signed(found.value, digits)}{tail} ({found.why_unknown}, no interval)"
    low, high = (signed(end, digits) for end in found.interval)
    return f"{signed(found.value, digits)}{tail} [{low}, {high}]"


def none_found(found: Difference) -> str:
    """Return the words for a difference whose interval contains 0."""
    return f"no difference found with {found.seeds} seeds"


def finding(comparison: Comparison, name: str) -> str | None:
    """Return sentences on the extremes of a figure and its differences from the reference; None if no arm has it."""
    parts = [text for text in (extremes(comparison, name), against(comparison, name)) if text]
    return " ".join(f"{part}." for part in parts) or None


def extremes(comparison: Comparison, name: str) -> str | None:
    """Return a phrase that names the arms with the highest and lowest values of a figure; None if no arm has it."""
    stats = [(arm, stat) for arm in comparison.shown if (stat := arm.stat(name)) is not None]
    if not stats:
        return None
    unit = unit_of(comparison, name)
    if len(stats) == 1:
        return f"{amount(stats[0][1], unit)} for {quoted([stats[0][0].label])}, the only arm with this figure"
    low, high = min(stats, key=lambda pair: pair[1].mean), max(stats, key=lambda pair: pair[1].mean)
    if math.isclose(low[1].mean, high[1].mean, rel_tol=1e-6, abs_tol=1e-9):
        return f"{amount(high[1], unit)} in {'both' if len(stats) == 2 else f'all {len(stats)}'} arms"
    digits = digits_for([high[1].mean, low[1].mean])
    return (
        f"Highest for {quoted([high[0].label])} ({amount(high[1], unit, digits)}) and lowest for "
        f"{quoted([low[0].label])} ({amount(low[1], unit, digits)})"
    )


def against(comparison: Comparison, name: str) -> str | None:
    """Return a phrase on how a figure differs between the reference and the other arms: first the arms that differ,
    then the arms for which no difference was found, then the arms with one seed. None if the figure cannot be
    compared."""
    chosen = [arm for arm in comparison.shown if arm is not comparison.reference]
    found = [d for arm in chosen if (d := comparison.difference(name, arm)) is not None]
    if not found:
        return None
    unit = unit_of(comparison, name)
    parts = []
    real = sorted((d for d in found if d.is_real), key=lambda d: -abs(d.value))
    if real:
        more = f" and {len(real) - NAMED} more in the table" if len(real) > NAMED else ""
        parts.append(", ".join(f"{quoted([d.arm])} {gap(d, unit)}" for d in real[:NAMED]) + more)
    for seeds in sorted({d.seeds for d in found if d.is_real is False}):
        nothing = [d for d in found if d.is_real is False and d.seeds == seeds]
        arms = quoted([d.arm for d in nothing]) if len(nothing) <= NAMED else f"{len(nothing)} arms"
        parts.append(f"{none_found(nothing[0])} for {arms}")
    unknown = [d for d in found if d.is_real is None]
    for why in dict.fromkeys(d.why_unknown for d in unknown):
        alike = [d for d in unknown if d.why_unknown == why]
        named = ", ".join(f"{quoted([d.arm])} {signed(d.value, digits_for([d.value]))}" for d in alike)
        parts.append(f"without an interval ({why}), {named}")
    return f"Compared with {quoted([comparison.reference.label])}: {'; '.join(parts)}"


def equal_rate(comparison: Comparison, found: AtEqualRate) -> str:
    """Return a sentence that compares a family's distortion with the reference's, at the reference's rate."""
    family, reference = quoted([found.family]), quoted([comparison.reference.label])
    rate = f"{number(found.rate)} nats"
    if found.outside is not None:
        low, high = (number(end) for end in found.outside)
        return (
            f"{family} cannot be compared with {reference} at equal rate: the rate of {reference}, {rate}, is outside "
            f"the range of rates of {family} with weights above 0, {low} to {high} nats."
        )
    if found.difference is None:
        return (
            f"{family} cannot be compared with {reference} at equal rate: no seed of {family} has rates both below and "
            f"above the rate of {reference}, {rate}."
        )
    text = (
        f"At the rate of {reference} ({rate}), the distortion of {family} differs from that of {reference} by "
        f"{gap(found.difference, 'nats')}"
    )
    return f"{text}: {none_found(found.difference)}." if found.difference.is_real is False else f"{text}."
