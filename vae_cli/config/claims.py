"""The register of claims about the encoder's noise and of figures: what each figure is called and what it means.

A figure is a measured quantity, such as the rate. The entries are in figures.toml. Everything that shows a figure to a
person (tables, plots, the report, TensorBoard, `vae explain`) takes its titles and definitions from here. Nothing heavy
is imported, so that `vae explain` is fast.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

ClaimName = Literal["bits", "neighbours", "shortcuts", "scale", "price"]
GroupName = ClaimName | Literal["second_stage", "factors"]


@dataclass(frozen=True)
class Claim:
    """One of the claims about the encoder's noise.

    number    its place in tables and reports
    title     the claim as a statement
    question  the claim turned into a question, which `vae compare` answers
    meaning   what it would mean if the claim were true, for a reader who is new to the subject
    primary   the figure that decides about the claim, chosen before any run was seen; the others describe
    sign      the sign of the difference in this figure that the claim predicts
    arms      the arms that are compared, to complete "lower" or "higher"
    margin    the largest difference in this figure that counts as none
    is_share  whether the margin is a share of the reference arm's value, instead of a value
    """

    number: int
    title: str
    question: str
    meaning: str
    primary: str
    sign: int
    arms: str
    margin: float
    is_share: bool = False


CLAIMS: dict[ClaimName, Claim] = {
    "bits": Claim(
        1,
        "The noise limits the information that a code carries",
        "Does the noise limit the information that a code carries?",
        meaning="Noise blurs codes that are closer to each other than sigma. Differences that should survive it must "
        "exceed sigma, and the penalty on the code makes large differences expensive, so a noisy code can "
        "only keep the most important ones. The figure counts the bits to which a code can be rounded, one "
        "dimension at a time, until its image gets 1 nat worse. Such rounding is wasteful, so the number "
        "serves only to compare arms.",
        primary="quantization_bits_within_1_nat",
        sign=1,
        arms="without noise (if there is no such arm, without a penalty on the code) than in the reference arm",
        margin=0.05,
        is_share=True,
    ),
    "neighbours": Claim(
        2,
        "The noise makes neighboring codes decode alike",
        "Does the noise make neighboring codes decode alike?",
        meaning="With noise, the decoder sees slightly different codes for the same image, and so it learns to decode "
        "all of them to almost the same image. The figure compares how fast the decoded image changes with "
        "the code to a linear decoder whose images vary as much, which scores 1. More means that the image "
        "changes abruptly in some places, less that it changes more slowly than that.",
        primary="jacobian_ratio",
        sign=1,
        arms="without noise than in the reference arm",
        margin=0.05,
    ),
    "shortcuts": Claim(
        3,
        "Without noise, or without a penalty on small sigma, the network takes a shortcut",
        "Without noise, or without a penalty on small sigma, does the network take a shortcut?",
        meaning="Without noise, a network can give each training image a code of its own, however close to those of "
        "others, and learn the images by heart. One would then expect that new images are reconstructed "
        "worse, compared with training images, than by a network with noise.",
        primary="distortion_gap",
        sign=1,
        arms="without noise (if there is no such arm, without a penalty on the code) than in the reference arm",
        margin=0.5,
    ),
    "scale": Claim(
        4,
        "The KL term pulls sigma towards 1",
        "Does the KL term pull sigma towards 1?",
        meaning="Under the prior N(0, I), the KL term is smallest if sigma is 1, while good reconstructions ask for a "
        "small sigma. The larger the weight of the KL term, the more the former counts. The mean over all "
        "dimensions mixes those that the decoder uses, where sigma is small, with idle ones, where it is "
        "close to 1.",
        primary="scale_distance_from_1",
        sign=-1,
        arms="with the largest weight of the regularizer than with the smallest above 0, if sigma is learned and the "
        "prior is N(0, I)",
        margin=0.05,
    ),
    "price": Claim(
        5,
        "Hard-coding sigma has a cost",
        "What does it cost to hard-code sigma?",
        meaning="With sigma = 1, codes must spread far beyond the prior N(0, I) to stay distinguishable, and each "
        "step away from the prior costs likelihood: 7 nats less mean that the model makes the images about a "
        "thousand times less likely. The figure is a tight bound on ln p(x). The ELBO understates ln p(x) by "
        "a different amount in each arm, so that it would mix the cost of sigma with how loose it is.",
        primary="iw_bound_k{k}",
        sign=-1,
        arms="with sigma = 1 everywhere (if there is no such arm, another constant) than in the reference arm",
        margin=0.5,
    ),
}


# Groups of figures that belong to no claim: they describe, and no verdict depends on them.
GROUPS: dict[GroupName, str] = {
    "second_stage": "Codes as the data of a second stage",
    "factors": "Known factors of variation",
}
_NUMBERED: dict[GroupName, str] = {name: f"{claim.number}. {claim.title}" for name, claim in CLAIMS.items()}
TITLES = _NUMBERED | GROUPS


@dataclass(frozen=True)
class Entry:
    """The description of a figure, independent of any run.

    name        the identifier in files and tags; {k} stands for a number, as in iw_bound_k{k}
    title       its display name, as at the start of a table's row: "Rate"
    phrase      the same inside a sentence: "the rate"
    definition  one sentence
    formula     plain text
    unit        nats, bits ...; empty for a ratio or a count
    better      which direction is better, if either is
    source      the paper that introduced it, or nothing
    claim       the claim that it is evidence for or against, or its group if it belongs to no claim (see GROUPS); None
                for a term that only training reports
    headline    whether short tables show it
    """

    name: str
    title: str
    phrase: str
    definition: str
    formula: str = ""
    unit: str = ""
    better: Literal["higher", "lower", "neither"] = "neither"
    source: str = ""
    claim: GroupName | None = None
    headline: bool = False


def _read_figures(file: Path) -> Iterator[Entry]:
    """Yield the entries of a register in its order. Raises TypeError if a table has an unknown key."""
    tables: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    sources: dict[str, tuple[str, str]] = tables.pop("source")
    for claim, figures in tables.items():
        for name, fields in figures.items():
            fields.setdefault("phrase", f"the {_lowercased(fields['title'])}")
            fields["claim"] = None if claim == "training" else claim
            headline = fields.pop("headline", False)
            if "{source}" not in name:
                yield Entry(name, headline=headline, **fields)
                continue
            for source, (word, phrase) in sources.items():
                filled = {key: value and value.replace("{source}", phrase) for key, value in fields.items()}
                filled["title"] = fields["title"].replace("{source}", word)
                yield Entry(name.replace("{source}", source), headline=headline and source in headline, **filled)


def _lowercased(title: str) -> str:
    """Return a title with a lower-case first letter, unless it begins with an abbreviation such as ELBO."""
    return title if title[1:2].isupper() else title[:1].lower() + title[1:]


FIGURES: tuple[Entry, ...] = tuple(_read_figures(Path(__file__).with_name("figures.toml")))

_BY_NAME = {entry.name: entry for entry in FIGURES}
_PATTERNS = {
    re.compile(re.escape(entry.name).replace(r"\{k\}", r"([1-9]\d*)")): entry
    for entry in FIGURES
    if "{k}" in entry.name
}


def entry(name: str) -> Entry:
    """Return the entry of a figure; if it has none, an entry whose title is its name in plain words.

    >>> entry("rate").title
    'Rate'
    >>> entry("my_own_figure").title
    'My own figure'
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    for pattern, found in _PATTERNS.items():
        if match := pattern.fullmatch(name):
            filled = {key: getattr(found, key).replace("{k}", match[1]) for key in ("title", "phrase", "formula")}
            return replace(found, name=name, definition=found.definition.replace("{k}", match[1]), **filled)
    words = name.replace("_", " ")
    return Entry(name, words[:1].upper() + words[1:], words, "")


def is_primary(name: str) -> bool:
    """Return whether a figure decides about a claim.

    >>> is_primary("iw_bound_k64"), is_primary("rate")
    (True, False)
    """
    return any(re.fullmatch(claim.primary.replace("{k}", r"\d+"), name) for claim in CLAIMS.values())


def headlines(claim: GroupName) -> list[Entry]:
    """Return the headline figures of a claim or another group, in the order of the register."""
    return [found for found in FIGURES if found.claim == claim and found.headline]
