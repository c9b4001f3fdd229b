"""`vae train`: from overrides to trained runs."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vae_cli.config import hydra as hydra_front
from vae_cli.config.catalog import configs_dir
from vae_cli.config.compose import named_folder, to_plain
from vae_cli.config.objective import figure
from vae_cli.core.errors import Failure, UserError, explain
from vae_cli.core.wording import relative, time_left
from vae_cli.machine.cores import gpus, gpus_for_each, jobs_at_once
from vae_cli.machine.launch import is_first, launched, refuse_several
from vae_cli.runs.find import finished_runs, write_sweep
from vae_cli.sweeps.launcher import check_sweeps
from vae_cli.sweeps.runner import is_plugin, spell, stop_file
from vae_cli.sweeps.search import Search

if TYPE_CHECKING:
    from vae_cli.sweeps.progress import SweepProgress

# What is imported below, inside functions, brings torch with it, and `--cfg` and a misspelt word need none of it.


def main(overrides: Sequence[str], **flags: Any) -> None:
    """Train one run, or with multirun a sweep of them. Raises UserError or Failure."""
    for word in overrides:
        if word.strip().lstrip("+~").startswith(("hydra.run.dir", "hydra.sweep.subdir")):
            raise UserError(
                f"'{word}' would put a run where vae does not look for it: type run_name=... or runs_dir=..."
            )
    sweep, search = Sweep(), Search()
    with search, several(flags) as more, check_sweeps(sweep, sweep, search.around):
        hydra_front.run(task, [*overrides, *more], **flags)


@contextmanager
def several(flags: Mapping[str, Any]) -> Iterator[list[str]]:
    """Join the processes that torchrun has started, where it has, and give the overrides that this one needs beside the
    user's. Raises UserError for what several processes do not do together."""
    if launched().count == 1:
        yield []
        return
    if flags.get("multirun"):
        raise UserError(
            "torchrun starts several processes for one run, and -m asks for many runs: type the sweep without "
            "torchrun, or its runs one after the other with it."
        )
    for flag, typed in {"cfg": "--cfg", "info": "--info", "hydra_help": "--hydra-help"}.items():
        if flags.get(flag):
            refuse_several(f"vae train {typed}")
    from vae_cli.machine.distributed import joined

    with joined():
        yield [] if is_first() else ["hydra.output_subdir=null"]


@hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name="train")
def task(config: DictConfig) -> float | None:
    """Train one run, in this process or in one that a launcher has started."""
    from rich.console import Console

    from vae_cli.config.build import build_experiment
    from vae_cli.runs.folder import RunDir
    from vae_cli.training.lifecycle import run_experiment
    from vae_cli.training.outcome import recording_failed_build
    from vae_cli.training.summary import print_summary, print_summary_line

    hydra_config = HydraConfig.get()
    is_one_of_many = hydra_config.mode == RunMode.MULTIRUN
    # What runs beside others says nothing itself: the process that started it looks at its folder, and speaks.
    is_alone = not is_one_of_many or is_plugin(hydra_config.launcher, "BasicLauncher")
    console = Console(stderr=True, quiet=not is_alone, force_terminal=None if is_alone else False)
    folder = RunDir(relative(Path(hydra_config.runtime.output_dir)))
    plain = to_plain(config, hydra_config.runtime.choices)
    if not is_alone:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has started this one
        if stop_file(hydra_config).exists():
            raise Failure("the sweep was stopped before this run began")
    try:
        experiment = _checked.pop(str(folder.path.absolute()), None)
        if experiment is None:
            with recording_failed_build(folder, plain):
                experiment = build_experiment(plain)
        summary = run_experiment(experiment, folder, console, is_one_of_many)
    except SystemExit as stop:
        if is_alone or stop.code != 128 + signal.SIGTERM:  # else it comes from a queue, which starts the run again
            raise
        raise Failure("interrupted; the same command again goes on with it") from None
    except Exception as error:
        if is_alone or isinstance(error, UserError):
            raise
        raise Failure(explain(error)[0]) from None  # it has to pass to another process, which knows its kind
    if is_alone and is_first():
        (print_summary_line if is_one_of_many else print_summary)(Console(), folder, summary)
    return figure(summary, plain["objective"])


_checked: dict[str, Any] = {}


