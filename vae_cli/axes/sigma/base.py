"""The base class of the choices of sigma, and the check of a noise level that is set by hand."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from vae_cli.axes.schedule import Schedule, as_schedule
from vae_cli.core.compatibility import Need
from vae_cli.core.errors import UserError

LEAST, MOST = 1e-6, 1e6  # bounds of a scale: scale^2 and 1 / scale^2 do not overflow or underflow in float32


class Sigma(nn.Module):
    """A family of posteriors: forward maps raw (B, raw_size * D) to q(z|x).

    raw_size  number of encoder outputs per latent dimension; it may depend on the settings
    provides  what other choices may need of the posterior:
              "noise"       it is not a point mass, so rate and ELBO are defined
              "dimensions"  it is a product over dimensions, and the rate of each dimension is known
              "smooth"      its density is positive and differentiable everywhere
              "separate"    it does not depend on the other images of the batch
    """

    raw_size: int = 1
    provides: ClassVar[frozenset[str]] = frozenset({"noise", "dimensions", "smooth", "separate"})
    needs: ClassVar[tuple[Need, ...]] = ()


def noise_level(value: float | Schedule, most: float = MOST) -> Schedule:
    """Return `sigma.value`, a constant or a schedule, as a schedule. Raises UserError if it is, or ever becomes, less
    than 1e-6 or more than `most`."""
    schedule = as_schedule(value)
    low, high = schedule.bounds()
    if low >= LEAST and high <= most:
        return schedule
    allowed = f"the scale of the noise must be between {LEAST:g} and {most:g}"
    if low != high:
        raise UserError(
            f"sigma.value goes from {low:g} to {high:g}, but {allowed}: set the schedule's start and stop to "
            f"values in this range, for example sigma.value.start=0.1 sigma.value.stop={1 if most > 1 else 0.5:g}."
        )
    none = " For no noise at all, type sigma=deterministic." if low < LEAST else ""
    raise UserError(f"sigma.value={low:g} is not allowed: {allowed}.{none}")
