"""The answers to the five questions about the encoder's noise: verdicts in words, with their evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vae_cli.comparison.arms import Arm, Comparison
from vae_cli.comparison.findings import amount, equal_rate, extremes, gap, none_found, unit_of
from vae_cli.comparison.statistics import Difference
from vae_cli.comparison.verdicts import FEW_SEEDS, Verdict, learned_prior, verdicts
from vae_cli.config.claims import CLAIMS, ClaimName, entry
from vae_cli.core.wording import capitalized, digits_for, listed, number, quoted, signed

SPELLED_OUT = 3  # an answer describes at most this many arms
# For each claim, figures that describe what the verdict's figure does not show. They never decide: of some, the value
# is known without measuring it.
DESCRIBED: dict[ClaimName, tuple[str, ...]] = {
    "bits": ("noise_probe_tolerance", "rate_bits"),
    "neighbours": (
        "jacobian_ratio_means",
        "class_change_by_step",
        "largest_step_over_mean",
        "neighbour_label_agreement",
    ),
    "shortcuts": ("collapsed_share", "reidentification"),
    "scale": ("scale_mean",),
    "price": (),
}


@dataclass(frozen=True)
class Answer:
    """A question, the answer in a few words, and sentences with the evidence."""

    question: str
    verdict: str
    sentences: list[str]


def answers(comparison: Comparison, found: Mapping[ClaimName, Verdict] | None = None) -> dict[ClaimName, Answer]:
    """Return the answer to each question, by claim. `found` are the verdicts, if they are known already."""
    more: dict[ClaimName, Callable[[Comparison], list[str]]] = {
        "bits": _bits,
        "neighbours": _nothing,
        "shortcuts": _nothing,
        "scale": _scale,
        "price": _price,
    }
    told = {}
    for claim, verdict in (found or verdicts(comparison)).items():
        sentences = [evidence(comparison, verdict), *_described(comparison, claim, verdict), *more[claim](comparison)]
        text = price_in_short(comparison, verdict) if claim == "price" else verdict.text
        told[claim] = Answer(CLAIMS[claim].question, text, sentences)
    return told


def evidence(comparison: Comparison, verdict: Verdict) -> str:
    """Return one or more sentences with the difference that decides about a claim, or why it does not."""
    found = verdict.contrast
    if found is None:
        return f"{capitalized(verdict.why)}."
    arms = {arm.label: arm for arm in comparison.arms}
    own, other = arms[found.arm].stat(found.figure), arms[found.reference].stat(found.figure)
    assert own is not None
    assert other is not None
    unit = unit_of(comparison, found.figure)
    digits = digits_for([own.mean, other.mean])
    latent = arms[found.reference].members[0].settings.get("latent")
    text = (
        f"With {latent} latent dimensions, {entry(found.figure).phrase} is {amount(own, unit, digits)} for "
        f"{quoted([found.arm])} and {amount(other, unit, digits)} for {quoted([found.reference])}"
    )
    interval = found.interval(verdict.level) if verdict.level else None
    if interval is None:
        return f"{text}: not judged, because {_because(verdict.why)}."
    digits = digits_for([found.value, *interval])
    low, high = (signed(end, digits) for end in interval)
    tail = f" {unit}" if unit else ""
    text += (
        f": a difference of {signed(found.value, digits)}{tail} [{low}, {high}] "
        f"({100 * verdict.level:.3g} % interval over seeds and test images, corrected for the number of verdicts)"
    )
    margin = f"\N{PLUS-MINUS SIGN}{number(verdict.margin)}{tail}"
    if verdict.word == "undecided":
        text += f". The interval contains 0, and reaches beyond {margin}, so a difference may exist: train more seeds"
    elif verdict.word == "no difference":
        text += f". The whole interval is within {margin}, which counts as no difference"
    elif "slightly" in verdict.word:
        text += f". The interval excludes 0, but the whole of it is within {margin}"
    if verdict.is_tentative:
        text += f". The verdict is tentative, since there are only {found.seeds} seeds; {FEW_SEEDS} are needed"
    return f"{text}."


def _because(why: str) -> str:
    return f"there is only {why}" if why == "one seed" else why


def price_in_short(comparison: Comparison, verdict: Verdict) -> str:
    """Return the verdict on the price as an amount."""
    found = verdict.contrast
    if found is None or verdict.word in ("not judged", "undecided"):
        return verdict.text
    latent = next(arm for arm in comparison.arms if arm.label == found.reference).members[0].settings.get("latent")
    size = number(abs(found.value))
    text = {
        "yes": f"{size} nats per image, with {latent} latent dimensions",
        "slightly": f"Little: {size} nats per image, with {latent} latent dimensions",
        "no difference": f"Nothing: less than {number(verdict.margin)} nats per image, with {latent} latent dimensions",
        "opposite slightly": f"Nothing: it gains {size} nats per image, with {latent} latent dimensions",
        "opposite": f"Nothing: it gains {size} nats per image, with {latent} latent dimensions",
    }[verdict.word]
    return f"Tentatively: {text[0].lower()}{text[1:]}" if verdict.is_tentative else text


def _described(comparison: Comparison, claim: ClaimName, verdict: Verdict) -> list[str]:
    """Return a sentence for each figure that describes, with the arms of the verdict and the other arms of the kind."""
    if verdict.contrast is None:
        return []
    arms = _without(comparison, noise=True, price=claim != "neighbours")
    if claim == "scale":
        labels = (verdict.contrast.arm, verdict.contrast.reference)
        arms = [arm for arm in comparison.arms if arm.label in labels]
    sentences = []
    for name in DESCRIBED[claim]:
        found = [d for arm in arms[:SPELLED_OUT] if arm is not comparison.reference
                 and (d := comparison.difference(name, arm)) is not None]  # fmt: skip
        if found and comparison.reference.stat(name) is not None:
            sentences.append(_several(comparison, found))
    return sentences


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


def _without(comparison: Comparison, noise: bool, price: bool) -> list[Arm]:
    """Return the arms without noise (if `noise` is true), and the arms with noise but without a penalty on the code (if
    `price` is true), of the reference's latent size."""
    arms = [arm for arm in comparison.shown if arm.latent == comparison.reference.latent]
    return [a for a in arms if (noise and not a.has_noise) or (price and a.has_noise and not a.has_price)]


