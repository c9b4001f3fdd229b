"""The training loop, and the logging, validation and saving after steps and epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from vae_cli.axes.schedule import Number
from vae_cli.config.build import Experiment
from vae_cli.config.objective import POSTERIOR
from vae_cli.core.rng import epoch_order
from vae_cli.machine import distributed
from vae_cli.runs.folder import RunDir
from vae_cli.training.interruption import Interruption
from vae_cli.training.meter import NotFinite
from vae_cli.training.pictures import write_pictures
from vae_cli.training.progress import Progress, is_milestone
from vae_cli.training.state import (
    Clock,
    State,
    is_exhausted,
    keep_best,
    moving_schedules,
    numbers,
    save,
    steps_per_epoch,
)
from vae_cli.training.step import Step
from vae_cli.training.tensorboard import EventWriter
from vae_cli.training.validation import some_training_images, validate


def train(experiment: Experiment, run: RunDir, events: EventWriter, progress: Progress, state: State) -> None:
    """Train from `state` to the end of the last epoch, and keep `state` up to date.

    Raises NotFinite if the loss is not finite, and KeyboardInterrupt or SystemExit if a signal stops the run. The last
    good checkpoint is kept in both cases.
    """
    config, images = experiment.config, experiment.splits.train
    batch_size, seed = config["batch_size"], config["seed"]
    steps = steps_per_epoch(experiment)
    schedules, shown = moving_schedules(experiment), numbers(experiment)
    step = Step(experiment)
    clock = Clock(state, config["checkpoint_minutes"])

    if state.step == 0 and config["on_divergence"] == "restart":
        save(experiment, run, events, state, clock)

    with Interruption(config["overwrite"]) as interruption:
        for epoch in range(state.step // steps, config["epochs"]):
            if state.step % steps == 0 and is_exhausted(state, config["patience"]):
                break
            clock.start()
            for positions in images.shuffled(epoch_order(seed, epoch), batch_size, skip=state.step % steps):
                for schedule in schedules:
                    schedule.advance(state.step / steps)
                experiment.optimizer.advance(state.step / steps)
                terms = step(positions)
                state.step += 1
                state.meter.add(state.step, terms)
                is_point = state.step % min(config["log_every"], steps) == 0
                if is_point:
                    log_step(experiment, shown, events, progress, state)
                if state.step % steps and is_time_to_save(interruption, clock, is_point):
                    save(experiment, run, events, state, clock)
                    interruption.stop_if_asked(f"stopped at step {state.step}")

            end_epoch(experiment, run, events, progress, state, clock, epoch + 1)
            save(experiment, run, events, state, clock)
            interruption.stop_if_asked(f"stopped at step {state.step}")


def is_time_to_save(interruption: Interruption, clock: Clock, is_point: bool) -> bool:
    """Return whether a signal has arrived or a checkpoint is due. Several processes, whose clocks and signals differ,
    decide this together, and only at logged steps."""
    if distributed.count() > 1 and not is_point:
        return False
    return distributed.greatest(interruption.signal is not None or clock.is_due()) > 0


def log_step(
    experiment: Experiment, shown: Mapping[str, Number], events: EventWriter, progress: Progress, state: State
) -> None:
    """Add a point to each training curve: mean loss terms since the last point, and as parameters the numbers in
    `shown` (beta ...) and the learning rate."""
    means = state.meter.point()
    current = {name: number().detach() for name, number in shown.items()}
    read = torch.stack(list(current.values())).tolist() if current else []  # waits for the device only once
    parameters = {**dict(zip(current, read, strict=True)), "learning_rate": experiment.optimizer.rate}
    values = {f"train/{name}": value for name, value in means.items()}
    events.scalars(values | {f"parameters/{name}": value for name, value in parameters.items()}, state.step)
    progress.step(state.step, means)


def end_epoch(
    experiment: Experiment, run: RunDir, events: EventWriter, progress: Progress, state: State, clock: Clock, epoch: int
) -> None:
    """Validate, record the epoch, and save the weights if they are the best.

    Raises NotFinite if a training or validation figure is not finite.
    """
    config, held_out = experiment.config, experiment.splits.validation
    means = state.meter.epoch()
    clock.stop()
    images = held_out if len(held_out) else some_training_images(experiment)
    measured = distributed.first(lambda: validate(experiment, images))
    record = {f"train/{name}": value for name, value in means.items()}
    if len(held_out):
        record |= {f"validation/{name}": value for name, value in measured.items() if name not in POSTERIOR}
    record |= {f"posterior/{name}": value for name, value in measured.items() if name in POSTERIOR}
    not_finite = [name for name, value in record.items() if not math.isfinite(value)]
    if not_finite:
        raise NotFinite(state.step, not_finite)
    # The training curves are already written, by log_step.
    events.scalars({name: value for name, value in record.items() if not name.startswith("train/")}, state.step)
    state.record = {"epoch": epoch, "step": state.step, "seconds": round(clock.seconds(), 3), **record}
    run.append_metrics(state.record)
    if len(held_out):
        keep_best(experiment, run, state, measured["loss"])
    is_last = is_exhausted(state, config["patience"])
    if is_last or is_milestone(epoch, config["epochs"]):
        distributed.first(lambda: write_pictures(experiment, events, state.step))
    if is_last:
        progress.end(epoch, config["patience"])
    progress.epoch(epoch, record, measured)
    state.warnings = progress.warnings
