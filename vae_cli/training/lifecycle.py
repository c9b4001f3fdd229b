"""One run from its first step, or from where it stopped, to its summary."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import platform
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from vae_cli.axes.dataset.split import fingerprint
from vae_cli.config.build import Experiment, build_experiment
from vae_cli.config.naming import hparams, show, what_matters
from vae_cli.config.objective import POSTERIOR
from vae_cli.config.settings import Config
from vae_cli.core.errors import Failure, UserError, is_failure
from vae_cli.core.files import is_locked, locked
from vae_cli.core.rng import questioned, stream
from vae_cli.machine import distributed
from vae_cli.machine.launch import this_process
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.folder import ANEW, Follower, RunDir
from vae_cli.training.loop import SLOWER, State, measure, restore, train
from vae_cli.training.meter import NotFinite
from vae_cli.training.progress import Progress
from vae_cli.training.tensorboard import EventWriter, NoEvents

log = logging.getLogger(__name__)

EMBEDDED = 1000  # test codes that are shown in TensorBoard's projector


class Finished(UserError):
    """The run has been trained before, and there is nothing to do."""

    exit_code = 0


class UnderWay(UserError):
    """Another process is training the run."""


def finished_message(path: Path) -> str:
    return (
        f"{path} is finished, and left alone. To train it further type a larger epochs=..., to start anew "
        f"overwrite=true, to look at it: vae sample {shlex.quote(str(path))}"
    )


def look_at(folder: RunDir, config: Config, is_ours: bool = False) -> Literal["new", "resume", "finished"]:
    """Say what is to be done in a run's folder, whose lock may be ours, without changing anything.

    Raises UserError where the folder holds something else: another configuration, a run that is under way, or files
    that are no run.
    """
    path = folder.path
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file, not a folder; type another run_name=... or runs_dir=...")
    for file in (folder.lock_file, folder.metrics_file, folder.log_file):  # what is appended to
        if file.is_symlink():
            raise UserError(f"{file} is a link, and is not written through: remove it, or type another run_name=...")
    if not folder.config_file.exists():
        foreign = [p.name for p in path.iterdir() if not p.name.startswith(".")] if path.exists() else []
        if foreign:
            raise UserError(f"{path} is not empty and no run (it holds {foreign[0]}); type another run_name=...")
        return "new"
    if not is_ours and is_locked(folder.lock_file):
        raise UnderWay(under_way(folder))
    if config["overwrite"] and not _is_begun_by(submission(), folder):
        return "new"
    refuse_other(folder, config)
    if not folder.checkpoint_file.exists():
        return "new"
    summary = folder.summary()
    if summary.get("status") == "finished" and summary.get("epoch", 0) >= config["epochs"]:
        return "finished"
    done = max((record["epoch"] for record in folder.metrics()), default=0)
    if done > config["epochs"]:
        raise UserError(f"{path} has been trained for {done} epochs already; type epochs={done} or more to finish it.")
    return "resume"


def submission() -> str | None:
    """The submitit job that this process carries out, which stays the same when the job goes back into the queue."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID")
    return f"{os.environ['SUBMITIT_FOLDER']}/{job}" if "SUBMITIT_FOLDER" in os.environ else None


def _is_begun_by(job: str | None, folder: RunDir) -> bool:
    if job is None:
        return False
    try:
        return folder.summary().get("submission") == job
    except Failure:
        return False


def under_way(folder: RunDir) -> str:
    """Say who is training a run."""
    try:
        summary = folder.summary()
    except Failure:
        summary = {}
    return (
        f"{folder.path} is being trained by process {summary.get('pid')} on {summary.get('host')} since "
        f"{summary.get('started')}; wait for it, or type another run_name=..."
    )


def refuse_other(folder: RunDir, config: Config) -> None:
    """Raise UserError, naming the keys, where a folder holds a run whose configuration differs in what matters."""
    there, here = (what_matters(c) for c in (folder.config(), config))
    differing = [key for key in {**there, **here} if there.get(key, "nothing") != here.get(key, "nothing")]
    if differing:
        named = ", ".join(
            f"{k}={show(there.get(k, 'nothing'))} there and {show(here.get(k, 'nothing'))} here" for k in differing
        )
        raise UserError(
            f"{folder.path} holds another run: {named}. Type another run_name=..., or overwrite=true to start anew."
        )


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
        folder, console = Follower(folder.path), Console(file=StringIO())
    with ExitStack() as until_the_end:
        distributed.first(lambda: lock(folder, until_the_end))
        return _run_locked(experiment, folder, console, is_one_of_many)


def lock(folder: RunDir, until: ExitStack) -> None:
    """Make a run's folder and hold its lock. Raises UserError where another process trains the run."""
    folder.path.mkdir(parents=True, exist_ok=True)
    if not until.enter_context(locked(folder.lock_file, wait=False)):
        raise UnderWay(under_way(folder))


