"""The verdict on each claim: one figure, chosen in advance, compared between two arms that are chosen by a fixed rule.

Every other figure describes. The five verdicts of a report are corrected for their number by Holm's procedure, so that
if the arms differ in nothing, at most 5 % of reports say of any claim that there is a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from vae_cli.comparison.arms import Arm, Comparison
from vae_cli.comparison.statistics import Contrast, holm
from vae_cli.config.claims import CLAIMS, ClaimName
from vae_cli.core.wording import quoted

FEW_SEEDS = 5  # with fewer, a verdict is tentative
FEW_DRAWS = 1000  # with fewer, the importance-weighted bound is too loose to compare arms

Word = Literal[
    "yes", "slightly", "no difference", "undecided", "opposite slightly", "opposite", "not judged", "not tested"
]
WORDS: dict[Word, str] = {
    "yes": "Yes",
    "slightly": "Yes, but only slightly",
    "no difference": "No difference",
    "undecided": "Undecided",
    "opposite slightly": "The opposite, but only slightly",
    "opposite": "The opposite",
    "not judged": "Not judged",
    "not tested": "Not tested",
}


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim.

    contrast  the difference that decides, in the claim's figure; None if the claim was not tested
    level     the level of the interval that decides, which depends on the other claims (see `holm`)
    margin    the largest difference that counts as none
    why       why the claim was not tested or not judged
    """

    word: Word
    contrast: Contrast | None = None
    level: float = 0.0
    margin: float = 0.0
    why: str = ""

    @property
    def is_difference(self) -> bool:
        """Whether the verdict says that there is a difference."""
        return self.word in ("yes", "slightly", "opposite slightly", "opposite")

    @property
    def is_tentative(self) -> bool:
        """Whether there are few seeds."""
        return self.level > 0 and self.contrast is not None and self.contrast.seeds < FEW_SEEDS

    @property
    def text(self) -> str:
        """The verdict in words, such as `Tentatively: no difference`."""
        words = WORDS[self.word]
        return f"Tentatively: {words[0].lower()}{words[1:]}" if self.is_tentative else words


def verdicts(comparison: Comparison) -> dict[ClaimName, Verdict]:
    """Return the verdict on each claim."""
    found = {claim: _tested(comparison, claim) for claim in CLAIMS}
    p_values = {
        claim: verdict.contrast.p
        for claim, verdict in found.items()
        if verdict.word == "undecided" and verdict.contrast is not None and verdict.contrast.p is not None
    }
    for claim, level in zip(p_values, holm(list(p_values.values())), strict=True):
        contrast, margin = found[claim].contrast, found[claim].margin
        assert contrast is not None
        interval = contrast.interval(level)
        assert interval is not None
        word = word_for(interval, CLAIMS[claim].sign, margin)
        found[claim] = Verdict(word, contrast, level, margin)
    return found


def compared(comparison: Comparison, most: int = 8) -> list[Arm]:
    """Return the arms of the verdicts, the one with a learned prior that explains the price and, up to `most`, others:
    first those with as many latent dimensions as the reference."""
    labels = [comparison.reference.label]
    for verdict in verdicts(comparison).values():
        if verdict.contrast is not None:
            labels += [verdict.contrast.reference, verdict.contrast.arm]
    if (learned := learned_prior(comparison)) is not None:
        labels.append(learned.label)
    others = sorted(comparison.usual, key=lambda arm: arm.latent != comparison.reference.latent)
    labels += [arm.label for arm in others]
    chosen = list(dict.fromkeys(labels))[:most]
    return [arm for arm in comparison.arms if arm.label in chosen]


def word_for(interval: tuple[float, float], sign: int, margin: float) -> Word:
    """Return the word for an interval of a difference that the claim predicts to have this sign.

    >>> word_for((2, 4), 1, 1), word_for((0.2, 0.6), 1, 1), word_for((-0.5, 0.6), 1, 1), word_for((-0.5, 2), 1, 1)
    ('yes', 'slightly', 'no difference', 'undecided')
    >>> word_for((2, 4), -1, 1), word_for((0.2, 0.6), -1, 1)
    ('opposite', 'opposite slightly')
    """
    low, high = sorted(sign * end for end in interval)
    if low > 0:
        return "slightly" if high < margin else "yes"
    if high < 0:
        return "opposite slightly" if low > -margin else "opposite"
    return "no difference" if -margin < low and high < margin else "undecided"


