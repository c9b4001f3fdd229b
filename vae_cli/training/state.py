"""The state of a training run, its clock, and how checkpoints are saved and restored."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vae_cli.axes.dataset.split import fingerprint, is_fingerprint_of
from vae_cli.axes.schedule import Constant, Number, Schedule
from vae_cli.config.build import Experiment
from vae_cli.core.errors import Failure, UserError, first_line
from vae_cli.core.files import flush_folder, reporting_path
from vae_cli.core.rng import random_state, set_random_state
from vae_cli.core.values import is_finite
from vae_cli.machine import distributed
from vae_cli.runs.checkpoint import load_checkpoint, save_checkpoint
from vae_cli.runs.folder import RunDir
from vae_cli.training.meter import Meter, NotFinite
from vae_cli.training.tensorboard import EventWriter

SLOWER = 0.25  # each restart multiplies the learning rate by this factor


@dataclass
class State:
    """The progress of a run, saved in each checkpoint with the weights, the optimizer's state and the random states.

    seconds is the duration of the entire run so far, training_seconds that of its training steps. best describes the
    weights in best.pt: their validation loss, the values of the schedules at that time, and the record of their epoch.
    """

    step: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)  # of the last epoch, as in metrics.jsonl
    warnings: list[str] = field(default_factory=list)
    restarts: int = 0  # after divergence
    meter: Meter = field(default_factory=Meter)


def numbers(experiment: Experiment) -> dict[str, Number]:
    """Return the schedules and scales used by the loss, keyed by the names of their curves: beta, sigma_value ..."""
    named = {name: module for name, module in experiment.regularizer.named_modules() if isinstance(module, Number)}
    for name, module in experiment.model.named_modules():
        if isinstance(module, Number):
            named[name.replace(".", "_")] = module
    return named


def moving_schedules(experiment: Experiment) -> list[Schedule]:
    """Return the schedules to advance at each step. The optimizer advances the learning rate itself."""
    return [n for n in numbers(experiment).values() if isinstance(n, Schedule) and not isinstance(n, Constant)]


def keep_best(experiment: Experiment, run: RunDir, state: State, loss: float) -> None:
    """Save the weights as the best if their validation loss is the lowest so far. They replace best.pt when `save` has
    written a checkpoint that refers to them, so that best.pt always belongs to the checkpoint.

    Losses with different values of beta cannot be compared: while a schedule changes its value, the newest weights
    count as the best.
    """
    moving = {name: float(n()) for name, n in numbers(experiment).items() if isinstance(n, Schedule)}
    if not state.best or state.best["numbers"] != moving or loss < state.best["loss"]:
        state.best = {"loss": loss, "numbers": moving, "record": state.record}
        shape = list(experiment.splits.train.images.shape[1:])
        images, weights = fingerprint(experiment.splits), experiment.model.state_dict()
        best = {"step": state.step, "shape": shape, "images": images, "model": weights}
        best["regularizer"] = experiment.regularizer.state_dict()  # a critic judges the codes that it has learned from
        distributed.first(lambda: save_checkpoint(run.next_best_file, best))


def is_exhausted(state: State, patience: int | None) -> bool:
    """Return whether the validation loss has not fallen for `patience` epochs (Prechelt, Early Stopping - But When?,
    1998). A changing schedule (see keep_best) keeps a run from ending."""
    if patience is None or not state.best:
        return False
    return bool(state.record["epoch"] - state.best["record"]["epoch"] >= patience)


def save(experiment: Experiment, run: RunDir, events: EventWriter, state: State, clock: Clock) -> None:
    """Write a checkpoint from which training resumes as if it had never stopped.

    Raises NotFinite if a loss term or a weight is not finite, and Failure if the random states of several processes
    differ; the last good checkpoint is then kept.
    """
    meter = state.meter.state_dict()
    parameters = torch.stack([p.isfinite().all() for p in experiment.model.parameters()])
    if not bool(parameters.all()):
        raise NotFinite(state.step, ["weights"])
    events.flush()  # the curves must reach the disk before the checkpoint does, or a crash leaves a gap in them
    random = random_state(experiment.device)
    if not distributed.same([generator.tolist() for generator in random.values()]):
        raise Failure(
            "The processes no longer draw the same random numbers. This can happen if one of your own classes draws a "
            "random tensor that has as many rows as a process has images in a batch, although its rows are not images. "
            "Choose a different batch_size=..."
        )
    state.seconds, state.training_seconds = clock.seconds(), clock.training_seconds()
    whole = {
        "step": state.step,
        "seconds": state.seconds,
        "training_seconds": state.training_seconds,
        "shape": list(experiment.splits.train.images.shape[1:]),
        "config": experiment.config,
        "model": experiment.model.state_dict(),
        "regularizer": experiment.regularizer.state_dict(),
        "optimizer": experiment.optimizer.state_dict(),
        "meter": meter,
        "best": state.best,
        "record": state.record,
        "warnings": state.warnings,
        "restarts": state.restarts,
        "images": fingerprint(experiment.splits),
        "random": random,
    }
    if experiment.config["on_divergence"] == "restart" and state.step % steps_per_epoch(experiment) == 0:
        # Restarting from here, and not from a checkpoint within an epoch, which a signal or the clock may add, makes an
        # interrupted run end like an uninterrupted one.
        distributed.first(lambda: save_checkpoint(run.restart_file, whole))
    distributed.first(lambda: save_checkpoint(run.checkpoint_file, whole))
    distributed.first(lambda: settle_best(run, state.best))
    if state.step > 0:
        distributed.first(run.forget_replaced)
    clock.saved()


def settle_best(run: RunDir, best: Mapping[str, Any]) -> None:
    """Let the newest best weights replace best.pt if the checkpoint, in which `best` is stored, refers to them.

    If it does not, training stopped before that checkpoint was written, and they are removed.
    """
    if not run.next_best_file.exists():
        return
    try:
        belongs = load_checkpoint(run.next_best_file)["step"] == best["record"]["step"]
    except (UserError, KeyError, TypeError):  # damaged, or there is no best epoch yet
        belongs = False
    with reporting_path(run.best_file):
        if belongs:
            os.replace(run.next_best_file, run.best_file)
            flush_folder(run.path)
        else:
            run.next_best_file.unlink()


def restore(experiment: Experiment, run: RunDir, file: Path | None = None) -> State:
    """Restore the checkpoint in `file`, by default the newest. Raises UserError or Failure if it cannot be used."""
    file = file or run.checkpoint_file
    saved = distributed.first(lambda: load_checkpoint(file))
    if not is_fingerprint_of(saved.get("images"), experiment.splits):
        raise UserError(
            f"The images of {run.path} have changed since its checkpoint was saved, so its training set may "
            "now contain images from its earlier test set. To train a new run on the images as they are now, type "
            "runs_dir=FOLDER (a new folder), or overwrite=true to replace this one."
        )
    _refuse_fewer_epochs(experiment, run, saved.get("step"))
    distributed.first(lambda: settle_best(run, saved.get("best", {})))
    state = State()
    try:
        experiment.model.load_state_dict(saved["model"])
        experiment.regularizer.load_state_dict(saved["regularizer"])
        experiment.optimizer.load_state_dict(saved["optimizer"])
        set_random_state(saved["random"], experiment.device)
        state.meter.load_state_dict(saved["meter"])
        for name in ("step", "seconds", "training_seconds", "best", "record", "warnings"):
            setattr(state, name, saved[name])
        state.restarts = saved.get("restarts", 0)  # missing from the oldest checkpoints of format 1
        experiment.optimizer.slow_down(SLOWER**state.restarts)
        if not _is_well_formed(state):
            raise ValueError("its fields have the wrong types")
    except Exception as error:  # a damaged field can raise anything
        raise Failure(f"{file} does not match {run.config_file}: {first_line(error)}") from error
    return state


def steps_per_epoch(experiment: Experiment) -> int:
    """Return the number of training steps in an epoch; the last one may have fewer images."""
    return math.ceil(len(experiment.splits.train) / experiment.config["batch_size"])


def _refuse_fewer_epochs(experiment: Experiment, run: RunDir, step: object) -> None:
    """Raise UserError if a checkpoint is from after the last epoch: its weights would be reported as that epoch's."""
    steps = steps_per_epoch(experiment)
    if isinstance(step, int) and step > experiment.config["epochs"] * steps:
        epoch = math.ceil(step / steps)
        raise UserError(
            f"{run.path} has already been trained to step {step}, in epoch {epoch}; set epochs={epoch} or higher."
        )


