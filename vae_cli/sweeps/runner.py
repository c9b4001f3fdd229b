"""Run the jobs of a sweep with a launcher: one after another, or in parallel in other processes."""

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
from vae_cli.core.listing import has_listings, save_listings
from vae_cli.machine.cores import cores
from vae_cli.machine.signals import HANG_UP, PARENT, STOPS, leave_terminals, terminals
from vae_cli.sweeps.slurm import watch_jobs

State = Literal["waiting", "running", "interrupted", "failed", "finished"]

LOOK = 0.5  # seconds between two checks of the jobs that run in other processes
GRACE = 60  # seconds to wait for runs to save a checkpoint after they were asked to stop


class JobMonitor(Protocol):
    """Follows jobs that run in other processes. Jobs are identified by number."""

    def look(self) -> None:
        """Read the states of all jobs and show the progress; called every LOOK seconds."""

    def state(self, job: int) -> State:
        """Return the state of one job."""

    def stop(self, is_queued: bool) -> None:
        """If is_queued, leave the jobs in Slurm's queue; otherwise, ask the jobs on this machine to save and stop."""

    def close(self) -> None:
        """Remove the progress display, after all jobs have ended."""


class SweepReporter(Protocol):
    """Reports the progress of a sweep."""

    def begin(self) -> None:
        """Report the number of jobs, after all have been checked and before the first one starts."""

    def start(self, number: int, count: int, failed: int, words: Sequence[str]) -> None:
        """Report that job `number` of `count` starts in this process; `failed` jobs have failed so far."""

    def monitor(self) -> JobMonitor:
        """Return a monitor for the jobs that run in other processes."""

    def end(self) -> None:
        """Report the results of the sweep, after the last job has finished or failed."""


class Job(NamedTuple):
    """A job of a sweep: its number, and the overrides that define it."""

    number: int
    words: Sequence[str]


Outcome = JobReturn | Exception


def is_plugin(node: Any, name: str) -> bool:
    """Return whether a node of Hydra's configuration describes a launcher or sweeper with this class name."""
    # Compare names, because Hydra loads plugin modules itself: their classes differ from those that an import returns.
    return str(node.get("_target_", "")).rpartition(".")[2] == name


def runs_here(launcher: Any) -> bool:
    """Return whether a launcher runs the jobs one after another, in the process that launches them."""
    if is_plugin(launcher, "JoblibLauncher"):
        at_once = launcher.get("n_jobs")
        return at_once == 1 or (isinstance(at_once, int) and at_once < 0 and cores() + 1 + at_once <= 1)
    return is_plugin(launcher, "BasicLauncher")


