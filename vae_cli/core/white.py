"""The value of white in images with more than 8 bits per channel: most formats do not store it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from vae_cli.core.errors import UserError

if TYPE_CHECKING:  # imported by the functions that need it: commands start faster
    from PIL import Image

WHITES = (1, 255, 4095, 65535)
# Interpolation overshoots. All but a thousandth of the values may exceed white by 5 %, and the rest by 50 %.
MOST, OVERSHOOT, PEAK = 0.999, 1.05, 1.5
USED = 0.1  # of the range from black to white; if nearly all values lie below, a smaller white is as likely


class Values(NamedTuple):
    """What an image with more than 8 bits per channel says about the value of white.

    is_float  whether the values are floating-point numbers
    low       the 0.1th percentile of the values
    high      the 99.9th percentile
    peak      the maximum
    """

    is_float: bool
    low: float
    high: float
    peak: float


def is_deep(image: Image.Image) -> bool:
    """Return whether an image has more than 8 bits per channel."""
    return image.mode == "F" or image.mode.startswith("I")


def values_of(image: Image.Image) -> Values:
    """Return the range of values in an image with more than 8 bits per channel; NaN and infinity are left out."""
    import numpy as np

    values = np.asarray(image, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return Values(image.mode == "F", 0.0, 0.0, 0.0)
    low, high = np.quantile(values, [1 - MOST, MOST], method="nearest")
    return Values(image.mode == "F", float(low), float(high), float(values.max()))


def find_whites(images: Mapping[str, Values], advice: str) -> dict[bool, float]:
    """Return the value of white for images of floating-point numbers (True) and of integers (False).

    images maps the names of files to their values. White is the smallest of WHITES that explains all files; integers of
    16 bits or more have 65535. Raises UserError, which ends in `advice`, if no white explains them, if nearly all
    values are so small that a smaller white is as likely, or if the files disagree.
    """
    found = {}
    for is_float in {values.is_float for values in images.values()}:
        group = {name: values for name, values in images.items() if values.is_float == is_float}
        candidates = WHITES if is_float else WHITES[-1:]
        found[is_float] = float(_white(group, candidates, advice))
    return found


def _white(images: Mapping[str, Values], candidates: tuple[int, ...], advice: str) -> int:
    darkest, brightest = (max(images, key=lambda name: sign * images[name].high) for sign in (-1, 1))
    lowest = min(images, key=lambda name: images[name].low)
    high, peak = images[brightest].high, max(values.peak for values in images.values())
    white = next((white for white in candidates if high <= OVERSHOOT * white and peak <= PEAK * white), None)
    if white is None:
        raise UserError(f"{brightest} has values up to {peak:g}, and the value of white is unknown. {advice}")
    if images[lowest].low < (1 - OVERSHOOT) * white:
        raise UserError(f"{lowest} has values from {images[lowest].low:g}, and the value of black is unknown. {advice}")
    if white > WHITES[0] and high < USED * white:
        raise UserError(
            f"Nearly all values are at most {high:g}, even in the brightest image, {brightest}, so the value of white "
            f"is unknown. {advice}"
        )
    dark = images[darkest]
    if white > WHITES[0] and dark.is_float and dark.high > 0 and dark.peak <= PEAK * WHITES[0]:
        raise UserError(
            f"The value of white differs between images: {darkest} has values up to {dark.peak:g}, and {brightest} up "
            f"to {images[brightest].peak:g}. {advice}"
        )
    return white
