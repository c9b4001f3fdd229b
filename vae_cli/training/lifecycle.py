"""One run from its first step, or from where it stopped, to its summary."""

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
from vae_cli.core.errors import Failure, UserError, is_failure
from vae_cli.core.files import locked
from vae_cli.core.rng import stream
from vae_cli.machine import distributed
from vae_cli.machine.launch import this_process
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.folder import RETRAIN, ReadOnlyRunDir, RunDir
from vae_cli.runs.plan import Finished, InTraining, finished_message, in_training_message, plan, submission
from vae_cli.training.divergence import diverged, restart
from vae_cli.training.loop import train
from vae_cli.training.meter import NotFinite
from vae_cli.training.pictures import embed
from vae_cli.training.progress import Progress
from vae_cli.training.provenance import describe
from vae_cli.training.state import State, restore
from vae_cli.training.tensorboard import EventWriter, NoEvents
from vae_cli.training.validation import validate

log = logging.getLogger(__name__)


def build_together(config: Config) -> Experiment:
    """Build an experiment in all processes, which have to have the same images. Raises UserError or Failure."""
    experiment = distributed.together(lambda: build_experiment(config))
    if distributed.count() > 1:
        (first, images), *others = distributed.gathered((this_process(), fingerprint(experiment.splits)))
        for who, theirs in others:
            if theirs != images:
                raise UserError(
                    f"{who} has other images than {first}. Copy them there, or give a data_dir= that all machines have."
                )
    return experiment


def run_experiment(
    experiment: Experiment, folder: RunDir, console: Console, is_one_of_many: bool = False
) -> dict[str, Any]:
    """Train what is new, go on with what was interrupted, and return the summary, which is also written.

    Of one run of many nothing is said on its way, but for a bar on a terminal and for warnings. Of several processes
    the first holds the lock, writes and speaks.
    Raises UserError or Failure; then the folder keeps the last good checkpoint and its summary says `failed`.
    """
    if not distributed.is_first():
        folder, console = ReadOnlyRunDir(folder.path), Console(file=StringIO())
    with ExitStack() as until_the_end:
        distributed.first(lambda: lock(folder, until_the_end))
        return _run_locked(experiment, folder, console, is_one_of_many)


def lock(folder: RunDir, until: ExitStack) -> None:
    """Make a run's folder and hold its lock. Raises UserError where another process trains the run."""
    folder.path.mkdir(parents=True, exist_ok=True)
    if not until.enter_context(locked(folder.lock_file, wait=False)):
        raise InTraining(in_training_message(folder))


def prepare(folder: RunDir, config: Config) -> bool:
    """Leave in a run's folder what the training begins with, and say whether it is a new one. Raises Finished."""
    for part in (*folder.path.glob(".*.part"), *folder.path.glob("projector/.*.part")):  # a killed process wrote them
        part.unlink()
    todo = plan(folder, config, is_ours=True)
    if todo == "finished":
        raise Finished(finished_message(folder.path))
    if todo == "new":
        clear(folder)
    else:
        # Damaged ones are refused before anything is written, and before a training that would need them in its end.
        if load_checkpoint(folder.checkpoint_file).get("best"):
            if not folder.best_file.exists():
                raise Failure(f"{folder.best_file} is missing, and its weights are the best. {RETRAIN}")
            load_checkpoint(folder.best_file)
    return todo == "new"


def _run_locked(experiment: Experiment, folder: RunDir, console: Console, is_one_of_many: bool) -> dict[str, Any]:
    config, begun = experiment.config, time.strftime("%Y-%m-%d %H:%M:%S")
    is_new = distributed.first(lambda: prepare(folder, config))
    folder.write_config(config)
    about = {"started": begun, "host": socket.gethostname(), "pid": os.getpid(), **describe(experiment)}
    if (job := submission()) is not None:
        about["submission"] = job
    folder.write_summary({"status": "running", **about})
    with logged(folder), outcome(folder, about), distributed.connected():
        torch.manual_seed(stream(config["seed"], "noise"))
        state = State() if is_new else restore(experiment, folder)
        if not is_new:
            folder.forget_metrics_after(state.step)
            console.print(
                f"Resuming {folder.path} at step {state.step}", soft_wrap=True, highlight=False, markup=False
            )
        log.info("%s at step %d on %s", "starting" if is_new else "going on", state.step, experiment.device)
        while True:
            try:
                return _train_and_test(experiment, folder, console, state, about, is_one_of_many)
            except NotFinite as error:
                if config["on_divergence"] == "stop" or state.restarts == config["restarts"]:
                    raise Failure(diverged(error, experiment, folder)) from error
                state = restart(error, experiment, folder, console, state)