class Runner:
    """Runs jobs with a launcher: one after another, or in parallel in other processes, which share the CPU cores.

    A job that fails, or whose process dies, does not stop the others.
    """

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
        """Run the jobs and return the outcome of each: its result, or the launcher's error if there is no result."""
        if runs_here(self.config.hydra.launcher):
            return self._one_by_one(jobs)
        if has_listings():
            save_listings(Path(self.config.hydra.sweep.dir))
        if self._find_monitor is not None:
            self._monitor = self._find_monitor()
        outcomes = self._side_by_side(jobs) if jobs else []
        if self._monitor is not None:
            self._monitor.look()
            self._monitor.close()
        return outcomes

    def _launch(self, batch: Sequence[Job]) -> list[Outcome]:
        """Launch a batch of jobs together. If the launcher raises an error, it becomes the outcome of every job."""
        try:
            return list(self.launcher.launch([job.words for job in batch], batch[0].number))
        except Exception as error:  # raised by the launcher; an error of a job is stored in its JobReturn
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
        with _environment("OMP_NUM_THREADS", threads), _environment(PARENT, os.getpid()):
            outcomes = self._in_threads([[job] for job in jobs] if width else [jobs], width or 1)
            # If a worker dies (out of memory, for example), joblib gives up on all jobs. The jobs that have not started
            # are launched again, until two launches in a row have started none of them.
            left, idle = [] if width else self._not_started(jobs, outcomes), 0
            idle = int(len(left) == len(jobs))
            while left and idle < 2:
                outcomes |= self._in_threads([left], 1)
                before, left = left, self._not_started(left, outcomes)
                idle = idle + 1 if left == before else 0
        return [self._own_outcome(job, outcomes[job.number]) for job in jobs]

    def _not_started(self, jobs: Sequence[Job], outcomes: Mapping[int, Outcome]) -> list[Job]:
        """Return the jobs that did not start because the launcher raised an error."""
        if self._monitor is None:
            return []
        lost = [job for job in jobs if isinstance(outcomes[job.number], Exception)]
        lost = [job for job in lost if not isinstance(outcomes[job.number], UserError)]
        return [job for job in lost if self._monitor.state(job.number) == "waiting"]

    def _own_outcome(self, job: Job, outcome: Outcome) -> Outcome:
        """Return a job's outcome; if the launcher raised an error, determine it from the state of the job's run.

        The launcher's error does not show which jobs failed: if one worker dies, all jobs get the same error.
        """
        if not isinstance(outcome, Exception) or isinstance(outcome, UserError) or self._monitor is None:
            return outcome
        state = self._monitor.state(job.number)
        if state == "finished":
            return JobReturn(overrides=list(job.words), status=JobStatus.COMPLETED)
        if state in ("running", "interrupted"):
            return Failure("its process died or was stopped (out of memory?); type the same command again to resume it")
        return Failure(f"it did not start: {type(outcome).__name__}: {first_line(outcome)}")

    def _share(self, count: int) -> tuple[int | None, int]:
        """Return how many jobs to launch in parallel, and the number of threads of each job.

        The number of jobs is None if the launcher must receive all jobs in one call and runs them in parallel itself.
        """
        config: Any = OmegaConf.to_container(self.config.hydra.launcher, resolve=True)
        if is_plugin(config, "LocalLauncher"):  # starts all jobs of one call at the same time
            threads = config.get("cpus_per_task") or 1
            return config.get("gpus_per_node") or max(1, cores() // threads), threads
        if is_plugin(config, "SlurmLauncher"):  # after a call with several jobs, it stops waiting when one fails
            watch_jobs()
            return config.get("array_parallelism") or count, config.get("cpus_per_task") or 1
        if is_plugin(config, "RayLauncher"):
            import ray

            if not ray.is_initialized():  # here, because each thread that launches a job would initialize it
                ray.init(**config["ray"]["init"])
            return max(1, count), max(1, int(config["ray"]["remote"].get("num_cpus") or 1))
        at_once = config.get("n_jobs") or 1
        at_once = at_once if at_once > 0 else max(1, cores() + 1 + at_once)  # joblib: -1 is all cores, -2 all but one
        return None, max(1, cores() // min(at_once, max(1, count)))

    def _in_threads(self, batches: Sequence[Sequence[Job]], width: int) -> dict[int, Outcome]:
        """Launch up to `width` batches at a time and return the outcomes of their jobs, keyed by job number.

        Worker threads launch the batches and wait for them, while the calling thread monitors the jobs.
        """
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
                except BaseException as error:  # Ctrl-C also interrupts workers; the main thread stops the sweep
                    results = [Failure(f"stopped by {type(error).__name__}")] * len(batch)
                outcomes.update(zip((job.number for job in batch), results, strict=True))

        # Daemon threads, so that waiting for a job on a cluster does not keep this process alive.
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
        except BaseException:  # usually Ctrl-C
            with suppress(queue.Empty):
                while True:
                    waiting.get_nowait()
            self._abandon(jobs)
            raise
        return outcomes

    def _abandon(self, jobs: Sequence[int]) -> None:
        """Stop the jobs of this sweep, or leave them in the queue if Slurm runs them."""
        is_queued = is_plugin(self.config.hydra.launcher, "SlurmLauncher")
        if not is_queued:
            stop_file(self.config.hydra).touch()
        if self._monitor is None:
            return
        self._monitor.stop(is_queued)
        end = time.monotonic() + (0 if is_queued else GRACE)
        while time.monotonic() < end and any(self._monitor.state(job) == "running" for job in jobs):
            time.sleep(0.2)


def stop_file(hydra: Any) -> Path:
    """Return the path of a sweep's stop file: while this file exists, no further job of the sweep starts."""
    return Path(hydra.sweep.dir) / "stop"


def error_of(outcome: Outcome) -> Exception | None:
    """Return the error in the outcome of a job, or None if the job succeeded."""
    if isinstance(outcome, Exception):
        return outcome
    try:
        _ = outcome.return_value
    except Exception as error:  # whatever the job raised
        return error
    return None


@contextmanager
def _environment(name: str, value: object) -> Iterator[None]:
    """Set an environment variable for the processes started in this context, unless it is already set."""
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
    """Make SIGTERM and SIGHUP raise SystemExit inside this context, so that this process stops its jobs as it does on
    Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return

    outputs = terminals()

    def leave(number: int, frame: FrameType | None) -> None:
        if number == HANG_UP:
            before[number] = signal.SIG_IGN  # the system and the shell both send one: the second must not kill
            signal.signal(number, signal.SIG_IGN)
            leave_terminals(outputs)
        raise SystemExit(128 + number)

    ends = [n for n in STOPS if n != signal.SIGINT and signal.getsignal(n) is not signal.SIG_IGN]
    before: dict[int, Any] = {number: signal.signal(number, leave) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def spell(words: Sequence[str]) -> str:
    """Return the overrides of a job as the user would type them."""
    return " ".join(words) or "(the defaults)"
