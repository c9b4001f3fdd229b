"""What the choices of one axis offer to the others and ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vae_cli.core.errors import UserError


class Need(NamedTuple):
    """What a part asks of the choice made on another axis, and why, as a clause that ends an error message."""

    axis: str
    word: str
    reason: str


def offers(part: Any, word: str) -> bool:
    """Whether a part says that it provides something."""
    return word in getattr(part, "provides", ())


def check_together(parts: Mapping[str, Any], choices: Mapping[str, str]) -> None:
    """Refuse a combination that mathematics does not define.

    parts maps an axis to its part, choices to the word that chose it. A part may have `provides`, a set of words, and
    `needs`, some Needs. Raises UserError with one sentence that names both choices.
    """
    for axis, part in parts.items():
        for need in getattr(part, "needs", ()):
            other = parts[need.axis]
            if not offers(other, need.word):
                raise UserError(
                    f"{axis}={choices[axis]} cannot be combined with {need.axis}={choices[need.axis]}: {need.reason}."
                )
