"""The settings that every run has, and the values that each allows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from vae_cli.config.instantiate import brief, check_value
from vae_cli.config.naming import AXES
from vae_cli.config.objective import check_objective
from vae_cli.core.errors import UserError, nearest
from vae_cli.core.values import Count, Interval, Natural, Positive, describe, is_allowed
from vae_cli.machine import distributed

Config = dict[str, Any]
MOST = 100_000  # latent dimensions
Size = Annotated[int, Interval(1, MOST)]

SETTINGS: dict[str, Any] = {
    "latent": Size | list[Size],
    "epochs": Count,
    "patience": Count | None,
    "batch_size": Count,
    "seed": Natural,
    "max_grad_norm": Positive | None,
    "on_divergence": Literal["stop", "restart"],
    "restarts": Count,
    "precision": Literal["float32", "tf32", "bfloat16"],
    "compile": bool,
    "device": str,
    "threads": Annotated[int, Interval(1, 1024)] | Literal["auto"],
    "data_dir": str | None,
    "runs_dir": str,
    "run_name": str | None,
    "overwrite": bool,
    "log_every": Count,
    "checkpoint_minutes": Positive,
    "objective": str,
    "metrics": list[str] | None,
}


def code_size(latent: int | Sequence[int]) -> int:
    """Return D, the number of latent dimensions: the setting `latent` itself, or C h w if it is a shape [C, h, w].

    >>> code_size(16), code_size([2, 4, 4])
    (16, 32)
    """
    return latent if isinstance(latent, int) else math.prod(latent)


def code_shape(latent: int | Sequence[int]) -> tuple[int, int, int] | None:
    """Return the shape (C, h, w) of codes with positions. None if codes are vectors: latent is a number, or h = w = 1.

    >>> code_shape([2, 4, 4]), code_shape(16), code_shape([16, 1, 1])
    ((2, 4, 4), None, None)
    """
    if isinstance(latent, int):
        return None
    channels, height, width = latent
    return None if height == width == 1 else (channels, height, width)


def check_settings(config: Config) -> None:
    """Check that a configuration has all settings of a run, with allowed values, and no others. Raises UserError."""
    for key in SETTINGS:
        if key not in config:
            raise UserError(f"{key} is missing; type {key}=...")
        check_setting(key, config[key])
    check_objective(config["objective"])
    check_latent(config)
    if config["batch_size"] < distributed.count():
        raise UserError(
            f"batch_size={config['batch_size']} is less than one image for each of {distributed.count()} processes; "
            f"use batch_size={distributed.count()} or more, or start fewer processes."
        )
    for axis in AXES:
        if not isinstance(config.get(axis), Mapping) or "_target_" not in config[axis]:
            chosen = config.get("choices", {}).get(axis)
            if not chosen:
                raise UserError(f"{axis} is missing; type {axis}=...")
            raise UserError(f"{axis}={chosen} names no class: its file needs a _target_; choose a different {axis}=...")
    allowed = [*SETTINGS, *AXES, "choices"]
    for key in config:
        if key not in allowed:
            raise UserError(f"{key} is not a setting.{nearest(key, allowed)} Allowed: {', '.join(allowed[:-1])}.")


def check_setting(key: str, value: Any) -> None:
    """Raise UserError if a setting of every run cannot have this value."""
    if key != "latent":
        check_value(value, SETTINGS[key], key)
    elif not is_allowed(value, Size) and not _is_shape(value):
        raise UserError(
            f"latent={brief(value)} is not allowed: it must be {describe(Size)}, or a list [C,h,w] of channels, height "
            f"and width with a product of at most {MOST}. Type {_meant(value)}."
        )


def _is_shape(value: Any) -> bool:
    return is_allowed(value, list[Size]) and len(value) == 3 and math.prod(value) <= MOST


def _meant(value: Any) -> str:
    """Return what to type instead of an invalid `latent`; as a shape, the three numbers that it contains, if any."""
    if isinstance(value, (list, tuple)) and value and all(map(_is_shape, value)):
        shapes = [str(shape).replace(" ", "") for shape in value]
        return f"-m 'latent={','.join(shapes)}' to sweep over shapes"
    numbers = re.findall(r"[1-9][0-9]{0,3}", value) if isinstance(value, str) else []
    shape = numbers if len(numbers) == 3 and math.prod(map(int, numbers)) <= MOST else ["4", "4", "4"]
    return f"latent=16 or, with network=conv, 'latent=[{','.join(shape)}]'"


def check_latent(config: Config) -> None:
    """Raise UserError if the `latent` of an axis, such as prior.latent, differs from the run's `latent`."""
    for axis in AXES:
        given = config[axis].get("latent", config["latent"]) if isinstance(config.get(axis), Mapping) else None
        if given is not None and given != config["latent"]:
            raise UserError(
                f"{axis}.latent={brief(given)} is not allowed: it differs from latent={brief(config['latent'])}. "
                f"Leave {axis}.latent out, or type latent={brief(given)}."
            )
