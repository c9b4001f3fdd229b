"""What a comparison says, in sentences built from its numbers by rules that are the same for all arms."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vae_cli.comparison.arms import AtEqualRate, Comparison
from vae_cli.comparison.statistics import Difference, Statistic
from vae_cli.core.wording import capitalized, digits_for, number, quoted, signed

NAMES = {
    "rate": "the rate",
    "rate_bits": "the rate",
    "distortion": "the distortion",
    "elbo": "the ELBO",
    "noise_probe_tolerance": "the noise that a code tolerates",
    "quantization_bits_within_1_nat": "the number of bits that keeps a code within 1 nat",
    "mutual_information_bits": "the mutual information",
    "jacobian_frobenius_halfway": "the decoder's Jacobian half-way between codes (Frobenius norm)",
    "jacobian_norm_halfway": "its largest singular value there",
    "jacobian_frobenius_codes": "the decoder's Jacobian at codes (Frobenius norm)",
    "largest_step_over_mean": "the largest step over the mean step of an interpolation",
    "midpoint_distance_to_training": "the distance of midpoints to the nearest training image",
    "neighbour_label_agreement": "the share of neighbouring codes with one label",
    "class_change_by_noise": "the share of codes whose class the noise changes",
    "collapsed_share": "the share of dimensions with a collapsed scale",
    "reidentification": "the share of test images found again from their noisy code",
    "distortion_gap": "the distortion on test images less that on training images",
    "loc_std_growth": "the growth of loc in training",
    "linear_probe_z": "the accuracy of a linear probe on z",
    "scale_mean": "the mean scale",
    "rate_scale": "the part of the rate that the scale costs",
    "frechet_prior": "the Fréchet distance of images from the prior",
    "frechet_mixture": "the Fréchet distance of images from a mixture fitted to the codes",
}


def amount(stat: Statistic, unit: str = "", digits: int | None = None) -> str:
    """A mean and its standard deviation over seeds: 23.40 ± 0.20 nats."""
    digits = digits_for([stat.mean]) if digits is None else digits
    if 0 < abs(stat.mean) < 0.5 * 10 ** (1 - digits) and abs(stat.mean) >= 1e-6:  # two digits that say something
        digits = 1 - math.floor(math.log10(abs(stat.mean)))
    spread = "" if stat.sd is None else f" ± {number(stat.sd, digits)}"
    return f"{number(stat.mean, digits)}{spread}{f' {unit}' if unit else ''}"


def gap(found: Difference, unit: str = "") -> str:
    """A difference with its interval: +3.20 nats [+2.90, +3.50]."""
    digits = digits_for([found.value, *(found.interval or ())])
    tail = f" {unit}" if unit else ""
    if found.interval is None:
        return f"{signed(found.value, digits)}{tail} (one seed: no interval)"
    low, high = (signed(end, digits) for end in found.interval)
    return f"{signed(found.value, digits)}{tail} [{low}, {high}]"


def none_found(found: Difference) -> str:
    """What is said where the interval holds 0."""
    return f"no difference that {found.seeds} seeds could show"


def title(name: str) -> str:
    """A figure's name as it stands in a sentence."""
    return NAMES.get(name, name.replace("_", " "))


# Sentences about one figure.

MOST = 4  # arms that a sentence names


def extremes(comparison: Comparison, name: str) -> str | None:
    """Which arm is highest and which lowest in a figure."""
    stats = [(arm, stat) for arm in comparison.shown if (stat := arm.stat(name)) is not None]
    if not stats:
        return None
    unit = unit_of(comparison, name)
    if len(stats) == 1:
        return f"{amount(stats[0][1], unit)} for {quoted([stats[0][0].label])} alone"
    low, high = min(stats, key=lambda pair: pair[1].mean), max(stats, key=lambda pair: pair[1].mean)
    if math.isclose(low[1].mean, high[1].mean, rel_tol=1e-6, abs_tol=1e-9):
        return f"{amount(high[1], unit)} in all {len(stats)} arms"
    digits = digits_for([high[1].mean, low[1].mean])
    return (
        f"highest for {quoted([high[0].label])} ({amount(high[1], unit, digits)}), lowest for "
        f"{quoted([low[0].label])} ({amount(low[1], unit, digits)})"
    )


def against(comparison: Comparison, name: str) -> str | None:
    """How each arm differs in a figure from the reference: those that do, those that do not, those of one seed."""
    chosen = [arm for arm in comparison.shown if arm is not comparison.reference]
    found = [d for arm in chosen if (d := comparison.difference(name, arm)) is not None]
    if not found:
        return None
    unit = unit_of(comparison, name)
    parts = []
    real = sorted((d for d in found if d.is_real), key=lambda d: -abs(d.value))
    if real:
        more = f" and {len(real) - MOST} more in the table" if len(real) > MOST else ""
        parts.append(", ".join(f"{quoted([d.arm])} {gap(d, unit)}" for d in real[:MOST]) + more)
    for seeds in sorted({d.seeds for d in found if d.is_real is False}):
        nothing = [d.arm for d in found if d.is_real is False and d.seeds == seeds]
        arms = quoted(nothing) if len(nothing) <= MOST else f"{len(nothing)} arms"
        parts.append(f"no difference that {seeds} seeds could show for {arms}")
    if unknown := [d for d in found if d.is_real is None]:
        listed = ", ".join(f"{quoted([d.arm])} {signed(d.value, digits_for([d.value]))}" for d in unknown)
        parts.append(f"from one seed, so that no interval exists, {listed}")
    return f"against {quoted([comparison.reference.label])}: {'; '.join(parts)}"


def findings(comparison: Comparison, names: Sequence[str]) -> list[tuple[str, str]]:
    """The finding of a section: for each figure its name, and a sentence on its extremes and on its differences to the
    reference."""
    found = []
    for name in names:
        parts = [text for text in (extremes(comparison, name), against(comparison, name)) if text]
        if parts:
            found.append((capitalized(title(name)), "; ".join(parts) + "."))
    return found


def unit_of(comparison: Comparison, name: str) -> str:
    info = comparison.figures.get(name)
    return info.unit if info else ""


def equal_rate(comparison: Comparison, found: AtEqualRate) -> str:
    """A family against the reference at the reference's rate."""
    reference = quoted([comparison.reference.label])
    at = f"At the rate of {reference} ({number(found.rate)} nats)"
    if found.outside is not None:
        low, high = (number(end) for end in found.outside)
        return (
            f"{at} nothing can be said of {quoted([found.family])}: the rate lies outside the range of its weights, "
            f"{low} to {high} nats."
        )
    if found.difference is None:
        return f"{at} nothing can be said of {quoted([found.family])}: no seed has both."
    text = f"{at} the distortion of {quoted([found.family])} is {gap(found.difference, 'nats')} against {reference}"
    return f"{text}: {none_found(found.difference)}." if found.difference.is_real is False else f"{text}."
