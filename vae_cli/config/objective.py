"""The objective of a search: a figure in the summary of a run, such as validation/elbo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from vae_cli.config.claims import entry
from vae_cli.core.errors import UserError, nearest

TERMS = ("loss", "distortion", "penalty", "rate", "rate_loc", "rate_scale", "elbo")  # of a training step, if defined
MEASURED = (*TERMS, "rate_bits", "active_units")  # averaged over a split
PARTS = (  # that a regularizer adds to the terms
    "mmd",
    *("index_code_mi", "total_correlation", "dimension_kl"),
    *("dip_off_diagonal", "dip_diagonal"),
    *("critic_loss", "critic_total_correlation", "squared_jacobian"),
)
POSTERIOR = ("loc_std", "scale_mean", "scale_min", "collapsed")

NAMES = (
    *(f"validation/{name}" for name in (*MEASURED, *PARTS)),
    *(f"test/{name}" for name in (*MEASURED, *PARTS)),
    *(f"train/{name}" for name in (*TERMS, *PARTS)),
    *(f"posterior/{name}" for name in POSTERIOR),
)


def check_objective(name: str) -> None:
    """Raise UserError if no run has a figure of this name."""
    if name not in NAMES:
        last = name.rpartition("/")[2]
        near = nearest(next((one for one in NAMES if one.endswith(f"/{last}")), name), NAMES)
        raise UserError(
            f"objective={name}: no run has such a figure.{near} Valid names are validation/NAME and test/NAME, "
            f"where NAME is one of {', '.join(MEASURED)}; train/NAME, where NAME is one of {', '.join(TERMS)}; and "
            f"posterior/NAME, where NAME is one of {', '.join(POSTERIOR)}. Some regularizers add terms to all splits: "
            f"{', '.join(PARTS)}."
        )


def better_direction(name: str) -> Literal["maximize", "minimize"] | None:
    """Return the direction in which a search optimizes an objective; None if both directions can make sense.

    >>> better_direction("validation/elbo"), better_direction("test/rate")
    ('maximize', None)
    """
    better = entry(name.rpartition("/")[2]).better
    return None if better == "neither" else "maximize" if better == "higher" else "minimize"


def figure(summary: Mapping[str, Any], name: str) -> float | None:
    """Return a figure of a finished run by its name, such as `validation/elbo`; None if the run does not have it."""
    split, _, term = name.partition("/")
    value = summary.get(split, {}).get(term)
    return None if value is None else float(value)
