"""The answers to the five questions about the encoder's noise, derived from a comparison's figures by fixed rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vae_cli.comparison.arms import Arm, Comparison
from vae_cli.comparison.findings import amount, equal_rate, extremes, gap, none_found, unit_of
from vae_cli.comparison.statistics import Difference
from vae_cli.config.claims import CLAIMS, ClaimName, entry
from vae_cli.core.wording import capitalized, digits_for, listed, number, quoted

SPELLED_OUT = 3  # an answer gives the values of at most this many figures (for claim 4, arms)
# For each claim, the figures that would differ if the claim were true, and the sign of the difference: an arm without
# noise, or without a penalty on the code, minus the reference arm.
EXPECTED: dict[ClaimName, list[tuple[str, int]]] = {
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
    """A question, the answer in a few words, and sentences with the evidence."""

    question: str
    verdict: str
    sentences: list[str]


def answers(comparison: Comparison) -> dict[ClaimName, Answer]:
    """Return the answer to each question, by claim."""
    rules: dict[ClaimName, Callable[[Comparison], tuple[str, list[str]]]] = {
        "bits": _bits,
        "neighbours": _neighbours,
        "shortcuts": _shortcuts,
        "scale": _scale,
        "price": _price,
    }
    return {claim: Answer(CLAIMS[claim].question, *rule(comparison)) for claim, rule in rules.items()}


def verdict_of(supporting: int, contradicting: int, tested: int) -> str:
    """Return the verdict on a claim, given how many of the `tested` comparisons support it and how many contradict it.

    >>> verdict_of(3, 0, 3), verdict_of(2, 0, 3), verdict_of(1, 0, 3), verdict_of(1, 1, 3)
    ('Yes', 'Mostly', 'In part', 'Mixed')
    >>> verdict_of(0, 1, 3), verdict_of(0, 0, 3), verdict_of(0, 0, 0)
    ('No, the opposite', 'Not shown', 'Cannot tell')
    """
    if not tested:
        return "Cannot tell"
    if supporting and contradicting:
        return "Mixed"
    if contradicting:
        return "No, the opposite"
    if not supporting:
        return "Not shown"
    return "Yes" if supporting == tested else "Mostly" if 2 * supporting > tested else "In part"


def _contrast(comparison: Comparison, claim: ClaimName, arms: Sequence[Arm], what: str) -> tuple[str, list[str]]:
    """Answer whether arms differ from the reference as a claim predicts: return the verdict and the evidence.

    `what` describes the arms, for example "without noise".
    """
    reference = comparison.reference
    own = quoted([reference.label])
    if not reference.has_noise or not reference.has_price:
        return "Not tested", [
            f"The reference arm, {own}, has no noise, or no penalty on the code. Choose another arm: --reference ARM."
        ]
    arms = [arm for arm in arms if arm is not reference]
    if not arms:
        return "Not tested", [f"No arm was trained {what}."]
    others = quoted([arm.label for arm in arms])
    pairs = [
        (found, sign)
        for name, sign in EXPECTED[claim]
        for arm in arms
        if (found := comparison.difference(name, arm)) is not None
    ]
    if not pairs:
        return "Not tested", [f"No figure of this claim is defined both for {own} and for {others}."]
    tested = [pair for pair in pairs if pair[0].is_real is not None]
    supporting = sum(bool(found.is_real) and found.value * sign > 0 for found, sign in tested)
    contradicting = sum(bool(found.is_real) and found.value * sign < 0 for found, sign in tested)
    if tested:
        counts = _counts(supporting, contradicting, len(tested) - supporting - contradicting)
        sentences = [f"Of {len(tested)} comparisons of {others} with {own}, {counts}."]
    else:
        why = pairs[0][0].why_unknown
        sentences = [f"There is no interval ({why}), so a difference cannot be distinguished from chance."]
    names = list(dict.fromkeys(found.figure for found, _ in sorted(pairs, key=lambda pair: not pair[0].is_real)))
    for name in names[:SPELLED_OUT]:
        sentences.append(_several(comparison, [found for found, _ in pairs if found.figure == name]))
    return verdict_of(supporting, contradicting, len(tested)), sentences


def _counts(supporting: int, contradicting: int, neither: int) -> str:
    said = [f"{supporting or 'none'} support{'s' if supporting in (0, 1) else ''} the claim"]
    if contradicting:
        said.append(f"{contradicting} contradict{'s' if contradicting == 1 else ''} it")
    if neither:
        said.append(f"{neither} show{'s' if neither == 1 else ''} no difference")
    return listed(said)


def _several(comparison: Comparison, found: Sequence[Difference]) -> str:
    """Return a sentence with a figure's mean in the reference arm and, for each other arm, its mean and difference."""
    name, reference = found[0].figure, comparison.reference.stat(found[0].figure)
    assert reference is not None
    stats = {arm.label: stat for arm in comparison.arms if (stat := arm.stat(name)) is not None}
    unit = unit_of(comparison, name)
    digits = digits_for([reference.mean, *(stats[d.arm].mean for d in found)])
    parts = [f"{amount(reference, unit, digits)} for {quoted([comparison.reference.label])}"]
    for d in found:
        says = none_found(d) if d.is_real is False else gap(d, unit)
        parts.append(f"{amount(stats[d.arm], '', digits)} for {quoted([d.arm])} ({says})")
    return f"{capitalized(entry(name).phrase)} is {listed(parts)}."


