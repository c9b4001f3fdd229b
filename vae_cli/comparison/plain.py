"""The answer of a comparison in plain English: at most three sentences, without names of settings or figures."""

from __future__ import annotations

from collections.abc import Mapping

from vae_cli.comparison.arms import Comparison
from vae_cli.comparison.verdicts import Verdict, Word, closest
from vae_cli.config.claims import ClaimName
from vae_cli.core.wording import number

FRACTION = 0.9  # from this share on, a loss counts as recovered

# What a verdict says; {x} is the size of the difference, {latent} the number of latent dimensions.
BITS: dict[Word, str] = {
    "yes": "the noise limits how much a code says about its image (a code trained without noise needs {x} bits more to "
    "be decoded as well)",
    "slightly": "the noise hardly limits how much a code says about its image (by {x} bits)",
    "no difference": "the noise does not limit how much a code says about its image",
    "undecided": "these runs do not decide whether the noise limits how much a code says about its image",
    "opposite": "a code with noise says more about its image than one without (by {x} bits)",
    "opposite slightly": "a code with noise says a little more about its image than one without (by {x} bits)",
}
NEIGHBOURS: dict[Word, str] = {
    "yes": "it makes neighboring codes look more alike",
    "slightly": "it makes neighboring codes look a little more alike",
    "no difference": "it does not change how alike neighboring codes look",
    "undecided": "whether it makes neighboring codes look more alike is undecided",
    "opposite": "it does not make neighboring codes look more alike: without it, images change more evenly",
    "opposite slightly": "it does not make neighboring codes look more alike: without it, images change a little more "
    "evenly",
}
SHORTCUTS: dict[Word, str] = {
    "yes": "Without it, the network learns its training images by heart: new ones are reconstructed {x} nats worse",
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
    "yes": "Setting it to {value} by hand costs {x} nats per image (with {latent} latent dimensions)",
    "slightly": "Setting it to {value} by hand costs little, {x} nats per image (with {latent} latent dimensions)",
    "no difference": "Setting it to {value} by hand costs nothing (with {latent} latent dimensions)",
    "undecided": "Whether setting it to {value} by hand costs anything is undecided",
    "opposite": "Setting it to {value} by hand gains {x} nats per image (with {latent} latent dimensions)",
    "opposite slightly": "Setting it to {value} by hand gains a little, {x} nats per image (with {latent} latent "
    "dimensions)",
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
        latent=arm.members[0].settings.get("latent"),
        value="1" if scale is None else f"{scale.mean:.3g}",
    )


def _due_to_the_prior(comparison: Comparison, verdict: Verdict) -> str:
    """Return whether the cost of a constant sigma is gone if the prior is learned; empty without such an arm."""
    if verdict.word != "yes" or verdict.contrast is None:
        return ""
    arms = {arm.label: arm for arm in comparison.arms}
    arm, reference = arms[verdict.contrast.arm], arms[verdict.contrast.reference]
    learned = [
        other
        for other in comparison.arms
        if other.has_constant_scale and other.members[0].settings.get("prior") == "scaled_normal"
        if all(
            value == other.settings.get(key) for key, value in arm.settings.items() if key.partition(".")[0] != "prior"
        )
    ]
    if not learned:
        return ""
    rest = comparison.contrast(verdict.contrast.figure, closest(learned, arm), reference)
    if rest is None or rest.interval() is None:
        return ""
    share = 1 - rest.value / verdict.contrast.value
    if share >= FRACTION:
        return "the cost is due to the prior, since it is gone if the spread of the prior is learned, too"
    return f"a learned spread of the prior recovers {100 * share:.0f} % of it" if share > 0 else ""
