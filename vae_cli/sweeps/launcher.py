"""The jobs of a sweep: all are checked before the first starts, and one that fails does not stop the others."""

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

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from vae_cli.config.hydra import translate
from vae_cli.core.errors import Failure, UserError, explain, first_line
from vae_cli.machine.cores import cores
from vae_cli.sweeps.slurm import watch_jobs
from vae_cli.sweeps.study import jobs_of_study

Check = Callable[[DictConfig], bool]
Learn = Callable[[Launcher, HydraContext, DictConfig], Launcher]
State = Literal["waiting", "running", "interrupted", "failed", "finished"]

LOOK = 0.5  # seconds between two looks at jobs that run in other processes
GRACE = 60  # seconds in which runs that were asked to stop save what they have


class Onlooker(Protocol):
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


class Watch(Protocol):
    """What is told how a sweep goes on."""

    def begin(self) -> None:
        """All jobs have been checked."""

    def start(self, number: int, count: int, failed: int, words: Sequence[str]) -> None:
        """A job starts, this one of so many that follow each other in this process; so many have failed till now."""

    def onlooker(self) -> Onlooker:
        """Who sees to jobs that are carried out side by side in other processes."""

    def end(self) -> None:
        """The last job has ended, well or not."""


class Job(NamedTuple):
    """A job's number and the overrides that define it."""

    number: int
    words: Sequence[str]


Outcome = JobReturn | Exception