def _one(comparison: Comparison, found: Difference) -> str:
    """Return a sentence with the means of two arms and their difference."""
    arms = {arm.label: arm for arm in comparison.arms}
    own, other = arms[found.arm].stat(found.figure), arms[found.reference].stat(found.figure)
    assert own is not None
    assert other is not None
    unit = unit_of(comparison, found.figure)
    digits = digits_for([own.mean, other.mean])
    says = none_found(found) if found.is_real is False else f"a difference of {gap(found, unit)}"
    return (
        f"{capitalized(entry(found.figure).phrase)} is {amount(own, unit, digits)} for {quoted([found.arm])} and "
        f"{amount(other, unit, digits)} for {quoted([found.reference])}: {says}."
    )


def _without(comparison: Comparison, noise: bool, price: bool) -> list[Arm]:
    """Return the arms without noise (if `noise` is true), and the arms with noise but without a penalty on the code (if
    `price` is true)."""
    return [a for a in comparison.shown if (noise and not a.has_noise) or (price and a.has_noise and not a.has_price)]


def _bits(comparison: Comparison) -> tuple[str, list[str]]:
    arms = _without(comparison, noise=True, price=True)
    verdict, sentences = _contrast(comparison, "bits", arms, "without noise, or without a penalty on the code")
    rate = extremes(comparison, "rate_bits" if "rate_bits" in comparison.figures else "rate")
    if rate:
        sentences.insert(1, f"The rate is {rate[0].lower()}{rate[1:]}.")
    undefined = [arm for arm in comparison.shown if arm.stat("rate") is None and arm.reason("rate")]
    if undefined:
        labels = quoted([arm.label for arm in undefined])
        sentences.append(f"The rate is not defined for {labels}: {undefined[0].reason('rate')}.")
    return verdict, sentences


def _neighbours(comparison: Comparison) -> tuple[str, list[str]]:
    return _contrast(comparison, "neighbours", _without(comparison, noise=True, price=False), "without noise")


def _shortcuts(comparison: Comparison) -> tuple[str, list[str]]:
    arms = _without(comparison, noise=True, price=True)
    return _contrast(comparison, "shortcuts", arms, "without noise, or without a penalty on the code")


def _scale(comparison: Comparison) -> tuple[str, list[str]]:
    """For each family with a learned sigma, compare the mean sigma at the largest and smallest regularizer weights."""
    found, sentences = [], []
    for family in comparison.families:
        arms = [arm for arm in family.arms if arm.stat("scale_mean") and not arm.has_constant_scale]
        if len(arms) > 1 and arms[0].beta != arms[-1].beta:
            rise = comparison.difference("scale_mean", arms[-1], arms[0])
            if rise is not None:
                found.append(rise)
                sentences.append(_one(comparison, rise))
    free = [arm for arm in comparison.shown if arm.stat("scale_mean") and not arm.has_constant_scale]
    for arm in [arm for arm in free if arm.has_price][:SPELLED_OUT]:
        sentences += _active_and_idle(arm)
    if not free:
        return "Not tested", ["No arm has a learned sigma."]
    if not found:
        return "Not tested", ["No learned sigma was trained with more than one weight of the regularizer.", *sentences]
    rising = sum(bool(d.is_real) and d.value > 0 for d in found)
    falling = sum(bool(d.is_real) and d.value < 0 for d in found)
    return verdict_of(rising, falling, sum(d.is_real is not None for d in found)), sentences


