"""Have jobs carried out by a launcher, one after the other or side by side in other processes."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple, Protocol

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from vae_cli.core.errors import Failure, UserError, first_line
from vae_cli.machine.cores import cores
from vae_cli.sweeps.slurm import watch_jobs

State = Literal["waiting", "running", "interrupted", "failed", "finished"]

LOOK = 0.5  # seconds between two looks at jobs that run in other processes
GRACE = 60  # seconds in which runs that were asked to stop save what they have


class JobMonitor(Protocol):
    """Sees how jobs go on, by their numbers, that other processes carry out."""

    def look(self) -> None:
        """Look at all of them, and show how they stand; called twice a second."""

    def state(self, job: int) -> State:
        """How far a job has come."""

    def stop(self, is_left: bool) -> None:
        """The sweep is stopped: ask the jobs that are under way on this machine to save and to stop too, unless they
        are left to a queue."""

    def close(self) -> None:
        """All of them have ended."""


class SweepReporter(Protocol):
    """What is told how a sweep goes on."""

    def begin(self) -> None:
        """All jobs have been checked."""

    def start(self, number: int, count: int, failed: int, words: Sequence[str]) -> None:
        """A job starts, this one of so many that follow each other in this process; so many have failed till now."""

    def monitor(self) -> JobMonitor:
        """Who sees to jobs that are carried out side by side in other processes."""

    def end(self) -> None:
        """The last job has ended, well or not."""


class Job(NamedTuple):
    """A job's number and the overrides that define it."""

    number: int
    words: Sequence[str]


Outcome = JobReturn | Exception


def is_plugin(node: Any, name: str) -> bool:
    """Whether Hydra's launcher or sweeper that a node of its configuration describes is of the class of this name."""
    # By name: Hydra executes its plugins' modules anew, so that the classes in them are not those one can import.
    return str(node.get("_target_", "")).rpartition(".")[2] == name


