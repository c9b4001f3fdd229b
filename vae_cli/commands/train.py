"""`vae train`: from overrides to trained runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vae_cli import hydra_front
from vae_cli.catalog import configs_dir
from vae_cli.errors import UserError
from vae_cli.naming import AXES, run_folder, run_name

# What is imported below, inside functions, brings torch with it, and `--cfg` and a misspelt word need none of it.


class Finished(UserError):
    """The run has been trained before, and there is nothing to do."""

    exit_code = 0


def main(overrides: Sequence[str], trust: Sequence[str] = (), **flags: Any) -> None:
    """Train one run, or with multirun a sweep of them. Raises UserError or Failure."""
    if trust:
        os.environ["VAE_TRUST"] = " ".join([os.environ.get("VAE_TRUST", ""), *trust]).strip()
    with hydra_front.check_sweeps(is_to_be_trained):
        hydra_front.run(task, list(overrides), **flags)


@hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name="train")
def task(config: DictConfig) -> float | None:
    """Train one run, in this process or in one that a launcher has started."""
    from rich.console import Console

    from vae_cli.build import build_experiment
    from vae_cli.experiment import run_experiment
    from vae_cli.report import report
    from vae_cli.run import RunDir

    folder = RunDir(_relative(Path(HydraConfig.get().runtime.output_dir)))
    plain = to_plain(config, HydraConfig.get().runtime.choices)
    experiment = _checked.pop(str(folder.path.absolute()), None) or build_experiment(plain)
    summary = run_experiment(experiment, folder, Console(stderr=True))
    report(Console(), folder, summary)
    loss = (summary["validation"] or summary["test"])["loss"]
    return float(loss)


_checked: dict[str, Any] = {}


def checked_run_dir(*, _root_: DictConfig) -> str:
    """The folder of the run that a configuration describes: the resolver ${run_dir:}.

    Hydra asks for it before it makes the folder, so this is where a configuration is checked, down to the data and the
    model that it names: a run that cannot be trained leaves nothing behind. Raises UserError, or Finished.
    """
    from vae_cli.build import build_experiment
    from vae_cli.experiment import look_at
    from vae_cli.run import RunDir

    path = named_folder(_root_)
    plain = to_plain(_without_hydra(_root_), _root_.hydra.runtime.choices)
    if look_at(RunDir(path), plain) == "finished":
        raise Finished(finished_message(path))
    _checked[str(path.absolute())] = build_experiment(plain)
    return str(path.absolute())


OmegaConf.register_new_resolver("run_dir", checked_run_dir, replace=True)


def is_to_be_trained(config: DictConfig) -> bool:
    """Check one job of a sweep as far as needs no data; False where it has been trained before. Raises UserError."""
    from vae_cli.build import check_config
    from vae_cli.experiment import look_at
    from vae_cli.run import RunDir

    path = named_folder(config)
    plain = to_plain(_without_hydra(config), config.hydra.runtime.choices)
    check_config(plain)
    if look_at(RunDir(path), plain) == "finished":
        print(finished_message(path))
        return False
    return True


def finished_message(path: Path) -> str:
    return (
        f"{_relative(path)} is finished, and left alone. To train it further type a larger epochs=..., "
        f"to start anew overwrite=true, to look at it: vae sample {_relative(path)}"
    )


def named_folder(root: DictConfig) -> Path:
    """The folder of the run that a whole composition, with Hydra's node in it, describes."""
    choices = dict(root.hydra.runtime.choices)
    sources = [Path(s.path) for s in root.hydra.runtime.config_sources if s.schema == "file"]
    config = _without_hydra(root)
    raw = OmegaConf.to_container(config, resolve=False)
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(raw, dict)
    assert isinstance(resolved, dict)
    ours = {group: choice for group, choice in choices.items() if _is_ours(group)}
    name = run_name(raw, ours, defaults_under(ours, sources))
    return run_folder({**resolved, "choices": choices}, name)


def defaults_under(choices: dict[str, str], sources: list[Path]) -> dict[str, Any]:
    """The settings as the files of these choices have them, and under `choices` the words that stand for themselves."""
    root = OmegaConf.to_container(OmegaConf.load(configs_dir() / "train.yaml"))
    assert isinstance(root, dict)
    named: dict[str, str] = {}
    for entry in root.pop("defaults"):
        if isinstance(entry, dict):
            named |= {str(group): choice for group, choice in entry.items() if not str(group).startswith("override")}
    defaults: dict[str, Any] = {key: value for key, value in root.items() if key != "hydra"}
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


def to_plain(config: DictConfig, choices: Any) -> dict[str, Any]:
    """A resolved configuration of plain values, with the words that chose its parts."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    ours = {str(group): str(choice) for group, choice in choices.items() if _is_ours(group) and choice is not None}
    words = {axis: ours.pop(axis) for axis in AXES} | ours
    return {**{str(key): value for key, value in plain.items()}, "choices": words}


def _is_ours(group: str) -> bool:
    return not group.startswith("hydra/") and group != "experiment"


def _without_hydra(root: DictConfig) -> DictConfig:
    config = root.copy()
    OmegaConf.set_struct(config, False)
    config.pop("hydra", None)
    return config


def _relative(path: Path) -> Path:
    """A path as the user would type it from here."""
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path
