"""What stored runs and users' own YAML files may lack: the current names of classes, and settings that were added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vae_cli.config.naming import AXES

# Earlier name of a module: its name today. Entries are never removed, so that stored runs stay readable.
MOVED = {f"vae_cli.{axis}": f"vae_cli.axes.{axis}" for axis in (*AXES, "schedule")}
# The same for modules that users' own classes may import: if such an import fails, the message gives the new name.
MOVED_FOR_IMPORT = MOVED | {
    "vae_cli.check": "vae_cli.core.values",
    "vae_cli.delta": "vae_cli.model.distributions",
    "vae_cli.errors": "vae_cli.core.errors",
    "vae_cli.inference": "vae_cli.model.inference",
    "vae_cli.metric": "vae_cli.metrics",
    "vae_cli.metric.base": "vae_cli.metrics.base",
    "vae_cli.part": "vae_cli.core.compatibility",
    "vae_cli.run": "vae_cli.runs.run",
    "vae_cli.scale": "vae_cli.model.scales",
}


def current_target(target: str) -> str:
    """Return the full name of a class, with the module that defines it today.

    >>> current_target("vae_cli.sigma.Fixed")
    'vae_cli.axes.sigma.Fixed'
    >>> current_target("torch.optim.Adam")
    'torch.optim.Adam'
    """
    module, _, name = target.rpartition(".")
    return f"{MOVED.get(module, module)}.{name}" if module else target


# Settings that the runs of earlier versions lack, with the value that they had
ADDED = {"patience": None, "metrics": None}
_OPTIMIZERS = ("Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")
# The same for the settings of a class
ADDED_TO: dict[str, dict[str, Any]] = {
    "vae_cli.axes.regularizer.KL": {"draws": 1},
    **{
        f"vae_cli.axes.network.{name}": {"spectral_norm": False, "initialization": "default"}
        for name in ("MLP", "Linear", "Conv", "ResNet")
    },
    **{f"torch.optim.{name}": {"decoder_weight_decay": None} for name in _OPTIMIZERS},
}


def with_current_targets(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a configuration in which every `_target_` is the current name of its class, and every class has
    the settings that were added to it."""
    renewed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            renewed[key] = with_current_targets(value)
        else:
            renewed[key] = current_target(value) if key == "_target_" and isinstance(value, str) else value
    target = renewed.get("_target_")
    added = ADDED_TO.get(target, {}) if isinstance(target, str) else {}
    return renewed | {key: value for key, value in added.items() if key not in renewed}
