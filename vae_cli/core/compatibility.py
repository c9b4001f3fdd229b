"""Which choices on different axes can be combined.

A part is the object that a choice builds, such as a prior. It lists the properties that it provides and the properties
that it needs other parts to have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vae_cli.core.errors import UserError


class Need(NamedTuple):
    """A requirement of a part: the choice made on `axis` must have the property `word`, listed in its `provides`.

    `reason` says why, as a clause that ends an error message.
    """

    axis: str
    word: str
    reason: str


def offers(part: Any, word: str) -> bool:
    """Return whether a part lists this word in its `provides`."""
    return word in provided(part)


def provided(part: Any) -> frozenset[str]:
    """Return the words in a part's `provides`."""
    return frozenset(getattr(part, "provides", ()))


def check_together(parts: Mapping[str, Any], choices: Mapping[str, str]) -> None:
    """Refuse a combination in which one choice lacks a property that another needs.

    `parts` maps each axis to the part that was chosen, `choices` maps it to the name of the choice. A part may have
    `provides`, a set of property names, and `needs`, a tuple of Needs. Raises UserError, which names both choices.

    >>> from types import SimpleNamespace as Part
    >>> prior = Part(needs=[Need("sigma", "noise", "a point mass has no rate")])
    >>> check_together({"sigma": Part(provides={"noise"}), "prior": prior}, {"sigma": "fixed", "prior": "flow"})
    >>> check_together({"sigma": Part(), "prior": prior}, {"sigma": "deterministic", "prior": "flow"})
    Traceback (most recent call last):
    ...
    vae_cli.core.errors.UserError: prior=flow cannot be combined with sigma=deterministic: a point mass has no rate.
    """
    for axis, part in parts.items():
        for need in getattr(part, "needs", ()):
            other = parts[need.axis]
            if not offers(other, need.word):
                raise UserError(
                    f"{axis}={choices[axis]} cannot be combined with {need.axis}={choices[need.axis]}: {need.reason}."
                )
