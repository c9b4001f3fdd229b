"""The figure of a run that a search optimizes: its name, and where it stands in a summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vae_cli.core.errors import UserError, nearest

TERMS = ("loss", "distortion", "penalty", "rate", "rate_loc", "rate_scale", "elbo")  # of a step, where defined
MEASURED = (*TERMS, "rate_bits", "active_units")  # over a split
POSTERIOR = ("loc_std", "scale_mean", "scale_min", "collapsed")
BETTER = {"elbo": "maximize", "loss": "minimize", "distortion": "minimize"}  # where nobody can want the other

NAMES = (
    *(f"validation/{name}" for name in MEASURED),
    *(f"test/{name}" for name in MEASURED),
    *(f"train/{name}" for name in TERMS),
    *(f"posterior/{name}" for name in POSTERIOR),
)


def check_objective(name: str) -> None:
    """Raise UserError for a figure that no run has."""
    if name not in NAMES:
        last = name.rpartition("/")[2]
        near = nearest(next((one for one in NAMES if one.endswith(f"/{last}")), name), NAMES)
        raise UserError(
            f"objective={name}: no run has such a figure.{near} There are validation/ and test/ with "
            f"{', '.join(MEASURED)}; train/ with {', '.join(TERMS)}; posterior/ with {', '.join(POSTERIOR)}."
        )


def figure(summary: Mapping[str, Any], name: str) -> float | None:
    """A figure of a finished run by its name, such as `validation/elbo`; None where the run has none."""
    split, _, term = name.partition("/")
    value = summary.get(split, {}).get(term)
    return None if value is None else float(value)
