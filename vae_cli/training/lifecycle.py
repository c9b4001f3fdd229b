"""Train one run, from its first step or its checkpoint to its summary."""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import StringIO
from typing import Any

import torch
from rich.console import Console

from vae_cli.axes.dataset.split import fingerprint
from vae_cli.config.build import Experiment, build_experiment
from vae_cli.config.naming import hparams
from vae_cli.config.objective import POSTERIOR
from vae_cli.config.settings import Config
from vae_cli.core.errors import Failure, UserError
from vae_cli.core.files import locked
from vae_cli.core.rng import derive_seed
from vae_cli.machine import distributed
from vae_cli.machine.launch import this_process
from vae_cli.machine.signals import PARENT
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.folder import RETRAIN, ReadOnlyRunDir, RunDir
from vae_cli.runs.plan import Finished, InTraining, finished_message, in_training_message, plan, submission
from vae_cli.training.divergence import divergence_message, restart_from_checkpoint
from vae_cli.training.loop import train
from vae_cli.training.meter import NotFinite
from vae_cli.training.outcome import logging_to_file, recording_failure
from vae_cli.training.pictures import write_embedding
from vae_cli.training.progress import Progress
from vae_cli.training.provenance import describe
from vae_cli.training.state import State, restore, settle_best, steps_per_epoch
from vae_cli.training.tensorboard import EventWriter, NoEvents
from vae_cli.training.validation import validate

log = logging.getLogger(__name__)


def build_together(config: Config) -> Experiment:
    """Build an experiment in all processes, and check that they have the same images. Raises UserError or Failure."""
    experiment = distributed.together(lambda: build_experiment(config))
    if distributed.count() > 1:
        (first, images), *others = distributed.gathered((this_process(), fingerprint(experiment.splits)))
        for other, theirs in others:
            if theirs != images:
                raise UserError(
                    f"{other} and {first} have different images. Copy the same images to all machines, or set "
                    "data_dir= to a folder that all of them share."
                )
    return experiment


def run_experiment(
    experiment: Experiment, folder: RunDir, console: Console, is_one_of_many: bool = False
) -> dict[str, Any]:
    """Train a new run or resume an interrupted one; write its summary and return it.

    If is_one_of_many, only warnings and, on a terminal, a progress bar are printed. If several processes train the run,
    the first one holds the lock, writes the files and prints.

    Raises Finished if there is nothing to do. Raises UserError or Failure if the training fails; the folder then keeps
    the last good checkpoint, and the status in its summary is `failed`.
    """
    if not distributed.is_first():
        folder, console = ReadOnlyRunDir(folder.path), Console(file=StringIO())
    with ExitStack() as until_the_end:
        distributed.first(lambda: hold_lock(folder, until_the_end))
        return _run_locked(experiment, folder, console, is_one_of_many)


def hold_lock(folder: RunDir, until: ExitStack) -> None:
    """Create a run's folder and lock it until the ExitStack `until` closes.

    Raises InTraining if another process holds the lock.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    if not until.enter_context(locked(folder.lock_file, wait=False)):
        raise InTraining(in_training_message(folder))


def _run_locked(experiment: Experiment, folder: RunDir, console: Console, is_one_of_many: bool) -> dict[str, Any]:
    with putting_back(folder, console):
        return _prepare_and_train(experiment, folder, console, is_one_of_many)


def _prepare_and_train(
    experiment: Experiment, folder: RunDir, console: Console, is_one_of_many: bool
) -> dict[str, Any]:
    config, started = experiment.config, time.strftime("%Y-%m-%d %H:%M:%S")
    is_new = distributed.first(lambda: prepare_folder(folder, config, console))
    torch.manual_seed(derive_seed(config["seed"], "noise"))
    with distributed.connected():
        # Before the configuration and the summary are replaced: a run that is refused keeps them.
        state = State() if is_new else restore(experiment, folder)
    folder.write_config(config)
    about = {"started": started, "host": socket.gethostname(), "pid": os.getpid(), **describe(experiment)}
    if sweep := os.environ.get(PARENT):
        about["sweep_pid"] = int(sweep)
    if (job := submission()) is not None:
        about["submission"] = job
    folder.write_summary({"status": "running", **about})
    with logging_to_file(folder), recording_failure(folder, about), distributed.connected():
        if not is_new:
            folder.forget_metrics_after(state.step)
            _say(console, f"Resuming {folder.path} at step {state.step}")
        log.info("%s at step %d on %s", "starting" if is_new else "resuming", state.step, experiment.device)
        while True:
            try:
                return _train_and_test(experiment, folder, console, state, about, is_one_of_many)
            except NotFinite as error:
                if config["on_divergence"] == "stop" or state.restarts == config["restarts"]:
                    raise Failure(divergence_message(error, experiment, folder)) from error
                state = restart_from_checkpoint(error, experiment, folder, console, state)


def prepare_folder(folder: RunDir, config: Config, console: Console) -> bool:
    """Remove partially written files and, if the run starts over, set its files aside or remove them; return whether
    training starts at step 0.

    Raises Finished if the run is finished, UserError if the folder cannot be used (see `plan`), and Failure if a
    checkpoint is missing or damaged.
    """
    folder.remove_partial_files()
    if settle_replaced(folder):
        _say(console, f"{folder.path}: the earlier run was put back, since the one that was to replace it was stopped")
    todo = plan(folder, config, is_ours=True)
    if todo == "finished":
        raise Finished(finished_message(folder.path))
    if todo == "new":
        if folder.checkpoint_file.exists():
            say_replaced(folder, console)
            folder.set_aside()
        folder.remove_files()
    # Load the checkpoints now, so that a damaged one is reported before training rather than after it.
    elif best := load_checkpoint(folder.checkpoint_file).get("best"):
        settle_best(folder, best)
        if not folder.best_file.exists():
            raise Failure(f"{folder.best_file} is missing; it holds the best weights. {RETRAIN}")
        load_checkpoint(folder.best_file)
    return todo == "new"


def say_replaced(folder: RunDir, console: Console) -> None:
    """Print which run a new one replaces."""
    done = max((record["epoch"] for record in folder.metrics()), default=0)
    _say(
        console,
        f"Replacing {folder.path}, which was trained for {done} epoch{'s' * (done != 1)}; it is kept until the new run "
        "has its first checkpoint",
    )


@contextmanager
def putting_back(folder: RunDir, console: Console) -> Iterator[None]:
    """If the run ends before its first checkpoint, put back the run that it was to replace."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if settle_replaced(folder):
                shutil.rmtree(folder.path / ".hydra", ignore_errors=True)  # Hydra's record of the run that has ended
                _say(console, f"The earlier run was put back into {folder.path}")
        raise


