"""The settings that every run has, and the values that each allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from vae_cli.config.instantiate import brief, check_value
from vae_cli.config.naming import AXES
from vae_cli.config.objective import check_objective
from vae_cli.core.errors import UserError, nearest
from vae_cli.core.values import Count, Interval, Natural, Positive
from vae_cli.machine import distributed

Config = dict[str, Any]

SETTINGS: dict[str, Any] = {
    "latent": Annotated[int, Interval(1, 100_000)],
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


def check_settings(config: Config) -> None:
    """Check that a configuration has all settings of a run, with allowed values, and no others. Raises UserError."""
    for key, kind in SETTINGS.items():
        if key not in config:
            raise UserError(f"{key} is missing; type {key}=...")
        check_value(config[key], kind, key)
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


def check_latent(config: Config) -> None:
    """Raise UserError if the `latent` of an axis, such as prior.latent, differs from the run's `latent`."""
    for axis in AXES:
        given = config[axis].get("latent", config["latent"]) if isinstance(config.get(axis), Mapping) else None
        if given is not None and given != config["latent"]:
            raise UserError(
                f"{axis}.latent={brief(given)} is not allowed: it differs from latent={config['latent']}. "
                f"Leave {axis}.latent out, or type latent={brief(given)}."
            )
