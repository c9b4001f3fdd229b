"""The answer to each of the five questions, built from a comparison's numbers by rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vae_cli.comparison.arms import Arm, Comparison
from vae_cli.comparison.findings import amount, equal_rate, extremes, gap, none_found, title, unit_of
from vae_cli.comparison.statistics import Difference
from vae_cli.core.wording import capitalized, digits_for, number, quoted

QUESTIONS = {
    "bits": "Does the noise limit the information that passes?",
    "neighbours": "Does the noise keep neighbours alike?",
    "shortcuts": "Without noise, or without a price on small sigma, does the network take a shortcut?",
    "scale": "Does the rate pull sigma towards 1?",
    "price": "What does it cost to hard-code sigma?",
}

# What an arm without noise, or without a price on it, would show if a claim held: the figure, and the sign of its
# difference to the reference.
EXPECTED: dict[str, list[tuple[str, int]]] = {
    "bits": [("rate", 1), ("noise_probe_tolerance", -1), ("quantization_bits_within_1_nat", 1)],
    "neighbours": [
        ("jacobian_frobenius_halfway", 1),
        ("jacobian_norm_halfway", 1),
        ("largest_step_over_mean", 1),
        ("midpoint_distance_to_training", 1),
        ("neighbour_label_agreement", -1),
    ],
    "shortcuts": [("collapsed_share", 1), ("reidentification", 1), ("distortion_gap", 1)],
}


@dataclass(frozen=True)
class Answer:
    """A question, its answer in a word or two, and the sentences behind it."""

    question: str
    verdict: str
    sentences: list[str]


def answers(comparison: Comparison) -> dict[str, Answer]:
    """The answer to each question, by claim."""
    kinds: dict[str, Callable[[Comparison], Answer]] = {
        "bits": _bits,
        "neighbours": _neighbours,
        "shortcuts": _shortcuts,
        "scale": _scale,
        "price": _price,
    }
    return {claim: kind(comparison) for claim, kind in kinds.items()}


# Answers.


def _contrast(comparison: Comparison, claim: str, arms: Sequence[Arm], what: str) -> tuple[str, list[str]]:
    """Whether arms differ from the reference as a claim has it, and the sentences that say how."""
    reference = comparison.reference
    if not reference.has_noise or not reference.has_price:
        return "Not tested", [
            f"The reference {quoted([reference.label])} has no noise, or no price on it: name another with --reference."
        ]
    arms = [arm for arm in arms if arm is not reference]
    if not arms:
        return "Not tested", [f"No arm {what} is among these runs."]
    pairs = [
        (found, sign)
        for name, sign in EXPECTED[claim]
        for arm in arms
        if (found := comparison.difference(name, arm)) is not None
    ]
    if not pairs:
        return "Not tested", [f"No figure of this claim is defined both for {quoted([a.label for a in arms])} and for "
                              f"{quoted([reference.label])}."]  # fmt: skip
    tested = [pair for pair in pairs if pair[0].is_real is not None]
    for_it = [found for found, sign in tested if found.is_real and found.value * sign > 0]
    against_it = [found for found, sign in tested if found.is_real and found.value * sign < 0]
    verdict = verdict_of(len(for_it), len(against_it), len(tested))
    none = len(tested) - len(for_it) - len(against_it)
    counted = f"Of {len(tested)} comparisons of {quoted([a.label for a in arms])} with {quoted([reference.label])}"
    says = [f"{len(for_it)} point this way"]
    if against_it:
        says.append(f"{len(against_it)} the other way")
    if none:
        says.append(f"{none} show no difference")
    sentences = [f"{counted}, {', '.join(says)}."]
    if not tested:
        sentences = ["With one seed there is no interval, and no difference can be told from chance."]
    names = list(dict.fromkeys(found.figure for found, _ in sorted(pairs, key=lambda pair: not pair[0].is_real)))
    for name in names[:LISTED]:
        sentences.append(_several(comparison, [found for found, _ in pairs if found.figure == name]))
    return verdict, sentences


def verdict_of(for_it: int, against_it: int, tested: int) -> str:
    """What so many comparisons that point one way, the other way, and either way come to."""
    if not tested:
        return "Cannot be told"
    if for_it and against_it:
        return "Mixed"
    if against_it:
        return "No, the opposite"
    if not for_it:
        return "Not shown"
    return "Yes" if for_it == tested else "Mostly" if 2 * for_it > tested else "In part"


LISTED = 3  # figures that an answer spells out; the section has all


def _several(comparison: Comparison, found: Sequence[Difference]) -> str:
    """Differences in one figure as a sentence: what the reference has, and what each other arm."""
    name, reference = found[0].figure, comparison.reference.stat(found[0].figure)
    assert reference is not None
    stats = {arm.label: stat for arm in comparison.arms if (stat := arm.stat(name)) is not None}
    unit = unit_of(comparison, name)
    digits = digits_for([reference.mean, *(stats[d.arm].mean for d in found)])
    parts = []
    for d in found:
        says = none_found(d) if d.is_real is False else gap(d, unit)
        parts.append(f"{amount(stats[d.arm], '', digits)} for {quoted([d.arm])} ({says})")
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    own = quoted([comparison.reference.label])
    return f"{capitalized(title(name))} is {amount(reference, unit, digits)} for {own}, {listed}."


def _one(comparison: Comparison, found: Difference) -> str:
    """One difference as a sentence with both means."""
    arms = {arm.label: arm for arm in comparison.arms}
    own, other = arms[found.arm].stat(found.figure), arms[found.reference].stat(found.figure)
    assert own is not None
    assert other is not None
    unit = unit_of(comparison, found.figure)
    digits = digits_for([own.mean, other.mean])
    text = (
        f"{capitalized(title(found.figure))} is {amount(own, unit, digits)} for {quoted([found.arm])} and "
        f"{amount(other, unit, digits)} for {quoted([found.reference])}"
    )
    if found.is_real is False:
        return f"{text}: {none_found(found)}."
    return f"{text}: {gap(found, unit)}."


def _without(comparison: Comparison, noise: bool, price: bool) -> list[Arm]:
    """The arms without noise, and those without a price on the code."""
    return [a for a in comparison.shown if (noise and not a.has_noise) or (price and a.has_noise and not a.has_price)]


def _bits(comparison: Comparison) -> Answer:
    verdict, sentences = _contrast(
        comparison, "bits", _without(comparison, noise=True, price=True), "without noise, or without a price on it,"
    )
    rate = extremes(comparison, "rate_bits" if "rate_bits" in comparison.figures else "rate")
    rate = f"The rate is {rate}." if rate else None
    missing = [arm for arm in comparison.shown if arm.stat("rate") is None and arm.reason("rate")]
    if missing:
        sentences.append(f"No rate for {quoted([arm.label for arm in missing])}: {missing[0].reason('rate')}.")
    return Answer(QUESTIONS["bits"], verdict, [*sentences[:1], *([rate] if rate else []), *sentences[1:]])


def _neighbours(comparison: Comparison) -> Answer:
    verdict, sentences = _contrast(
        comparison, "neighbours", _without(comparison, noise=True, price=False), "without noise"
    )
    return Answer(QUESTIONS["neighbours"], verdict, sentences)


def _shortcuts(comparison: Comparison) -> Answer:
    verdict, sentences = _contrast(
        comparison,
        "shortcuts",
        _without(comparison, noise=True, price=True),
        "without noise, or without a price on it,",
    )
    return Answer(QUESTIONS["shortcuts"], verdict, sentences)


def _scale(comparison: Comparison) -> Answer:
    """Within each family whose scale is free, the mean scale at the largest weight less that at the smallest."""
    found, sentences = [], []
    for family in comparison.families:
        arms = [arm for arm in family.arms if arm.stat("scale_mean") and not arm.has_constant_scale]
        if len(arms) > 1 and arms[0].beta != arms[-1].beta:
            gap_ = comparison.difference("scale_mean", arms[-1], arms[0])
            if gap_ is not None:
                found.append(gap_)
                sentences.append(_one(comparison, gap_))
    free = [arm for arm in comparison.shown if arm.stat("scale_mean") and not arm.has_constant_scale]
    for arm in [arm for arm in free if arm.has_price][:LISTED]:
        sentences += _active_and_idle(arm)
    if not free:
        return Answer(QUESTIONS["scale"], "Not tested", ["No arm among these runs sets its scale by itself."])
    if not found:
        sentences.insert(0, "No family of arms whose scale is free was trained under several weights.")
        return Answer(QUESTIONS["scale"], "Not tested", sentences)
    rising = [d for d in found if d.is_real and d.value > 0]
    falling = [d for d in found if d.is_real and d.value < 0]
    known = [d for d in found if d.is_real is not None]
    verdict = verdict_of(len(rising), len(falling), len(known))
    return Answer(QUESTIONS["scale"], verdict, sentences)


def _active_and_idle(arm: Arm) -> list[str]:
    """The median scale of active and of idle dimensions, from the quantiles 5, 25, 50, 75, 95 %."""
    medians = {}
    for kind in ("active", "idle"):
        curves = [curve for curve in arm.curves(f"scale_{kind}_quantiles") if len(curve) == 5]
        if curves:
            medians[kind] = sum(curve[2] for curve in curves) / len(curves)
    if not medians:
        return []
    said = " and ".join(f"{number(value)} in {kind} dimensions" for kind, value in medians.items())
    return [f"The median scale of {quoted([arm.label])} is {said}."]


def _price(comparison: Comparison) -> Answer:
    """The ELBO of arms of constant scale less the reference's, under their own prior and under a refitted one."""
    reference = comparison.reference
    arms = [a for a in comparison.shown if a.has_constant_scale and a is not reference and a.stat("elbo")]
    if not arms or reference.stat("elbo") is None:
        return Answer(QUESTIONS["price"], "Not tested", ["No arm of constant scale, or no ELBO to compare it with."])
    gaps = [(arm, d) for arm in arms if (d := comparison.difference("elbo", arm)) is not None]
    verdict = _cost_in_short([d for _, d in gaps])
    sentences, said = [], set()
    for arm, found in sorted(gaps, key=lambda pair: pair[1].value):
        if arm.label in said:
            continue
        others = [(other, d) for other, d in gaps if other is not arm and _differ_in_prior(arm, other)]
        better = max(others, key=lambda pair: pair[1].value, default=None)
        if better is not None:
            said.add(better[0].label)
        sentences.append(_cost(comparison, arm, found, better))
    for equal in comparison.at_equal_rate:
        sentences.append(equal_rate(comparison, equal))
    return Answer(QUESTIONS["price"], verdict, sentences)