def settle_replaced(folder: RunDir) -> bool:
    """If a run was set aside, put it back unless the one that was to replace it has been trained; return whether it was
    put back."""
    if not folder.replaced.is_dir():
        return False
    try:
        is_trained = load_checkpoint(folder.checkpoint_file)["step"] > 0
    except UserError:  # missing or damaged
        is_trained = False
    if is_trained:
        folder.forget_replaced()
        return False
    return folder.put_back()


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def _train_and_test(
    experiment: Experiment,
    folder: RunDir,
    console: Console,
    state: State,
    about: dict[str, Any],
    is_one_of_many: bool,
) -> dict[str, Any]:
    config, images = experiment.config, len(experiment.splits.train)
    first, steps = state.step, steps_per_epoch(experiment)
    progress = Progress(console, config["epochs"], steps, images, state.warnings, prints_epochs=not is_one_of_many)
    with EventWriter(folder.path, purge_step=first + 1) if distributed.is_first() else NoEvents() as events:
        events.hparams(hparams(config))
        events.layout(experiment.regularizer.parts)
        with progress:
            progress.start(first)
            train(experiment, folder, events, progress, state)
        figures = distributed.first(lambda: final_figures(experiment, folder, events, state))
        summary = {"status": "finished", **about, **figures}
    folder.write_summary(summary)
    log.info("finished at step %d", state.step)
    return summary


def final_figures(experiment: Experiment, folder: RunDir, events: EventWriter, state: State) -> dict[str, Any]:
    """Evaluate the best weights on the test set and return all figures for the run's summary.

    Without a validation set, the last weights are used. Training and validation figures are those of the epoch after
    which these weights were saved. Raises NotFinite if a test figure is not finite.
    """
    step, epoch = state.step, state.record["epoch"]
    if state.best:
        best = load_checkpoint(folder.best_file)
        if best["step"] != state.best["record"]["step"]:  # possible if an old version of vae was killed
            raise Failure(
                f"{folder.best_file} does not belong to {folder.checkpoint_file}: it was saved at step {best['step']}, "
                f"not {state.best['record']['step']}. {RETRAIN}"
            )
        experiment.model.load_state_dict(best["model"])
        if "regularizer" in best:  # missing from runs of earlier versions
            experiment.regularizer.load_state_dict(best["regularizer"])
    record = state.best.get("record", state.record)
    measured = validate(experiment, experiment.splits.test)
    not_finite = [f"test/{name}" for name, value in measured.items() if not math.isfinite(value)]
    if not_finite:
        raise NotFinite(step, not_finite)
    test = {name: value for name, value in measured.items() if name not in POSTERIOR}
    write_embedding(experiment, events, step)
    events.results({f"test/{name}": value for name, value in test.items()}, step)
    return {
        "epoch": epoch,
        "step": step,
        "weights_of_epoch": record["epoch"],
        "train": _of_split("train", record),
        "validation": _of_split("validation", record),
        "test": test,
        "posterior": {name: value for name, value in measured.items() if name in POSTERIOR},
        "seconds": round(state.seconds, 3),
        "warnings": state.warnings,
        "restarts": state.restarts,
        "images_per_second": round(epoch * len(experiment.splits.train) / state.training_seconds, 1),
    }


def _of_split(split: str, record: dict[str, Any]) -> dict[str, float]:
    return {name.partition("/")[2]: value for name, value in record.items() if name.startswith(f"{split}/")}