class Runner:
    """Has jobs carried out by a launcher: one after the other, or in other processes side by side, each with its share
    of the cores. One that fails, or whose process dies, does not stop the others."""

    def __init__(
        self,
        launcher: Launcher,
        config: DictConfig,
        start: Callable[[int, int, int, Sequence[str]], None] | None = None,
        monitor: Callable[[], JobMonitor] | None = None,
    ) -> None:
        self.launcher = launcher
        self.config = config
        self.start = start
        self._find_monitor = monitor
        self._monitor: JobMonitor | None = None

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """What becomes of each job: a result, which may be an error, or the error that kept it from having one."""
        if is_plugin(self.config.hydra.launcher, "BasicLauncher"):
            return self._one_by_one(jobs)
        if self._find_monitor is not None:
            self._monitor = self._find_monitor()
        outcomes = self._side_by_side(jobs) if jobs else []
        if self._monitor is not None:
            self._monitor.look()
            self._monitor.close()
        return outcomes

    def _launch(self, batch: Sequence[Job]) -> list[Outcome]:
        try:
            return list(self.launcher.launch([job.words for job in batch], batch[0].number))
        except Exception as error:  # what fails before a job's task is called: it is one outcome among others
            return [error] * len(batch)

    def _one_by_one(self, jobs: Sequence[Job]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for number, job in enumerate(jobs, start=1):
            if self.start is not None:
                failed = sum(error_of(outcome) is not None for outcome in outcomes)
                self.start(number, len(jobs), failed, job.words)
            outcomes += self._launch([job])
        return outcomes

    def _side_by_side(self, jobs: Sequence[Job]) -> list[Outcome]:
        width, threads = self._share(len(jobs))
        with _environment("OMP_NUM_THREADS", threads):
            outcomes = self._in_threads([[job] for job in jobs] if width else [jobs], width or 1)
            # Where a worker dies (for want of memory, say), joblib gives up on all jobs: those that have not begun are
            # launched again, as long as that gets any of them further.
            before, left = list(jobs), [] if width else self._not_begun(jobs, outcomes)
            while left and left != before:
                outcomes |= self._in_threads([left], 1)
                before, left = left, self._not_begun(left, outcomes)
        return [self._told(job, outcomes[job.number]) for job in jobs]

    def _not_begun(self, jobs: Sequence[Job], outcomes: Mapping[int, Outcome]) -> list[Job]:
        if self._monitor is None:
            return []
        unsaid = [job for job in jobs if isinstance(outcomes[job.number], Exception)]
        unsaid = [job for job in unsaid if not isinstance(outcomes[job.number], UserError)]
        return [job for job in unsaid if self._monitor.state(job.number) == "waiting"]

    def _told(self, job: Job, outcome: Outcome) -> Outcome:
        """Replace a launcher's own error by what the run's folder says: one worker's death reaches all jobs."""
        if not isinstance(outcome, Exception) or isinstance(outcome, UserError) or self._monitor is None:
            return outcome
        state = self._monitor.state(job.number)
        if state == "finished":
            return JobReturn(overrides=list(job.words), status=JobStatus.COMPLETED)
        if state in ("running", "interrupted"):
            return Failure(
                "its process died or was stopped (for want of memory?); the same command again goes on with it"
            )
        return Failure(f"it did not begin: {type(outcome).__name__}: {first_line(outcome)}")

    def _share(self, count: int) -> tuple[int | None, int]:
        """How many jobs are launched one by one, or None where the launcher has to get all at once; and the threads of
        each."""
        config: Any = OmegaConf.to_container(self.config.hydra.launcher, resolve=True)
        if is_plugin(config, "LocalLauncher"):  # starts whatever it gets at once
            threads = config.get("cpus_per_task") or 1
            return config.get("gpus_per_node") or max(1, cores() // threads), threads
        if is_plugin(config, "SlurmLauncher"):  # would wait for an array of jobs until the first one fails
            watch_jobs()
            return config.get("array_parallelism") or count, config.get("cpus_per_task") or 1
        if is_plugin(config, "RayLauncher"):
            import ray

            if not ray.is_initialized():  # not twice, from two threads
                ray.init(**config["ray"]["init"])
            return max(1, count), max(1, int(config["ray"]["remote"].get("num_cpus") or 1))
        at_once = config.get("n_jobs") or 1
        at_once = at_once if at_once > 0 else max(1, cores() + 1 + at_once)  # joblib counts -1, -2 ... from the top
        return None, max(1, cores() // min(at_once, max(1, count)))

    def _in_threads(self, batches: Sequence[Sequence[Job]], width: int) -> dict[int, Outcome]:
        """Launch batches of jobs, so many at a time, each from a thread that waits for it; this one watches."""
        outcomes: dict[int, Outcome] = {}
        waiting: queue.SimpleQueue[Sequence[Job]] = queue.SimpleQueue()
        for batch in batches:
            waiting.put(batch)

        def work() -> None:
            while True:
                try:
                    batch = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    results = self._launch(batch)
                except BaseException as error:  # a worker heard Ctrl-C as this process did, which stops the sweep
                    results = [Failure(f"stopped by {type(error).__name__}")] * len(batch)
                outcomes.update(zip((job.number for job in batch), results, strict=True))

        # Daemons: a job on a cluster does not keep this process from ending.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(width, len(batches)))]
        jobs = [job.number for batch in batches for job in batch]
        for thread in threads:
            thread.start()
        try:
            with _terminable():
                while alive := [thread for thread in threads if thread.is_alive()]:
                    alive[0].join(LOOK)
                    if self._monitor is not None:
                        self._monitor.look()
        except BaseException:  # Ctrl-C, most of all
            with suppress(queue.Empty):
                while True:
                    waiting.get_nowait()
            self._abandon(jobs)
            raise
        return outcomes

    def _abandon(self, jobs: Sequence[int]) -> None:
        """Stop what this sweep has started, except on a cluster, where jobs wait in a queue of their own."""
        is_left = is_plugin(self.config.hydra.launcher, "SlurmLauncher")
        if not is_left:
            stop_file(self.config.hydra).touch()
        if self._monitor is None:
            return
        self._monitor.stop(is_left)
        end = time.monotonic() + (0 if is_left else GRACE)
        while time.monotonic() < end and any(self._monitor.state(job) == "running" for job in jobs):
            time.sleep(0.2)


def stop_file(hydra: Any) -> Path:
    """A file in a sweep's own folder; once it is there no job of the sweep starts any more."""
    return Path(hydra.sweep.dir) / "stop"


def error_of(outcome: Outcome) -> Exception | None:
    """The error in what has become of a job, if there is one."""
    if isinstance(outcome, Exception):
        return outcome
    try:
        _ = outcome.return_value
    except Exception as error:  # whatever the job raised
        return error
    return None


@contextmanager
def _environment(name: str, value: object) -> Iterator[None]:
    """Set a variable for processes that are started inside, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = str(value)
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does, by an exception, so that it can stop what it has started."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def spell(words: Sequence[str]) -> str:
    """The overrides of a job as they are typed."""
    return " ".join(words) or "(the defaults)"