def prepare(folder: RunDir, config: Config) -> bool:
    """Leave in a run's folder what the training begins with, and say whether it is a new one. Raises Finished."""
    for part in (*folder.path.glob(".*.part"), *folder.path.glob("projector/.*.part")):  # a killed process wrote them
        part.unlink()
    todo = look_at(folder, config, is_ours=True)
    if todo == "finished":
        raise Finished(finished_message(folder.path))
    if todo == "new":
        clear(folder)
    else:
        # Damaged ones are refused before anything is written, and before a training that would need them in its end.
        if load_checkpoint(folder.checkpoint_file).get("best"):
            if not folder.best_file.exists():
                raise Failure(f"{folder.best_file} is missing, and its weights are the best. {ANEW}")
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
                f"Going on at step {state.step} of {folder.path}", soft_wrap=True, highlight=False, markup=False
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
    tested = measure(experiment, experiment.splits.test)
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


def embed(experiment: Experiment, events: EventWriter, step: int) -> None:
    """Show the posterior means of test images in TensorBoard's projector, with images and labels."""
    test, classes = experiment.splits.test, experiment.splits.classes
    positions = torch.arange(min(EMBEDDED, len(test)), device=experiment.device)
    with questioned(experiment.model, experiment.config["seed"], experiment.device):
        inference = experiment.model(test.batch(positions))
    labels = None
    if test.labels is not None:
        labels = [classes[n] if classes else str(n) for n in test.batch_labels(positions).tolist()]
    images = inference.x if inference.x.shape[1] in (1, 3) else None
    events.embedding(inference.loc, labels, images, step)


def describe(experiment: Experiment) -> dict[str, Any]:
    """What is needed to know where figures come from: configuration, versions, commit, device, threads."""
    packages = ["torch", "hydra-core", "omegaconf", "tensorboard", "vae-cli"]
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
    cuda = experiment.device.type == "cuda"
    return {
        "config": experiment.config,
        "versions": versions,
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name(experiment.device) if cuda else str(experiment.device),
        "threads": torch.get_num_threads(),
        "processes": distributed.count(),
        "determinism": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        },
    }


def git_commit() -> str | None:
    """The commit of the clone that this code runs from, with a + where it was changed since; None outside a clone."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or a repository of another owner
    return found.stdout.strip()


def restart(error: NotFinite, experiment: Experiment, folder: RunDir, console: Console, state: State) -> State:
    """Go back to the last checkpoint, with a smaller learning rate. Raises UserError or Failure as restore does."""
    again = restore(experiment, folder)
    again.restarts = state.restarts + 1
    experiment.optimizer.slow_down(SLOWER**again.restarts)
    folder.forget_metrics_after(again.step)
    said = (
        f"diverged: {error}, {likely_cause(error.terms)}; went on from step {again.step} with a learning rate times "
        f"{SLOWER**again.restarts:g} (restart {again.restarts} of {experiment.config['restarts']})"
    )
    log.warning(said)
    console.print(said, soft_wrap=True, highlight=False, markup=False)
    again.warnings = [*again.warnings, said]
    return again


def likely_cause(terms: Sequence[str]) -> str:
    """Say what most likely makes these terms, and no others, no finite numbers."""
    broken = {term.rpartition("/")[2] for term in terms}
    if broken == {"weights"}:
        return "as after a step that was too large"
    if "distortion" in broken and "rate" not in broken and "penalty" not in broken:
        return "as where the decoder's output or the likelihood's scale grows without bound"
    if "distortion" not in broken and "rate" in broken:
        return "as where codes, or their scales, grow without bound"
    if "distortion" not in broken and "penalty" in broken:
        return "as where the regularizer weighs too much"
    return "as after steps that were too large"


def diverged(error: NotFinite, experiment: Experiment, folder: RunDir) -> str:
    """Say what broke, at which step, why, what is left, and what to type."""
    config = experiment.config
    left = "no checkpoint had been written yet"
    if folder.checkpoint_file.exists():
        left = f"the last good checkpoint, of step {load_checkpoint(folder.checkpoint_file)['step']}, is kept"
    tried = f" after {config['restarts']} restarts" if config["on_divergence"] == "restart" else ""
    help_itself = "" if tried else ", or type on_divergence=restart, which goes on from there by itself"
    rate = experiment.optimizer.rate
    return (
        f"the training of {folder.path} diverged{tried}: {error}, {likely_cause(error.terms)}; {left}. A learning rate "
        f"smaller than {rate:g} (optimizer.lr={rate / 10:g}) or clipped gradients (max_grad_norm=100) may "
        f"help{help_itself}."
    )


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