def checked_run_dir(*, _root_: DictConfig) -> str:
    """The folder of the run that a configuration describes: the resolver ${run_dir:}.

    Hydra asks for it before it makes the folder, so this is where the configuration of a single run is checked, down to
    the data and the model that it names: a run that cannot be trained leaves nothing behind. The runs of a sweep have
    been checked as far as needs no data. Raises UserError, or Finished.
    """
    from vae_cli.machine.distributed import first
    from vae_cli.runs.folder import RunDir
    from vae_cli.runs.plan import Finished, finished_message, plan
    from vae_cli.training.lifecycle import build_together

    path = named_folder(_root_)
    if _root_.hydra.mode == RunMode.MULTIRUN:
        return str(path.absolute())
    if _root_.get("arms") is not None:
        raise UserError("arms= makes a study of several runs: type -m with it.")
    plain = to_plain(_root_)
    if first(lambda: plan(RunDir(path), plain)) == "finished":
        raise Finished(finished_message(relative(path)))
    experiment = build_together(plain)
    if not is_first():
        path = Path.cwd()  # where Hydra has nothing to make: the first process makes the folder
    _checked[str(path.absolute())] = experiment
    return str(path.absolute())


OmegaConf.register_new_resolver("run_dir", checked_run_dir, replace=True)


for _resolver in (gpus, gpus_for_each, jobs_at_once):
    OmegaConf.register_new_resolver(_resolver.__name__, _resolver, replace=True)


Found = Literal["new", "resume", "finished", "elsewhere"]
SAID: dict[Found, str] = {
    "finished": "finished, and left alone",
    "elsewhere": "under way in another process, and left to it",
    "resume": "to resume",
    "new": "to run",
}


class Sweep:
    """Checks the jobs of a sweep one by one before any of them starts, and says how it goes on."""

    def __init__(self) -> None:
        self._found: dict[Path, Found] = {}
        self._to_do: dict[int, tuple[Path, int]] = {}
        self._folder: Path | None = None  # of the sweep itself
        self._began = 0.0

    def __call__(self, config: DictConfig) -> bool:
        """Check one job as far as needs no data; False where there is nothing to do. Raises UserError."""
        from vae_cli.config.build import check_config
        from vae_cli.runs.folder import RunDir
        from vae_cli.runs.plan import InTraining, plan

        path, plain = named_folder(config), to_plain(config)
        check_config(plain)
        if path in self._found:
            raise UserError(
                f"two jobs of this sweep would be the same run, {path}: they differ in nothing that a run is named by "
                f"(epochs and device, say, do not make another run)."
            )
        try:
            self._found[path] = plan(RunDir(path), plain)
        except InTraining:  # as where an earlier sweep was killed, and one of its workers lives on
            self._found[path] = "elsewhere"
        if self._found[path] in ("finished", "elsewhere"):
            return False
        self._to_do[config.hydra.job.num] = (path, plain["epochs"])
        self._folder = Path(config.hydra.sweep.dir)
        return True

    def begin(self) -> None:
        """Say how many jobs there are, and what is to be done."""
        count = Counter(self._found.values())
        parts = [f"{count[found]} {words}" for found, words in SAID.items() if count[found]]
        print(f"{len(self._found)} job{'s' * (len(self._found) > 1)}: {', '.join(parts)}", flush=True)
        self._began = time.monotonic()
        if self._folder is not None:
            write_sweep(self._folder, self._found)

    def start(self, number: int, count: int, failed: int, words: Sequence[str]) -> None:
        """Say which job starts, and how long those that are left will take if they are like the others."""
        said = [f"{number} of {count}", *([f"{failed} failed"] if failed else [])]
        if number > 1:
            said.append(time_left((time.monotonic() - self._began) / (number - 1) * (count - number + 1)))
        print(f"{', '.join(said)}: {spell(words)}", flush=True)

    def monitor(self) -> SweepProgress:
        """Who sees to jobs that are trained side by side in other processes."""
        from rich.console import Console

        from vae_cli.sweeps.progress import SweepProgress

        return SweepProgress(self._to_do, Console(stderr=True), Console())

    def end(self) -> None:
        """Print the runs of the sweep as a table, and what to type next."""
        from vae_cli.commands.runs import show

        paths = [relative(path) for path in self._found]
        show(paths)
        if len(finished_runs(paths)) > 1:
            print(f"next:\n  vae compare {shlex.quote(os.path.commonpath([path.parent for path in paths]))}")
            if self._folder is not None:
                print(f"  vae compare {shlex.quote(str(relative(self._folder)))}  # the runs of this sweep alone")
