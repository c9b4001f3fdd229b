"""`vae train`: from overrides to trained runs."""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vae_cli import hydra_front
from vae_cli.catalog import configs_dir
from vae_cli.composition import named_folder, to_plain
from vae_cli.errors import UserError
from vae_cli.objective import figure
from vae_cli.search import Search

# What is imported below, inside functions, brings torch with it, and `--cfg` and a misspelt word need none of it.


def main(overrides: Sequence[str], **flags: Any) -> None:
    """Train one run, or with multirun a sweep of them. Raises UserError or Failure."""
    sweep, search = Sweep(), Search()
    with search, hydra_front.check_sweeps(sweep, sweep, search.around):
        hydra_front.run(task, list(overrides), **flags)


@hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name="train")
def task(config: DictConfig) -> float | None:
    """Train one run, in this process or in one that a launcher has started."""
    from rich.console import Console

    from vae_cli.build import build_experiment
    from vae_cli.experiment import run_experiment
    from vae_cli.folder import RunDir
    from vae_cli.report import brief, report

    is_one_of_many = HydraConfig.get().mode == RunMode.MULTIRUN
    folder = RunDir(_relative(Path(HydraConfig.get().runtime.output_dir)))
    plain = to_plain(config, HydraConfig.get().runtime.choices)
    experiment = _checked.pop(str(folder.path.absolute()), None) or build_experiment(plain)
    summary = run_experiment(experiment, folder, Console(stderr=True), is_one_of_many)
    (brief if is_one_of_many else report)(Console(), folder, summary)
    return figure(summary, plain["objective"])


_checked: dict[str, Any] = {}


def checked_run_dir(*, _root_: DictConfig) -> str:
    """The folder of the run that a configuration describes: the resolver ${run_dir:}.

    Hydra asks for it before it makes the folder, so this is where a configuration is checked, down to the data and the
    model that it names: a run that cannot be trained leaves nothing behind. Raises UserError, or Finished.
    """
    from vae_cli.build import build_experiment
    from vae_cli.experiment import Finished, finished_message, look_at
    from vae_cli.folder import RunDir

    if _root_.get("arms") is not None and _root_.hydra.mode != RunMode.MULTIRUN:
        raise UserError("arms= makes a study of several runs: type -m with it.")
    path = named_folder(_root_)
    plain = to_plain(_root_)
    if look_at(RunDir(path), plain) == "finished":
        raise Finished(finished_message(_relative(path)))
    _checked[str(path.absolute())] = build_experiment(plain)
    return str(path.absolute())


OmegaConf.register_new_resolver("run_dir", checked_run_dir, replace=True)


State = Literal["new", "resume", "finished"]


class Sweep:
    """Checks the jobs of a sweep one by one before any of them starts, and says how it goes on."""

    def __init__(self) -> None:
        self._states: dict[Path, State] = {}
        self._began = 0.0

    def __call__(self, config: DictConfig) -> bool:
        """Check one job as far as needs no data; False where it has been trained before. Raises UserError."""
        from vae_cli.build import check_config
        from vae_cli.experiment import look_at
        from vae_cli.folder import RunDir

        path, plain = named_folder(config), to_plain(config)
        check_config(plain)
        if path in self._states:
            raise UserError(
                f"two jobs of this sweep would be the same run, {path}: they differ in nothing that a run is named by "
                f"(epochs and device, say, do not make another run)."
            )
        self._states[path] = look_at(RunDir(path), plain)
        return self._states[path] != "finished"

    def begin(self) -> None:
        """Say how many jobs there are, and what is to be done."""
        count = Counter(self._states.values())
        said: dict[State, str] = {"finished": "finished, and left alone", "resume": "to resume", "new": "to run"}
        parts = [f"{count[state]} {words}" for state, words in said.items() if count[state]]
        print(f"{len(self._states)} job{'s' * (len(self._states) > 1)}: {', '.join(parts)}", flush=True)
        self._began = time.perf_counter()

    def start(self, number: int, count: int, words: Sequence[str]) -> None:
        """Say which job starts, and how long those that are left will take if they are like the others."""
        left = ""
        if number > 1:
            minutes = (time.perf_counter() - self._began) / (number - 1) * (count - number + 1) / 60
            left = f", {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"
        print(f"{number} of {count}{left}: {' '.join(words)}", flush=True)

    def end(self) -> None:
        """Print the runs of the sweep as a table, and what to type next."""
        from vae_cli.commands.runs import show

        paths = [_relative(path) for path in self._states]
        show(paths)
        if len(paths) > 1:
            print(f"next:\n  vae compare {shlex.quote(os.path.commonpath([path.parent for path in paths]))}")


def _relative(path: Path) -> Path:
    """A path as the user would type it from here."""
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path