def _nothing(comparison: Comparison) -> list[str]:
    return []


def _bits(comparison: Comparison) -> list[str]:
    sentences = []
    rate = extremes(comparison, "rate_bits" if "rate_bits" in comparison.figures else "rate")
    if rate:
        sentences.append(f"The rate is {rate[0].lower()}{rate[1:]}.")
    undefined = [arm for arm in comparison.shown if arm.stat("rate") is None and arm.reason("rate")]
    if undefined:
        labels = quoted([arm.label for arm in undefined])
        sentences.append(f"The rate is not defined for {labels}: {undefined[0].reason('rate')}.")
    return sentences


def _scale(comparison: Comparison) -> list[str]:
    free = [arm for arm in comparison.shown if arm.stat("scale_mean") and not arm.has_constant_scale]
    return [text for arm in [arm for arm in free if arm.has_price][:SPELLED_OUT] for text in _active_and_idle(arm)]


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


def _price(comparison: Comparison) -> list[str]:
    """Describe the arms with a constant sigma and the reference's latent size: their ELBO, under their own priors and
    under other priors, and how much the importance-weighted bound still grows."""
    reference = comparison.reference
    arms = [a for a in comparison.shown if a.has_constant_scale and a is not reference and a.stat("elbo")]
    arms = [arm for arm in arms if arm.latent == reference.latent]
    if not arms or reference.stat("elbo") is None:
        return []
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
    return [*_with_a_learned_prior(comparison), *sentences, *_growth(comparison, [reference, *arms][:SPELLED_OUT])]


def _with_a_learned_prior(comparison: Comparison) -> list[str]:
    """Return a list with a sentence on how much of the price is left if the width of the prior is learned, too; empty
    without such an arm."""
    bound, found = comparison.tightest_bound, learned_prior(comparison)
    rest = None if bound is None or found is None else comparison.contrast(bound, found, comparison.reference)
    interval = None if rest is None else rest.interval()
    if rest is None or interval is None:
        return []
    digits = digits_for([rest.value, *interval])
    low, high = (signed(end, digits) for end in interval)
    return [
        f"If the width of the prior is learned, too, in {quoted([rest.arm])}, {entry(rest.figure).phrase} differs from "
        f"that of {quoted([rest.reference])} by {signed(rest.value, digits)} nats [{low}, {high}] (95 % interval "
        "over seeds and test images)."
    ]


def _growth(comparison: Comparison, arms: Sequence[Arm]) -> list[str]:
    """Return a list with a sentence on how much the bound grows from 64 draws to all of them; empty if unknown."""
    grown = [(arm, stat) for arm in arms if (stat := arm.stat("iw_growth")) is not None]
    if not grown or comparison.tightest_bound is None:
        return []
    draws = int(comparison.tightest_bound.removeprefix("iw_bound_k"))
    said = listed([f"{amount(stat, 'nats')} for {quoted([arm.label])}" for arm, stat in grown])
    return [f"From 64 to {draws:,} draws, the importance-weighted bound grows by {said}."]


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
