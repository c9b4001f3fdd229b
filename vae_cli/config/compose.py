"""Turn the configuration that Hydra has composed into plain values, and derive the run's folder from it.

Importing this module has a side effect: one of Hydra's warnings is ignored from then on (see below).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vae_cli.config.aliases import with_current_targets
from vae_cli.config.catalog import configs_dir
from vae_cli.config.naming import AXES, run_folder, run_name
from vae_cli.core.errors import UserError

# This package's configurations of launchers and sweepers have the same names as the plugins' own schemas. Old versions
# of Hydra validated one against the other, so Hydra warns. A launcher's workers compose too, so every process must
# ignore the warning.
warnings.filterwarnings("ignore", r"\s*'hydra/(launcher|sweeper)/\w+' is validated against ConfigStore schema")


def named_folder(root: DictConfig) -> Path:
    """Return the folder of the run that a composed configuration describes; `root` includes Hydra's own node."""
    choices = {str(group): choice for group, choice in root.hydra.runtime.choices.items() if _is_ours(group)}
    sources = [Path(source.path) for source in root.hydra.runtime.config_sources if source.schema == "file"]
    # Unresolved, so that an unchanged reference such as ${latent} is not a difference.
    name = run_name(_container(root, resolve=False), choices, defaults_under(choices, sources))
    return run_folder({**_container(root, resolve=True), "choices": choices}, name)


def defaults_under(choices: Mapping[str, str], sources: list[Path]) -> dict[str, Any]:
    """Return the default settings for these choices and, under the key `choices`, the default choice of each group."""
    root: Any = OmegaConf.to_container(OmegaConf.load(configs_dir() / "train.yaml"))
    entries = [entry for entry in root.pop("defaults") if isinstance(entry, dict)]
    named = {group: choice for entry in entries for group, choice in entry.items() if "override" not in group}
    defaults: dict[str, Any] = {key: value for key, value in root.items() if key not in ("hydra", "arms")}
    # Groups first, then what replaces a part of one, such as a schedule at regularizer.beta.
    for group, choice in sorted(choices.items(), key=lambda item: "@" in item[0]):
        folder, _, package = group.partition("@")
        file = next((s / folder / f"{choice}.yaml" for s in sources if (s / folder / f"{choice}.yaml").exists()), None)
        if file is None:
            continue
        node = OmegaConf.to_container(OmegaConf.load(file))
        place = defaults
        *parents, last = (package or group).split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = node
    return {**defaults, "choices": named}


def to_plain(config: DictConfig, choices: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """Return a composed configuration as resolved plain values, with the choice of each axis under `choices`.

    choices maps each group to its choice; by default it is read from Hydra's node, which config must then include.
    """
    words = config.hydra.runtime.choices if choices is None else choices
    ours = {str(group): choice for group, choice in words.items() if _is_ours(group) and choice is not None}
    ordered = {axis: ours.pop(axis) for axis in AXES if axis in ours} | ours
    return {**with_current_targets(_container(config, resolve=True)), "choices": ordered}


def _container(config: DictConfig, resolve: bool) -> dict[str, Any]:
    ours = config.copy()
    OmegaConf.set_struct(ours, False)
    ours.pop("hydra", None)
    ours.pop("arms", None)  # they describe a whole study, and a run is one of its jobs
    plain = OmegaConf.to_container(ours, resolve=resolve, throw_on_missing=resolve)
    assert isinstance(plain, dict)
    if "choices" in plain:
        raise UserError("choices is not a setting: vae uses this key to store the choice of each axis. Leave it out.")
    return {str(key): value for key, value in plain.items()}


def _is_ours(group: str) -> bool:
    return not group.startswith("hydra/") and group != "experiment"
