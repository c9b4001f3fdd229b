"""The answer of a comparison in plain English: at most three sentences, without names of settings or figures."""

from __future__ import annotations

import math
from collections.abc import Mapping

from vae_cli.comparison.arms import Comparison
from vae_cli.comparison.verdicts import Verdict, Word, learned_prior
from vae_cli.config.claims import ClaimName
from vae_cli.core.wording import number

# What a verdict says; {x} is the size of the difference, {latent} the number of latent dimensions.
BITS: dict[Word, str] = {
    "yes": "the noise limits how much a code says about its image (a code trained without noise needs {x} bits more "
    "to stay within 1 nat of its own best reconstruction)",
    "slightly": "the noise hardly limits how much a code says about its image (by {x} bits)",
    "no difference": "the noise does not limit how much a code says about its image",
    "undecided": "these runs do not decide whether the noise limits how much a code says about its image",
    "opposite": "a code with noise says more about its image than one without (by {x} bits)",
    "opposite slightly": "a code with noise says a little more about its image than one without (by {x} bits)",
}
NEIGHBOURS: dict[Word, str] = {
    "yes": "it makes neighboring codes decode to more similar images",
    "slightly": "it makes neighboring codes decode to slightly more similar images",
    "no difference": "it does not change how similar the images of neighboring codes are",
    "undecided": "whether it makes neighboring codes decode to more similar images is undecided",
    "opposite": "it does not make neighboring codes decode to more similar images: without it, they do so more",
    "opposite slightly": "it does not make neighboring codes decode to more similar images: without it, they do so "
    "a little more",
}
SHORTCUTS: dict[Word, str] = {
    "yes": "Without it, the network memorizes its training images more than with it: the gap between new and training "
    "images is {x} nats wider",
    "slightly": "Without it, the network memorizes its training images a little",
    "no difference": "Without it, the network does not memorize its training images more than with it",
    "undecided": "Whether the network memorizes its training images without it is undecided",
    "opposite": "Without it, the network memorizes its training images less than with it",
    "opposite slightly": "Without it, the network memorizes its training images a little less than with it",
}
SCALE: dict[Word, str] = {
    "yes": "the more the code is penalized, the closer the size of the noise comes to 1",
    "slightly": "the more the code is penalized, the closer, by a little, the size of the noise comes to 1",
    "no difference": "how much the code is penalized does not change how close the size of the noise comes to 1",
    "undecided": "whether the penalty on the code pulls the size of the noise towards 1 is undecided",
    "opposite": "the more the code is penalized, the further the size of the noise is from 1",
    "opposite slightly": "the more the code is penalized, the further, by a little, the size of the noise is from 1",
}
PRICE: dict[Word, str] = {
    "yes": "Hard-coding sigma, the size of the noise, to {value} costs {x} nats ({bits} bits) per image (with "
    "{latent} latent dimensions)",
    "slightly": "Hard-coding sigma, the size of the noise, to {value} costs little, {x} nats per image (with {latent} "
    "latent dimensions)",
    "no difference": "Hard-coding sigma, the size of the noise, to {value} costs nothing (with {latent} latent "
    "dimensions)",
    "undecided": "Whether hard-coding sigma, the size of the noise, to {value} costs anything is undecided",
    "opposite": "Hard-coding sigma, the size of the noise, to {value} gains {x} nats per image (with {latent} latent "
    "dimensions)",
    "opposite slightly": "Hard-coding sigma, the size of the noise, to {value} gains a little, {x} nats per image "
    "(with {latent} latent dimensions)",
}


def in_plain_english(comparison: Comparison, found: Mapping[ClaimName, Verdict]) -> list[str]:
    """Return what the verdicts say in at most three sentences; claims that were not judged are left out."""
    bits, neighbours = _said(comparison, found, "bits", BITS), _said(comparison, found, "neighbours", NEIGHBOURS)
    shortcuts, scale = _said(comparison, found, "shortcuts", SHORTCUTS), _said(comparison, found, "scale", SCALE)
    price = _said(comparison, found, "price", PRICE)
    first = "; ".join(text for text in (bits, neighbours) if text)
    second = "; ".join(text for text in (shortcuts, scale) if text)
    if price and (why := _due_to_the_prior(comparison, found["price"])):
        price += f": {why}"
    sentences = [text[:1].upper() + text[1:] + "." for text in (first, second, price) if text]
    seeds = {verdict.contrast.seeds for verdict in found.values() if verdict.is_tentative and verdict.contrast}
    if sentences and seeds:
        sentences[-1] += f" All of this is tentative: there are only {min(seeds)} seeds."
    return sentences


def _said(
    comparison: Comparison, found: Mapping[ClaimName, Verdict], claim: ClaimName, words: Mapping[Word, str]
) -> str:
    verdict = found[claim]
    if verdict.word not in words or verdict.contrast is None:
        return ""
    arms = {arm.label: arm for arm in comparison.arms}
    arm = arms[verdict.contrast.arm]
    scale = arm.stat("scale_mean")
    return words[verdict.word].format(
        x=number(abs(verdict.contrast.value), 1),
        bits=number(abs(verdict.contrast.value) / math.log(2), 1),
        latent=arm.members[0].settings.get("latent"),
        value="1" if scale is None else f"{scale.mean:.3g}",
    )


def _due_to_the_prior(comparison: Comparison, verdict: Verdict) -> str:
    """Return how much of the cost of a constant sigma is recovered by a learned prior; empty without such an arm."""
    if verdict.word != "yes" or verdict.contrast is None:
        return ""
    learned = learned_prior(comparison)
    if learned is None:
        return ""
    reference = next(arm for arm in comparison.arms if arm.label == verdict.contrast.reference)
    rest = comparison.contrast(verdict.contrast.figure, learned, reference)
    interval = None if rest is None else rest.interval()
    if rest is None or interval is None:
        return ""
    if interval[0] <= 0 <= interval[1]:
        return "if the width of the prior is learned, too, no cost is left that these runs could show"
    share = 1 - rest.value / verdict.contrast.value
    return f"also learning the width of the prior recovers {100 * share:.0f} % of it" if share > 0 else ""
