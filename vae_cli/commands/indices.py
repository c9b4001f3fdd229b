"""Lists of test images as they are typed: 0,5,9 or 0-7."""

from __future__ import annotations

import re

from vae_cli.core.errors import UserError


def parse_indices(text: str, count: int, flag: str, exactly: int | None = None) -> list[int]:
    """The numbers in a list such as 0,5,9 or 0-7, each below count. Raises UserError."""
    found: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word)
        if match is None:
            raise UserError(f"{flag} {text} is not a list of test images; type numbers such as 0,5,9 or 0-7.")
        first, last = int(match[1]), int(match[2] or match[1])
        if max(first, last) >= count:
            raise UserError(f"{flag} {text}: there are {count} test images, numbered 0 to {count - 1}.")
        found += range(first, last + 1) if first <= last else range(first, last - 1, -1)
    if exactly is not None and len(found) != exactly:
        raise UserError(f"{flag} {text} names {len(found)} test images and takes {exactly}, separated by commas.")
    return found