def _active_and_idle(arm: Arm) -> list[str]:
    """Return a list with one sentence on the median sigma of active and idle dimensions; empty if neither is known."""
    medians = {}
    for kind in ("active", "idle"):
        curves = [curve for curve in arm.curves(f"scale_{kind}_quantiles") if len(curve) == 5]  # 5, 25, 50, 75, 95 %
        if curves:
            medians[kind] = sum(curve[2] for curve in curves) / len(curves)
    if not medians:
        return []
    said = " and ".join(f"{number(value)} in {kind} dimensions" for kind, value in medians.items())
    return [f"The median sigma of {quoted([arm.label])} is {said}."]


def _price(comparison: Comparison) -> tuple[str, list[str]]:
    """Compare arms with a constant sigma to the reference by ELBO, under their own priors and under other priors."""
    reference = comparison.reference
    arms = [a for a in comparison.shown if a.has_constant_scale and a is not reference and a.stat("elbo")]
    if not arms or reference.stat("elbo") is None:
        return "Not tested", ["This needs the ELBO of the reference arm, and of another arm with a constant sigma."]
    gaps = [(arm, d) for arm in arms if (d := comparison.difference("elbo", arm)) is not None]
    sentences, said = [], set()
    for arm, found in sorted(gaps, key=lambda pair: pair[1].value):
        if arm.label in said:
            continue
        others = [(other, d) for other, d in gaps if other is not arm and _differ_in_prior(arm, other)]
        better = max(others, key=lambda pair: pair[1].value, default=None)
        if better is not None:
            said.add(better[0].label)
        sentences.append(_cost(comparison, arm, found, better))
    sentences += [equal_rate(comparison, equal) for equal in comparison.at_equal_rate]
    return _cost_in_short([d for _, d in gaps]), sentences


def _cost_in_short(gaps: Sequence[Difference]) -> str:
    """Return a verdict: how many arms with a constant sigma have a lower ELBO than the reference, and by how much."""
    known = [d for d in gaps if d.interval is not None]
    losses = sorted(-d.value for d in known if d.is_real and d.value < 0)
    if not known:
        low, high = min(-d.value for d in gaps), max(-d.value for d in gaps)
        ends = number(high) if low == high else f"{number(low)} to {number(high)}"
        return f"A loss of {ends} nats of ELBO, without an interval ({gaps[0].why_unknown})"
    if not losses:
        return f"No loss of ELBO found with {known[0].seeds} seeds"
    digits = digits_for(losses)
    ends = " to ".join(dict.fromkeys(number(end, digits) for end in (losses[0], losses[-1])))
    arms = f"{len(losses)} of the {len(known)} arms"
    if len(losses) == len(known):
        arms = {1: "The arm", 2: "Both arms"}.get(len(known), f"All {len(known)} arms")
    return f"{arms} with a constant sigma lose{'s' if len(losses) == 1 else ''} {ends} nats of ELBO"


def _differ_in_prior(one: Arm, other: Arm) -> bool:
    """Return whether two arms differ only in their prior."""
    keys = {key for key in one.settings if one.settings[key] != other.settings.get(key)}
    return bool(keys) and all(key.partition(".")[0] == "prior" for key in keys)


def _cost(comparison: Comparison, arm: Arm, found: Difference, better: tuple[Arm, Difference] | None) -> str:
    """Return a sentence on how much ELBO an arm with a constant sigma loses, and how much of this loss two other priors
    recover: a Gaussian prior refitted to the trained models' codes, and the prior of `better`, the best arm that
    differs from this one only in its prior."""
    own, reference = quoted([arm.label]), quoted([comparison.reference.label])
    text = f"The ELBO of {own} differs from that of {reference} by {gap(found, 'nats')}"
    if found.is_real is False:
        text += f" ({none_found(found)})"
    is_loss = bool(found.is_real) and found.value < 0
    refitted = comparison.difference("elbo_gaussian_prior", arm)
    if refitted is not None and is_loss:
        text += f"; under a Gaussian prior refitted to the codes of each model, by {_remaining(found, refitted)}"
    if better is not None:
        other, d = better
        says = _remaining(found, d) if is_loss else gap(d, "nats")
        text += f"; trained with another prior, in {quoted([other.label])}, by {says}"
    return f"{text}."


def _remaining(loss: Difference, rest: Difference) -> str:
    """Return the ELBO difference that remains under another prior, and the percentage of the loss that is recovered."""
    if rest.is_real is False:
        return f"{gap(rest, 'nats')} ({none_found(rest)})"
    share = 1 - rest.value / loss.value
    gone = f" ({100 * share:.0f} % of the difference removed)" if 0 <= share < 1 else ""
    return f"{gap(rest, 'nats')}{gone}"