@contextmanager
def check_sweeps(check: Check, watch: Watch | None = None, learn: Learn | None = None) -> Iterator[None]:
    """Have every job of a sweep checked before the first one starts, whichever launcher runs them.

    `check` gets each job's whole configuration, Hydra's part included: if it raises a UserError nothing is started and
    the message names the job; if it returns False, as for a finished run, the job is left out. A sweeper that learns
    from results does not know all of its jobs beforehand: it gets the launcher that `learn` makes of its own.
    """
    instantiate = Plugins.instantiate_launcher
    made: list[CheckedLauncher] = []

    def instantiate_checked(
        self: Plugins, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> Launcher:
        launcher = instantiate(self, hydra_context=hydra_context, task_function=task_function, config=config)
        if learn is not None and not is_plugin(config.hydra.sweeper, "BasicSweeper"):
            return learn(launcher, hydra_context, config)
        made.append(CheckedLauncher(launcher, check, watch, hydra_context, config))
        return made[-1]

    Plugins.instantiate_launcher = instantiate_checked  # type: ignore[method-assign]
    try:
        yield
    except Exception:
        for launcher in made:  # Hydra itself may refuse a job, once it has written its record
            if not launcher.is_launched:
                launcher.forget_record()
        raise
    finally:
        Plugins.instantiate_launcher = instantiate  # type: ignore[method-assign]


def is_plugin(node: Any, name: str) -> bool:
    """Whether Hydra's launcher or sweeper that a node of its configuration describes is of the class of this name."""
    # By name: Hydra executes its plugins' modules anew, so that the classes in them are not those one can import.
    return str(node.get("_target_", "")).rpartition(".")[2] == name


class CheckedLauncher(Launcher):
    """A launcher around another one, which checks what it is to launch and reports on it."""

    def __init__(
        self, launcher: Launcher, check: Check, watch: Watch | None, hydra_context: HydraContext, config: DictConfig
    ) -> None:
        self.launcher = launcher
        self.check = check
        self.watch = watch
        self.hydra_context = hydra_context
        self.config = config
        self.is_launched = False

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Do nothing: the launcher inside is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Launch what is left to do. Raises UserError before anything starts, Failure at the end where jobs failed."""
        setup_globals()
        self.is_launched = True
        try:
            if not job_overrides:
                raise UserError(
                    "This sweep has no job: one of its lists or ranges holds no value. Give it one or more."
                )
            job_overrides = self._with_arms(job_overrides)
            jobs = [Job(index, words) for index, words in enumerate(job_overrides, start=initial_job_idx)]
            to_do = [job for job in jobs if self._passes(job)]
            if not to_do:
                self.forget_record()
            if self.watch is not None:
                self.watch.begin()
        except Exception:  # whatever was refused: nothing starts, and nothing is left behind
            self.forget_record()
            raise
        watch = self.watch
        onlooker = None if watch is None else watch.onlooker
        outcomes = Runner(self.launcher, self.config, watch.start if watch else None, onlooker).run(to_do)
        if watch is not None:
            watch.end()
        errors = [(job.words, error_of(outcome)) for job, outcome in zip(to_do, outcomes, strict=True)]
        _raise_first([(words, error) for words, error in errors if error is not None], len(to_do))
        return [outcome for outcome in outcomes if isinstance(outcome, JobReturn)]

    def _with_arms(self, jobs: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
        arms = self.config.get("arms")
        if arms is None:
            return jobs
        if not isinstance(arms, ListConfig) or not arms or not all(isinstance(arm, str) for arm in arms):
            raise UserError("arms takes a list of sweeps, for example -m 'arms=[\"sigma=fixed,shared latent=2\"]'.")
        return [words for job in jobs for words in jobs_of_study(job, arms)]

    def forget_record(self) -> None:
        """Remove what Hydra has written of a sweep that does not start, and the folders that are empty without it."""
        folder = Path(self.config.hydra.sweep.dir)
        (folder / "multirun.yaml").unlink(missing_ok=True)
        with suppress(OSError):  # a folder that holds something else stays
            for place in (folder, folder.parent, folder.parent.parent):
                place.rmdir()

    def _passes(self, job: Job) -> bool:
        try:
            with composed(self.hydra_context, self.config, job.words, job.number) as config:
                if config.get("arms") != self.config.get("arms"):
                    raise UserError("a study is a sweep of its own: choose it alone, and not among others")
                return self.check(config)
        except Exception as error:  # a resolver's message arrives wrapped; what is no message goes on as it is
            message = translate(error, job.words)
            if message is None:
                raise
            named = type(message)(f"The job {spell(job.words)} cannot run, so none was started: {message}")
            raise named from error


@contextmanager
def composed(hydra_context: HydraContext, sweep: DictConfig, words: Sequence[str], number: int) -> Iterator[DictConfig]:
    """The whole configuration of one job of a sweep, which resolvers see while it is looked at."""
    config = hydra_context.config_loader.load_sweep_config(sweep, list(words))
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield config
    finally:
        HydraConfig.instance().cfg = before


class Runner:
    """Has jobs carried out by a launcher: one after the other, or in other processes side by side, each with its share
    of the cores. One that fails, or whose process dies, does not stop the others."""

    def __init__(
        self,
        launcher: Launcher,
        config: DictConfig,
        start: Callable[[int, int, int, Sequence[str]], None] | None = None,
        onlooker: Callable[[], Onlooker] | None = None,
    ) -> None:
        self.launcher = launcher
        self.config = config
        self.start = start
        self._find_onlooker = onlooker
        self._onlooker: Onlooker | None = None

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """What becomes of each job: a result, which may be an error, or the error that kept it from having one."""
        if is_plugin(self.config.hydra.launcher, "BasicLauncher"):
            return self._one_by_one(jobs)
        if self._find_onlooker is not None:
            self._onlooker = self._find_onlooker()
        outcomes = self._side_by_side(jobs) if jobs else []
        if self._onlooker is not None:
            self._onlooker.look()
            self._onlooker.close()
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
        if self._onlooker is None:
            return []
        unsaid = [job for job in jobs if isinstance(outcomes[job.number], Exception)]
        unsaid = [job for job in unsaid if not isinstance(outcomes[job.number], UserError)]
        return [job for job in unsaid if self._onlooker.state(job.number) == "waiting"]

    def _told(self, job: Job, outcome: Outcome) -> Outcome:
        """Replace a launcher's own error by what the run's folder says: one worker's death reaches all jobs."""
        if not isinstance(outcome, Exception) or isinstance(outcome, UserError) or self._onlooker is None:
            return outcome
        state = self._onlooker.state(job.number)
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
                    if self._onlooker is not None:
                        self._onlooker.look()
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
        if self._onlooker is None:
            return
        self._onlooker.stop(is_left)
        end = time.monotonic() + (0 if is_left else GRACE)
        while time.monotonic() < end and any(self._onlooker.state(job) == "running" for job in jobs):
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


def _raise_first(failed: Sequence[tuple[Sequence[str], Exception]], count: int) -> None:
    lines = []
    for words, error in failed:
        message = translate(error, words) or error
        if getattr(message, "exit_code", 1) == 0:  # finished meanwhile
            print(message)
        else:
            lines.append(f"  {spell(words)}: {' '.join(explain(message)[0].split())}")
    if lines:
        title = f"{len(lines)} of {count} jobs failed" if count > 1 else "The job failed"
        raise Failure("\n".join([f"{title}:", *lines])) from failed[0][1]


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
