"""What Hydra has composed, as plain values, and the folder of the run that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vae_cli.config.aliases import with_current_targets
from vae_cli.config.catalog import configs_dir
from vae_cli.config.naming import AXES, run_folder, run_name
from vae_cli.core.errors import UserError


def named_folder(root: DictConfig) -> Path:
    """The folder of the run that a whole composition, with Hydra's node in it, describes."""
    choices = {str(group): choice for group, choice in root.hydra.runtime.choices.items() if _is_ours(group)}
    sources = [Path(source.path) for source in root.hydra.runtime.config_sources if source.schema == "file"]
    # References such as ${latent} are no difference as long as they stand there unchanged.
    name = run_name(_container(root, resolve=False), choices, defaults_under(choices, sources))
    return run_folder({**_container(root, resolve=True), "choices": choices}, name)


def defaults_under(choices: Mapping[str, str], sources: list[Path]) -> dict[str, Any]:
    """The settings as the files of these choices have them, and under `choices` the words that stand for themselves."""
    root: Any = OmegaConf.to_container(OmegaConf.load(configs_dir() / "train.yaml"))
    entries = [entry for entry in root.pop("defaults") if isinstance(entry, dict)]
    named = {group: choice for entry in entries for group, choice in entry.items() if "override" not in group}
    defaults: dict[str, Any] = {key: value for key, value in root.items() if key not in ("hydra", "arms")}
    # Groups first, then what is laid into them, as a schedule at regularizer.beta.
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
    """A composition, with Hydra's node or without it, as resolved plain values; `choices` has the words that chose its
    parts, which stand in Hydra's node unless they are given."""
    words = config.hydra.runtime.choices if choices is None else choices
    ours = {str(group): choice for group, choice in words.items() if _is_ours(group) and choice is not None}
    ordered = {axis: ours.pop(axis) for axis in AXES if axis in ours} | ours
    return {**with_current_targets(_container(config, resolve=True)), "choices": ordered}


def _container(config: DictConfig, resolve: bool) -> dict[str, Any]:
    ours = config.copy()
    OmegaConf.set_struct(ours, False)
    ours.pop("hydra", None)
    ours.pop("arms", None)  # of a study: a run is one job of it
    plain = OmegaConf.to_container(ours, resolve=resolve, throw_on_missing=resolve)
    assert isinstance(plain, dict)
    if "choices" in plain:
        raise UserError("choices is not a setting: it is where the words that chose each part are noted. Leave it out.")
    return {str(key): value for key, value in plain.items()}


def _is_ours(group: str) -> bool:
    return not group.startswith("hydra/") and group != "experiment"