def _is_well_formed(state: State) -> bool:
    """Return whether the restored fields, which come from a file, have the types that training needs."""
    best, numbers = state.best, (state.step, state.seconds, state.training_seconds, state.restarts)
    if not all(map(is_finite, numbers)) or not isinstance(state.warnings, list) or not isinstance(state.record, dict):
        return False
    if not isinstance(best, dict) or not best:
        return best == {}
    epochs = [best["record"][key] for key in ("epoch", "step")]
    return isinstance(best["numbers"], dict) and all(map(is_finite, [best["loss"], *epochs]))


class Clock:
    """Measures the duration of a run and of its training steps, excluding interruptions, and schedules checkpoints."""

    def __init__(self, state: State, checkpoint_minutes: float) -> None:
        self._begin = time.perf_counter() - state.seconds
        self._training = state.training_seconds
        self._since: float | None = None
        self._between = checkpoint_minutes * 60
        self.saved()

    def seconds(self) -> float:
        """Return the seconds since the run started, excluding the time during which it was interrupted."""
        return time.perf_counter() - self._begin

    def training_seconds(self) -> float:
        """Return the seconds spent on training steps."""
        return self._training + (0.0 if self._since is None else time.perf_counter() - self._since)

    def start(self) -> None:
        """Start counting training seconds."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stop counting training seconds, while the model is validated and pictures are written."""
        self._training = self.training_seconds()
        self._since = None

    def saved(self) -> None:
        """Schedule the next checkpoint, counting from now."""
        self._next = time.perf_counter() + self._between

    def is_due(self) -> bool:
        """Return whether it is time for a checkpoint."""
        return time.perf_counter() >= self._next