def _train_and_test(
    experiment: Experiment,
    folder: RunDir,
    console: Console,
    state: State,
    about: dict[str, Any],
    is_one_of_many: bool,
) -> dict[str, Any]:
    config, images = experiment.config, len(experiment.splits.train)
    first, steps = state.step, math.ceil(images / config["batch_size"])
    progress = Progress(console, config["epochs"], steps, images, state.warnings, says_epochs=not is_one_of_many)
    with EventWriter(folder.path, purge_step=first + 1) if distributed.is_first() else NoEvents() as events:
        events.hparams(hparams(config))
        events.layout()
        with progress:
            progress.start(first)
            train(experiment, folder, events, progress, state)
        figures = distributed.first(lambda: final(experiment, folder, events, state))
        summary = {"status": "finished", **about, **figures}
    folder.write_summary(summary)
    log.info("finished at step %d", state.step)
    return summary


def final(experiment: Experiment, folder: RunDir, events: EventWriter, state: State) -> dict[str, Any]:
    """Measure the best weights, or the last where no image was held out, on the test images; the rest is on record."""
    config, step = experiment.config, state.step
    if state.best:
        experiment.model.load_state_dict(load_checkpoint(folder.best_file)["model"])
    record = state.best.get("record", state.record)
    tested = validate(experiment, experiment.splits.test)
    bad = [f"test/{name}" for name, value in tested.items() if not math.isfinite(value)]
    if bad:
        raise NotFinite(step, bad)
    embed(experiment, events, step)
    events.results({f"test/{name}": value for name, value in tested.items() if name not in POSTERIOR}, step)
    seconds = state.training_seconds
    return {
        "epoch": config["epochs"],
        "step": step,
        "weights_of_epoch": record["epoch"],
        "train": _under("train", record),
        "validation": _under("validation", record),
        "test": {name: value for name, value in tested.items() if name not in POSTERIOR},
        "posterior": {name: value for name, value in tested.items() if name in POSTERIOR},
        "seconds": round(state.seconds, 3),
        "warnings": state.warnings,
        "restarts": state.restarts,
        "images_per_second": round(config["epochs"] * len(experiment.splits.train) / seconds, 1),
    }


def clear(folder: RunDir) -> None:
    """Remove what an earlier run left in its folder, and nothing that is not a run's."""
    for event in folder.path.glob("events.*"):
        event.unlink()
    for name in ("samples", "interpolations", "evaluation", "projector"):
        shutil.rmtree(folder.path / name, ignore_errors=True)
    # The configuration last: without it the rest would look like somebody else's files.
    own = "checkpoint.pt best.pt metrics.jsonl summary.json train.log projector_config.pbtxt config.yaml"
    for name in own.split():
        (folder.path / name).unlink(missing_ok=True)


class Log(logging.FileHandler):
    """A log that keeps silent where it cannot be written: on a full disk there is more to say than that."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def logged(folder: RunDir) -> Iterator[None]:
    """Write this package's log messages to train.log while the run is under way."""
    handler = Log(folder.log_file) if distributed.is_first() else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("vae_cli")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def outcome(folder: RunDir, about: dict[str, Any]) -> Iterator[None]:
    """Leave the truth in summary.json where the run does not come to its end."""
    try:
        yield
    except BaseException as error:  # whatever it is: it is written down and raised again
        if is_failure(type(error)):
            log.exception("failed")
            summary = {"status": "failed", "error": str(error), **about}
        else:
            log.info("interrupted")
            summary = {"status": "interrupted", **about}
        with suppress(OSError):  # a full disk; without the lock "running" is read as "interrupted"
            folder.write_summary(summary)
        raise


@contextmanager
def say_failed(folder: RunDir, config: Config) -> Iterator[None]:
    """Where the run of a sweep cannot be built, as for want of its data, leave a folder that says so, unless it holds a
    run already."""
    try:
        yield
    except Exception as error:
        if not folder.config_file.exists():
            folder.write_config(config)
            with logged(folder):
                log.exception("failed")
            folder.write_summary({"status": "failed", "error": str(error), "config": config})
        raise


def _under(split: str, record: dict[str, Any]) -> dict[str, float]:
    return {name.partition("/")[2]: value for name, value in record.items() if name.startswith(f"{split}/")}
