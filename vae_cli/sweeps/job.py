"""Train one run from its composed configuration: the task that Hydra and its launchers call.

The function wrapped by `hydra.main` is pickled by value, but the functions that it calls are pickled by reference.
Worker processes therefore import this module, which registers the resolvers.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vae_cli.config.catalog import configs_dir
from vae_cli.config.compose import named_folder, to_plain
from vae_cli.config.objective import figure
from vae_cli.core.errors import Failure, UserError, explain
from vae_cli.core.files import expand_home
from vae_cli.core.listing import listing_once
from vae_cli.core.wording import relative
from vae_cli.machine.cores import gpus, gpus_for_each, jobs_at_once
from vae_cli.machine.launch import is_first, launched, refuse_several
from vae_cli.machine.signals import STOPS, stop_with_parent
from vae_cli.sweeps.runner import GRACE, is_plugin, runs_here, stop_file

# Modules that import torch are imported inside functions: `--cfg` and misspelled overrides do not need them.

_experiments: dict[str, Any] = {}  # built by checked_run_dir, by run folder, until `task` trains them


@contextmanager
def all_processes(flags: Mapping[str, Any]) -> Iterator[list[str]]:
    """Join the process group if torchrun started several processes, and yield extra overrides for this process.

    Ranks above 0 get an override that keeps Hydra from writing its files; rank 0 writes them. Raises UserError for
    flags that do not work with several processes, such as -m and --cfg.
    """
    if launched().count == 1:
        yield []
        return
    if flags.get("multirun"):
        raise UserError(
            "torchrun trains one run in several processes, so it cannot be combined with -m, which trains many runs: "
            "run the sweep without torchrun, or start each run with its own torchrun command."
        )
    for flag, typed in {"cfg": "--cfg", "info": "--info", "hydra_help": "--hydra-help"}.items():
        if flags.get(flag):
            refuse_several(f"vae train {typed}")
    from vae_cli.machine.distributed import joined

    with joined():
        yield [] if is_first() else ["hydra.output_subdir=null"]


@hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name="train")
def task(config: DictConfig) -> float | None:
    """Train one run and return the value of its objective, or None if the run does not have that figure.

    It runs in the `vae train` process or in a worker process that a launcher has started. Raises UserError or Failure.
    """
    from rich.console import Console

    from vae_cli.runs.folder import RunDir
    from vae_cli.training.summary import print_summary, print_summary_line

    hydra_config = HydraConfig.get()
    is_one_of_many = hydra_config.mode == RunMode.MULTIRUN
    # Jobs that run in parallel print nothing: the process that started them reads their folders and prints the results.
    is_alone = not is_one_of_many or runs_here(hydra_config.launcher)
    console = Console(stderr=True, quiet=not is_alone, force_terminal=None if is_alone else False)
    folder = RunDir(relative(Path(hydra_config.runtime.output_dir)))
    plain = to_plain(config, hydra_config.runtime.choices)
    if not is_alone:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one handles Ctrl-C
        if is_plugin(hydra_config.launcher, "JoblibLauncher"):
            stop_with_parent(GRACE)
        if stop_file(hydra_config).exists():
            raise Failure("the sweep was stopped before this run started")
    try:
        with nullcontext() if is_alone else listing_once(Path(hydra_config.sweep.dir)):
            summary = _train(folder, plain, console, is_one_of_many)
    except SystemExit as stop:
        # Any other code is submitit's, which requeues the job.
        if is_alone or stop.code not in {128 + number for number in STOPS}:
            raise
        raise Failure("interrupted; type the same command again to resume it") from None
    except Exception as error:
        if is_alone or isinstance(error, UserError):
            raise
        raise Failure(explain(error)[0]) from None  # other errors may fail to unpickle in the parent process
    if is_alone and is_first():
        (print_summary_line if is_one_of_many else print_summary)(Console(), folder, summary)
    return figure(summary, plain["objective"])


def _train(folder: Any, config: dict[str, Any], console: Any, is_one_of_many: bool) -> dict[str, Any]:
    from vae_cli.config.build import build_experiment
    from vae_cli.training.lifecycle import run_experiment
    from vae_cli.training.outcome import recording_failed_build

    experiment = _experiments.pop(str(folder.path.absolute()), None)
    if experiment is None:
        with recording_failed_build(folder, config):
            experiment = build_experiment(config)
    return run_experiment(experiment, folder, console, is_one_of_many)


def checked_run_dir(*, _root_: DictConfig) -> str:
    """Resolve ${run_dir:}: check the run, given the root of its configuration, and return its folder.

    Hydra calls this resolver before it creates the folder. A single run is therefore checked here, including its data
    and its model, so that a run that cannot be trained leaves no folder behind. The runs of a sweep have been checked
    already, except for their data. Raises UserError, or Finished if there is nothing left to train.
    """
    from vae_cli.machine.distributed import first
    from vae_cli.runs.folder import RunDir
    from vae_cli.runs.plan import Finished, finished_message, has_other_images, plan
    from vae_cli.training.lifecycle import build_together

    path = named_folder(_root_)
    if _root_.hydra.mode == RunMode.MULTIRUN:
        return str(path.absolute())
    if _root_.get("arms") is not None:
        raise UserError("arms= defines a study of several runs: add -m.")
    plain = to_plain(_root_)
    if first(lambda: plan(RunDir(path), plain)) == "finished":
        raise Finished(finished_message(relative(path), has_other_images(RunDir(path), plain)))
    experiment = build_together(plain)
    if not is_first():
        path = Path.cwd()  # a folder that exists; only rank 0 creates the run's folder
    _experiments[str(path.absolute())] = experiment
    return str(path.absolute())


OmegaConf.register_new_resolver("run_dir", checked_run_dir, replace=True)


def expanded(path: str) -> str:
    """Return runs_dir with ~ replaced: the resolver ${expanded:path}. Raises UserError."""
    return str(expand_home(path, "runs_dir"))


for _resolver in (gpus, gpus_for_each, jobs_at_once, expanded):
    OmegaConf.register_new_resolver(_resolver.__name__, _resolver, replace=True)