def _tested(comparison: Comparison, claim: ClaimName) -> Verdict:
    """Return the contrast that decides about a claim as an undecided verdict, or why there is none."""
    figure = _figure(comparison, claim)
    pair = PAIRS[claim](comparison, figure)
    if isinstance(pair, str):
        return Verdict("not tested", why=pair)
    arm, reference = pair
    contrast = comparison.contrast(figure, arm, reference)
    if contrast is None:
        labels = [one.label for one in (arm, reference) if one.stat(figure) is None]
        reasons = [one.reason(figure) for one in (arm, reference) if one.stat(figure) is None]
        text = f"is not defined for {quoted(labels)}: {reasons[0]}" if reasons[0] else "was not measured"
        return Verdict("not tested", why=f"the figure that decides {text}")
    own = reference.stat(figure)
    assert own is not None
    margin = CLAIMS[claim].margin * (abs(own.mean) if CLAIMS[claim].is_share else 1)
    if contrast.p is None:
        return Verdict("not judged", contrast, 0.0, margin, contrast.why_unknown)
    if claim == "price" and (draws := int(figure.removeprefix("iw_bound_k"))) < FEW_DRAWS:
        why = f"{draws} draws are too few for the bound; type vae compare --profile default"
        return Verdict("not judged", contrast, 0.0, margin, why)
    return Verdict("undecided", contrast, 0.0, margin)


def _figure(comparison: Comparison, claim: ClaimName) -> str:
    primary = CLAIMS[claim].primary
    return (comparison.tightest_bound or primary.replace("{k}", "64")) if "{k}" in primary else primary


def closest(arms: Sequence[Arm], to: Arm) -> Arm:
    """Return the arm that differs from another one in the fewest settings; the first of several."""
    return min(arms, key=lambda arm: sum(arm.settings[key] != to.settings.get(key) for key in arm.settings))


def learned_prior(comparison: Comparison) -> Arm | None:
    """Return the arm that differs from the one that decides about the price only in that its prior is learned."""
    pair = _hard_coded(comparison, _figure(comparison, "price"))
    if isinstance(pair, str):
        return None
    fixed, _ = pair
    found = [
        arm
        for arm in comparison.arms
        if arm.has_constant_scale and arm.learns_width_of_prior and arm.differs_only_in(["prior"], fixed)
    ]
    return closest(found, fixed) if found else None


Pair = tuple[Arm, Arm] | str  # the arm and its reference, or why there is no pair


def _usable(reference: Arm) -> str | None:
    """Return why an arm cannot be the reference of claims 1 to 3; None if it can."""
    if reference.has_noise and reference.has_price:
        return None
    own = quoted([reference.label])
    return f"the reference arm, {own}, has no noise, or no penalty on the code: choose another arm with --reference ARM"


def _without_noise(comparison: Comparison, figure: str) -> Pair:
    """Pair the reference with the closest arm without noise."""
    arms = [arm for arm in comparison.arms if not arm.has_noise]
    why = _usable(comparison.reference) or (None if arms else "no arm was trained without noise")
    return why or (closest(arms, comparison.reference), comparison.reference)


def _without_noise_or_penalty(comparison: Comparison, figure: str) -> Pair:
    """Pair the reference with the closest arm without noise or, if there is none, without a penalty on the code."""
    arms = [arm for arm in comparison.arms if not arm.has_noise]
    arms = arms or [arm for arm in comparison.arms if not arm.has_price]
    none = "no arm was trained without noise, or without a penalty on the code"
    why = _usable(comparison.reference) or (None if arms else none)
    return why or (closest(arms, comparison.reference), comparison.reference)


def _weights(comparison: Comparison, figure: str) -> Pair:
    """Pair the largest with the smallest weight above 0 in the family closest to the reference: only arms with a
    learned sigma and the prior N(0, I), since another prior pulls sigma elsewhere."""
    ladders = []
    for family in comparison.families:
        arms = [arm for arm in family.arms if arm.beta and arm.stat(figure) and not arm.has_constant_scale]
        arms = [arm for arm in arms if arm.has_standard_prior]
        if len({arm.beta for arm in arms}) > 1:
            ladders.append(arms)
    if not ladders:
        return "no learned sigma was trained under N(0, I) with more than one weight above 0"
    usual = closest([min(arms, key=lambda arm: abs((arm.beta or 0) - 1)) for arms in ladders], comparison.reference)
    arms = next(arms for arms in ladders if usual in arms)
    return arms[-1], arms[0]


def _hard_coded(comparison: Comparison, figure: str) -> Pair:
    """Pair the reference with the closest arm whose sigma is 1 everywhere or, if there is none, any other constant."""
    reference = comparison.reference
    if reference.stat(figure) is None or reference.has_constant_scale:
        return "the reference arm has no bound on ln p(x), or a constant sigma"
    arms = [arm for arm in comparison.arms if arm is not reference and arm.has_constant_scale and arm.stat(figure)]
    ones = [arm for arm in arms if (stat := arm.stat("scale_mean")) is not None and abs(stat.mean - 1) < 1e-5]
    return (closest(ones or arms, reference), reference) if arms else "no arm was trained with a constant sigma"


PAIRS: dict[ClaimName, Callable[[Comparison, str], Pair]] = {
    "bits": _without_noise_or_penalty,
    "neighbours": _without_noise,
    "shortcuts": _without_noise_or_penalty,
    "scale": _weights,
    "price": _hard_coded,
}
