"""The register of claims and figures: what each figure is called, means, and says about the encoder's noise.

Everything that shows a figure to a person (tables, plots, the report, TensorBoard, `vae explain`) takes its words from
here. Nothing heavy is imported, so that `vae explain` answers at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

ClaimName = Literal["bits", "neighbours", "shortcuts", "scale", "price"]


@dataclass(frozen=True)
class Claim:
    """One of the claims about the encoder's noise.

    number    its place in tables and reports
    title     the claim as a statement
    question  the same as a question that `vae compare` answers
    """

    number: int
    title: str
    question: str


CLAIMS: dict[ClaimName, Claim] = {
    "bits": Claim(
        1, "The noise limits the information that passes", "Does the noise limit the information that passes?"
    ),
    "neighbours": Claim(2, "The noise keeps neighbouring codes alike", "Does the noise keep neighbouring codes alike?"),
    "shortcuts": Claim(
        3,
        "Without noise, or without a price on small sigma, the network takes a shortcut",
        "Without noise, or without a price on small sigma, does the network take a shortcut?",
    ),
    "scale": Claim(4, "The KL term pulls sigma towards 1", "Does the KL term pull sigma towards 1?"),
    "price": Claim(5, "Hard-coding sigma has a price", "What does it cost to hard-code sigma?"),
}


@dataclass(frozen=True)
class Entry:
    """What is known of a figure, whichever run it comes from.

    name        the identifier in files and tags; {k} stands for a number, as in iw_bound_k{k}
    title       the figure as a person says it, at the start of a table's row: "Rate"
    phrase      the same inside a sentence: "the rate"
    definition  one sentence
    formula     plain text
    unit        nats, bits ...; empty for a ratio or a count
    better      which direction is better, where that can be said
    source      the paper that it comes from, or nothing
    claim       the claim that it speaks to; None for a term that only training reports
    headline    whether tables with little room show it
    """

    name: str
    title: str
    phrase: str
    definition: str
    formula: str = ""
    unit: str = ""
    better: Literal["higher", "lower", "neither"] = "neither"
    source: str = ""
    claim: ClaimName | None = None
    headline: bool = False


FIGURES: tuple[Entry, ...] = (
    Entry(
        "rate",
        "Rate",
        "the rate",
        "Information, in nats, that the posterior costs relative to the prior: an upper bound on I(x; z).",
        "KL(q(z|x) || p(z))",
        "nats",
        "neither",
        "Alemi et al., Fixing a Broken ELBO, ICML 2018",
        "bits",
        headline=True,
    ),
)

_BY_NAME = {entry.name: entry for entry in FIGURES}
_PATTERNS = {
    re.compile(re.escape(entry.name).replace(r"\{k\}", r"(\d+)")): entry for entry in FIGURES if "{k}" in entry.name
}


def entry(name: str) -> Entry:
    """Return the entry of a figure; for one that the register does not hold, its name in plain words.

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


def headlines(claim: ClaimName) -> list[Entry]:
    """Return the headline figures of a claim, in the order of the register."""
    return [found for found in FIGURES if found.claim == claim and found.headline]
