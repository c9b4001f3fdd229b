"""Train a model: the loop, and what is written at the end of a step, an epoch and a run."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from vae_cli.axes.dataset import Split
from vae_cli.axes.dataset.split import fingerprint
from vae_cli.axes.optimizer import clip_gradient
from vae_cli.axes.schedule import Constant, Number, Schedule
from vae_cli.config.build import Experiment
from vae_cli.config.objective import POSTERIOR
from vae_cli.core.errors import Failure, UserError, first_line
from vae_cli.core.images import grid
from vae_cli.core.rng import order, questioned, random_state, set_random_state
from vae_cli.machine import distributed
from vae_cli.runs.checkpoint import load_checkpoint, save_checkpoint
from vae_cli.runs.folder import RunDir
from vae_cli.training.interruption import Interruption
from vae_cli.training.meter import Meter, NotFinite
from vae_cli.training.progress import Progress, is_milestone
from vae_cli.training.tensorboard import EventWriter
from vae_cli.training.validation import evaluate

SLOWER = 0.25  # learning rate after a restart
MONITORED = 1000  # training images whose posterior is looked at where none are held out


@dataclass
class State:
    """How far a training has come; with the weights it is all that a checkpoint holds."""

    step: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)  # of the last epoch
    warnings: list[str] = field(default_factory=list)
    restarts: int = 0  # after a loss that was no number
    meter: Meter = field(default_factory=Meter)


def train(experiment: Experiment, run: RunDir, events: EventWriter, progress: Progress, state: State) -> None:
    """Train until all epochs are over; `state` says where to begin, and where the training stands at any time.

    Raises NotFinite where the loss is no number, KeyboardInterrupt or SystemExit where a signal asks to stop; in both
    cases the last good checkpoint stays.
    """
    config, optimizer = experiment.config, experiment.optimizer
    model, regularizer = distributed.wrap(experiment.model), distributed.wrap(experiment.regularizer)
    images = experiment.splits.train
    batch_size, seed = config["batch_size"], config["seed"]
    steps = math.ceil(len(images) / batch_size)
    schedules = moving_schedules(experiment)
    parameters = [*model.parameters(), *regularizer.parameters()]
    clock = Clock(state, config["checkpoint_minutes"])

    if state.step == 0 and config["on_divergence"] == "restart":
        save(experiment, run, events, state, clock)

    with Interruption() as interruption:
        for epoch in range(state.step // steps, config["epochs"]):
            clock.start()
            for positions in images.shuffled(order(seed, epoch), batch_size, skip=state.step % steps):
                for schedule in schedules:
                    schedule.advance(state.step / steps)
                optimizer.advance(state.step / steps)

                with distributed.share(positions) as own:
                    inference = model(images.batch(own))
                    penalty = regularizer(inference)
                    loss = distributed.mean_loss(inference.distortion + penalty)
                    with torch.no_grad():
                        state.meter.add(state.step + 1, inference.terms(penalty))
                optimizer.zero_grad()
                loss.backward()
                clip_gradient(parameters, config["max_grad_norm"])
                optimizer.step()

                state.step += 1
                is_point = state.step % min(config["log_every"], steps) == 0
                if is_point:
                    log_step(experiment, events, progress, state)
                if state.step % steps and is_time_to_save(interruption, clock, is_point):
                    save(experiment, run, events, state, clock)
                    interruption.raise_noted(f"stopped at step {state.step}")

            end_epoch(experiment, run, events, progress, state, clock, epoch + 1)
            save(experiment, run, events, state, clock)
            interruption.raise_noted(f"stopped at step {state.step}")


def is_time_to_save(interruption: Interruption, clock: Clock, is_point: bool) -> bool:
    """Whether a signal has come or a checkpoint is due. Several processes, whose clocks and signals differ, agree on it
    where the curves have a point."""
    if distributed.count() > 1 and not is_point:
        return False
    return distributed.greatest(interruption.signal is not None or clock.is_due()) > 0


def numbers(experiment: Experiment) -> dict[str, Number]:
    """The numbers that the loss uses, by the names of their curves: beta, capacity, sigma_value ..."""
    named = {name: module for name, module in experiment.regularizer.named_modules() if isinstance(module, Number)}
    for name, module in experiment.model.named_modules():
        if isinstance(module, Number):
            named[name.replace(".", "_")] = module
    return named


def moving_schedules(experiment: Experiment) -> list[Schedule]:
    """The schedules that have to be advanced; the learning rate's is the optimizer's own affair."""
    return [n for n in numbers(experiment).values() if isinstance(n, Schedule) and not isinstance(n, Constant)]


def log_step(experiment: Experiment, events: EventWriter, progress: Progress, state: State) -> None:
    """Write a point of each training curve: the means since the last one, and the numbers of this moment."""
    means = state.meter.point()
    values = {**means, **{name: float(number()) for name, number in numbers(experiment).items()}}
    values["learning_rate"] = experiment.optimizer.rate
    events.scalars({f"train/{name}": value for name, value in values.items()}, state.step)
    progress.step(state.step, means)


def end_epoch(
    experiment: Experiment, run: RunDir, events: EventWriter, progress: Progress, state: State, clock: Clock, epoch: int
) -> None:
    """Validate, write the record of the epoch, and keep the weights if they are the best."""
    config, held_out = experiment.config, experiment.splits.validation
    means = state.meter.epoch()
    clock.stop()
    measured = distributed.first(lambda: measure(experiment, held_out if len(held_out) else monitored(experiment)))
    record = {f"train/{name}": value for name, value in means.items()}
    if len(held_out):
        record |= {f"validation/{name}": value for name, value in measured.items() if name not in POSTERIOR}
    record |= {f"posterior/{name}": value for name, value in measured.items() if name in POSTERIOR}
    bad = [name for name, value in record.items() if not math.isfinite(value)]
    if bad:
        raise NotFinite(state.step, bad)
    # The training curves have points of their own.
    events.scalars({name: value for name, value in record.items() if not name.startswith("train/")}, state.step)
    if is_milestone(epoch, config["epochs"]):
        distributed.first(lambda: picture(experiment, events, state.step))
    state.record = {"epoch": epoch, "step": state.step, "seconds": round(clock.seconds(), 3), **record}
    run.append_metrics(state.record)
    if len(held_out):
        keep_best(experiment, run, state, measured["loss"])
    progress.epoch(epoch, record, measured)
    state.warnings = progress.warnings


def measure(experiment: Experiment, split: Split) -> dict[str, float]:
    """The terms of the loss and the shape of the posterior over a split."""
    return evaluate(experiment.model, experiment.regularizer, split, experiment.config["seed"], experiment.device)


def monitored(experiment: Experiment) -> Split:
    """Some training images, to look at the posterior where none are held out."""
    train = experiment.splits.train
    return Split(train.images, train.labels, train.index[:MONITORED], train.mapped)


def keep_best(experiment: Experiment, run: RunDir, state: State, loss: float) -> None:
    """Keep the weights if their validation loss is the least under the weights and scales that the loss now has.

    Losses under another beta cannot be compared: while a schedule moves, the newest weights count as the best.
    """
    moving = {name: float(n()) for name, n in numbers(experiment).items() if isinstance(n, Schedule)}
    if not state.best or state.best["numbers"] != moving or loss < state.best["loss"]:
        state.best = {"loss": loss, "numbers": moving, "record": state.record}
        shape = list(experiment.splits.train.images.shape[1:])
        images, weights = fingerprint(experiment.splits), experiment.model.state_dict()
        best = {"step": state.step, "shape": shape, "images": images, "model": weights}
        distributed.first(lambda: save_checkpoint(run.best_file, best))


def picture(experiment: Experiment, events: EventWriter, step: int) -> None:
    """Write histograms of the posterior, images over their reconstructions, and samples from the prior."""
    model, split = experiment.model, experiment.splits.validation
    shown = split if len(split) else monitored(experiment)
    with questioned(model, experiment.config["seed"], experiment.device):
        inference = model(shown.batch(torch.arange(min(500, len(shown)), device=experiment.device)))
        histograms = {"posterior/loc": inference.loc}
        if inference.scale is not None:
            histograms["posterior/scale"] = inference.scale
        if inference.rate is not None and inference.rate_per_dimension is not None:
            histograms["posterior/rate_per_dimension"] = inference.rate_per_dimension.mean(0)
        events.histograms(histograms, step)
        count = min(10, len(inference.x))
        pairs = torch.cat([inference.x[:count], inference.likelihood.mean[:count]])
        events.pictures("images/reconstructions", grid(pairs, count), step)
        samples = model.decode(model.prior().sample((64,))).mean
        events.pictures("images/samples", grid(samples, 8), step)


def save(experiment: Experiment, run: RunDir, events: EventWriter, state: State, clock: Clock) -> None:
    """Write a checkpoint from which the training goes on as if it had never stopped. Raises NotFinite rather than
    replace good weights by bad ones."""
    meter = state.meter.state_dict()
    parameters = torch.stack([p.isfinite().all() for p in experiment.model.parameters()])
    if not bool(parameters.all()):
        raise NotFinite(state.step, ["weights"])
    events.flush()  # what the curves show up to here must not get lost behind a checkpoint
    random = random_state(experiment.device)
    if not distributed.same([numbers.tolist() for numbers in random.values()]):
        raise Failure(
            "The processes no longer draw the same random numbers. A class of your own may draw some that are not for "
            "the images of a batch, and happen to be as many: choose another batch_size."
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
    """Go back to the newest checkpoint. Raises UserError or Failure where it cannot be used."""
    saved = distributed.first(lambda: load_checkpoint(run.checkpoint_file))
    if saved.get("images") != fingerprint(experiment.splits):
        raise UserError(
            f"The images of {run.path} have changed since it was trained, and its test images may be among those that "
            "it would now be trained on. Type another run_name=..., or overwrite=true to start anew."
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
        state.restarts = saved.get("restarts", 0)  # which format 1 has not had from the beginning
        experiment.optimizer.slow_down(SLOWER**state.restarts)
    except (RuntimeError, KeyError, ValueError) as error:
        raise Failure(f"{run.checkpoint_file} does not fit {run.config_file}: {first_line(error)}") from error
    return state


class Clock:
    """Seconds of a run over all of its sessions, those spent on training steps among them, and the next checkpoint."""

    def __init__(self, state: State, checkpoint_minutes: float) -> None:
        self._begin = time.perf_counter() - state.seconds
        self._training = state.training_seconds
        self._since: float | None = None
        self._between = checkpoint_minutes * 60
        self.saved()

    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def training_seconds(self) -> float:
        return self._training + (0.0 if self._since is None else time.perf_counter() - self._since)

    def start(self) -> None:
        """Training steps begin."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Training steps end for now."""
        self._training = self.training_seconds()
        self._since = None

    def saved(self) -> None:
        self._next = time.perf_counter() + self._between

    def is_due(self) -> bool:
        return time.perf_counter() >= self._next