def _cost_in_short(gaps: Sequence[Difference]) -> str:
    """How many arms lose how much."""
    known = [d for d in gaps if d.interval is not None]
    losses = sorted(-d.value for d in known if d.is_real and d.value < 0)
    arms = "the arm" if len(known) == 1 else f"{len(losses)} of the {len(known)} arms"
    if not known:
        low, high = min(-d.value for d in gaps), max(-d.value for d in gaps)
        ends = number(high) if low == high else f"{number(low)} to {number(high)}"
        return f"{ends} nats, from one seed"
    if not losses:
        return f"No loss that {known[0].seeds} seeds could show"
    digits = digits_for(losses)
    ends = " to ".join(dict.fromkeys(number(end, digits) for end in (losses[0], losses[-1])))
    return f"{capitalized(arms)} of constant scale lose{'s' if len(losses) == 1 else ''} {ends} nats"


def _differ_in_prior(one: Arm, other: Arm) -> bool:
    """Whether two arms differ in their prior and in nothing else."""
    keys = {key for key in one.settings if one.settings[key] != other.settings.get(key)}
    return bool(keys) and all(key.partition(".")[0] == "prior" for key in keys)


def _cost(comparison: Comparison, arm: Arm, found: Difference, better: tuple[Arm, Difference] | None) -> str:
    """What an arm of constant scale loses; how much of that the trained model wins back by another prior alone, and how
    much an arm that was trained with one, the best of those that differ in nothing else."""
    text = f"The ELBO of {quoted([arm.label])} is {gap(found, 'nats')} against {quoted([comparison.reference.label])}"
    if found.is_real is False:
        text += f", {none_found(found)}"
    refitted = comparison.difference("elbo_gaussian_prior", arm)
    if refitted is not None and found.is_real and found.value < 0:
        text += f"; with a Gaussian fitted afterwards to the codes of each as its prior {_left(found, refitted)}"
    if better is not None:
        other, d = better
        says = _left(found, d) if found.is_real and found.value < 0 else gap(d, "nats")
        text += f"; trained with another prior, as {quoted([other.label])}, {says}"
    return f"{text}."


def _left(loss: Difference, rest: Difference) -> str:
    """What is left of a loss, and which share of it is gone."""
    if rest.is_real is False:
        return f"{gap(rest, 'nats')}, {none_found(rest)}"
    share = 1 - rest.value / loss.value
    gone = f", {100 * share:.0f} % of the loss less" if 0 <= share < 1 else ""
    return f"{gap(rest, 'nats')}{gone}"
