"""One job: from a composed configuration to a trained run. Launchers pickle the task by reference to this module."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from vae_cli.core.wording import relative
from vae_cli.machine.cores import gpus, gpus_for_each, jobs_at_once
from vae_cli.machine.launch import is_first, launched, refuse_several
from vae_cli.sweeps.runner import is_plugin, stop_file

# Imports inside functions load torch, which `--cfg` and misspelled overrides do not need.

_experiments: dict[str, Any] = {}  # what checked_run_dir has built, by folder, until the task trains it


@contextmanager
def all_processes(flags: Mapping[str, Any]) -> Iterator[list[str]]:
    """Join the processes that torchrun has started, if any, and yield the overrides that this process needs in addition
    to the user's. Raises UserError if the flags ask for something that several processes cannot do together."""
    if launched().count == 1:
        yield []
        return
    if flags.get("multirun"):
        raise UserError(
            "torchrun trains one run in several processes, and -m asks for many runs: type the sweep without torchrun, "
            "or its runs one by one."
        )
    for flag, typed in {"cfg": "--cfg", "info": "--info", "hydra_help": "--hydra-help"}.items():
        if flags.get(flag):
            refuse_several(f"vae train {typed}")
    from vae_cli.machine.distributed import joined

    with joined():
        yield [] if is_first() else ["hydra.output_subdir=null"]


@hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name="train")
def task(config: DictConfig) -> float | None:
    """Train one run, in this process or in one that a launcher has started, and return the objective of a search.

    Raises UserError or Failure.
    """
    from rich.console import Console

    from vae_cli.runs.folder import RunDir
    from vae_cli.training.summary import print_summary, print_summary_line

    hydra_config = HydraConfig.get()
    is_one_of_many = hydra_config.mode == RunMode.MULTIRUN
    # Jobs that run in parallel print nothing: the process that started them reads their folders and reports.
    is_alone = not is_one_of_many or is_plugin(hydra_config.launcher, "BasicLauncher")
    console = Console(stderr=True, quiet=not is_alone, force_terminal=None if is_alone else False)
    folder = RunDir(relative(Path(hydra_config.runtime.output_dir)))
    plain = to_plain(config, hydra_config.runtime.choices)
    if not is_alone:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one handles Ctrl-C
        if stop_file(hydra_config).exists():
            raise Failure("the sweep was stopped before this run started")
    try:
        summary = _train(folder, plain, console, is_one_of_many)
    except SystemExit as stop:
        if is_alone or stop.code != 128 + signal.SIGTERM:  # otherwise a cluster sent it, and will requeue the run
            raise
        raise Failure("interrupted; type the same command again to resume it") from None
    except Exception as error:
        if is_alone or isinstance(error, UserError):
            raise
        raise Failure(explain(error)[0]) from None  # other errors may not unpickle in the process that started this one
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
    """Return the folder of the run that a configuration describes: the resolver ${run_dir:}.

    Hydra resolves it before it creates the folder, so a single run is checked here, including its data and model: a
    run that cannot be trained leaves nothing behind. The runs of a sweep were checked already, except for their data.
    Raises UserError, or Finished.
    """
    from vae_cli.machine.distributed import first
    from vae_cli.runs.folder import RunDir
    from vae_cli.runs.plan import Finished, finished_message, plan
    from vae_cli.training.lifecycle import build_together

    path = named_folder(_root_)
    if _root_.hydra.mode == RunMode.MULTIRUN:
        return str(path.absolute())
    if _root_.get("arms") is not None:
        raise UserError("arms= makes a study of several runs: add -m.")
    plain = to_plain(_root_)
    if first(lambda: plan(RunDir(path), plain)) == "finished":
        raise Finished(finished_message(relative(path)))
    experiment = build_together(plain)
    if not is_first():
        path = Path.cwd()  # which exists: the first process alone creates the folder
    _experiments[str(path.absolute())] = experiment
    return str(path.absolute())


OmegaConf.register_new_resolver("run_dir", checked_run_dir, replace=True)
for _resolver in (gpus, gpus_for_each, jobs_at_once):
    OmegaConf.register_new_resolver(_resolver.__name__, _resolver, replace=True)
