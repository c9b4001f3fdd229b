"""The state of a training, its clock, and how both are saved to a checkpoint and restored."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from vae_cli.axes.dataset.split import fingerprint
from vae_cli.axes.schedule import Constant, Number, Schedule
from vae_cli.config.build import Experiment
from vae_cli.core.errors import Failure, UserError, first_line
from vae_cli.core.rng import random_state, set_random_state
from vae_cli.machine import distributed
from vae_cli.runs.checkpoint import load_checkpoint, save_checkpoint
from vae_cli.runs.folder import RunDir
from vae_cli.training.meter import Meter, NotFinite
from vae_cli.training.tensorboard import EventWriter

SLOWER = 0.25  # factor of the learning rate at each restart


@dataclass
class State:
    """How far a training has come. Saved in each checkpoint with the weights, the optimizer and the random states.

    seconds counts the whole training, training_seconds only its steps; best describes the weights in best.pt: their
    validation loss, the values of schedules at that time, and the record of their epoch.
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
    """Return the numbers in the loss by the names of their curves: beta, capacity, sigma_value ..."""
    named = {name: module for name, module in experiment.regularizer.named_modules() if isinstance(module, Number)}
    for name, module in experiment.model.named_modules():
        if isinstance(module, Number):
            named[name.replace(".", "_")] = module
    return named


def moving_schedules(experiment: Experiment) -> list[Schedule]:
    """Return the schedules to advance at each step. The optimizer advances the learning rate itself."""
    return [n for n in numbers(experiment).values() if isinstance(n, Schedule) and not isinstance(n, Constant)]


def keep_best(experiment: Experiment, run: RunDir, state: State, loss: float) -> None:
    """Save the weights as the best if their validation loss is the lowest so far.

    Losses under different values of beta cannot be compared: while a schedule moves, the newest weights are the best.
    """
    moving = {name: float(n()) for name, n in numbers(experiment).items() if isinstance(n, Schedule)}
    if not state.best or state.best["numbers"] != moving or loss < state.best["loss"]:
        state.best = {"loss": loss, "numbers": moving, "record": state.record}
        shape = list(experiment.splits.train.images.shape[1:])
        images, weights = fingerprint(experiment.splits), experiment.model.state_dict()
        best = {"step": state.step, "shape": shape, "images": images, "model": weights}
        distributed.first(lambda: save_checkpoint(run.best_file, best))


def save(experiment: Experiment, run: RunDir, events: EventWriter, state: State, clock: Clock) -> None:
    """Write a checkpoint from which training resumes as if it had never stopped.

    Raises NotFinite if a weight is not finite, before the last good checkpoint is replaced.
    """
    meter = state.meter.state_dict()
    parameters = torch.stack([p.isfinite().all() for p in experiment.model.parameters()])
    if not bool(parameters.all()):
        raise NotFinite(state.step, ["weights"])
    events.flush()  # the curves must reach the disk before the checkpoint does, or a crash leaves a gap
    random = random_state(experiment.device)
    if not distributed.same([generator.tolist() for generator in random.values()]):
        raise Failure(
            "The processes no longer draw the same random numbers. A class of your own may draw as many numbers as a "
            "batch has images, but not one per image: type another batch_size."
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
    distributed.first(lambda: save_checkpoint(run.checkpoint_file, whole))
    clock.saved()


def restore(experiment: Experiment, run: RunDir) -> State:
    """Restore the newest checkpoint. Raises UserError or Failure if it cannot be used."""
    saved = distributed.first(lambda: load_checkpoint(run.checkpoint_file))
    if saved.get("images") != fingerprint(experiment.splits):
        raise UserError(
            f"The images of {run.path} have changed since it was trained: it would now be trained on images that may "
            "be in its test set. Type another run_name=..., or overwrite=true to start from the beginning."
        )
    state = State()
    try:
        experiment.model.load_state_dict(saved["model"])
        experiment.regularizer.load_state_dict(saved["regularizer"])
        experiment.optimizer.load_state_dict(saved["optimizer"])
        set_random_state(saved["random"], experiment.device)
        state.meter.load_state_dict(saved["meter"])
        for name in ("step", "seconds", "training_seconds", "best", "record", "warnings"):
            setattr(state, name, saved[name])
        state.restarts = saved.get("restarts", 0)  # the first runs of format 1 do not have it
        experiment.optimizer.slow_down(SLOWER**state.restarts)
    except (RuntimeError, KeyError, ValueError) as error:
        raise Failure(f"{run.checkpoint_file} does not match {run.config_file}: {first_line(error)}") from error
    return state


class Clock:
    """Measures the seconds of a run and of its training steps, over all sessions, and when a checkpoint is due."""

    def __init__(self, state: State, checkpoint_minutes: float) -> None:
        self._begin = time.perf_counter() - state.seconds
        self._training = state.training_seconds
        self._since: float | None = None
        self._between = checkpoint_minutes * 60
        self.saved()

    def seconds(self) -> float:
        """Return the seconds since the run started, without the time between its sessions."""
        return time.perf_counter() - self._begin

    def training_seconds(self) -> float:
        """Return the seconds spent on training steps."""
        return self._training + (0.0 if self._since is None else time.perf_counter() - self._since)

    def start(self) -> None:
        """Start counting training seconds."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stop counting training seconds, during validation and pictures."""
        self._training = self.training_seconds()
        self._since = None

    def saved(self) -> None:
        """Note that a checkpoint was saved just now."""
        self._next = time.perf_counter() + self._between

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.perf_counter() >= self._next
