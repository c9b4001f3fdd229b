"""Launch the jobs of a sweep: all are checked before the first one starts, and a failed job does not stop the others.

Two public names of Hydra are used in a way that Hydra does not guarantee:

- `check_sweeps` replaces `Plugins.instantiate_launcher`, because Hydra has no hook around the launcher that a user
  chooses. If a new version of Hydra lacks this name, `check_sweeps` raises AttributeError, because a sweep must not
  start unchecked.
- `composed` assigns `HydraConfig.instance().cfg` to restore the previous configuration, because
  `HydraConfig.set_config` accepts only configurations that include Hydra's node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, open_dict

from vae_cli.config.messages import translate
from vae_cli.core.errors import Failure, UserError, explain
from vae_cli.sweeps.runner import Job, Runner, SweepReporter, error_of, is_plugin, spell
from vae_cli.sweeps.study import jobs_of_study

Check = Callable[[DictConfig], bool]
Learn = Callable[[Launcher, HydraContext, DictConfig], Launcher]


@contextmanager
def check_sweeps(
    check: Check, reporter: SweepReporter | None = None, learn: Learn | None = None, lists_only: bool = False
) -> Iterator[None]:
    """Inside this context, check every job of a sweep before the first one starts, whichever launcher runs them.

    `check` is called with the complete configuration of each job, including Hydra's part. If it raises UserError, no
    job is started and the message names the job. If it returns False, for example for a finished run, the job is
    skipped. `reporter` prints the progress of the sweep. The jobs of a search are not known beforehand, because its
    sweeper proposes them based on earlier results. For a search, `learn` wraps the launcher instead. If `lists_only`,
    no job is started.
    """
    instantiate = Plugins.instantiate_launcher
    made: list[CheckedLauncher] = []

    def instantiate_checked(
        self: Plugins, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> Launcher:
        launcher = instantiate(self, hydra_context=hydra_context, task_function=task_function, config=config)
        if learn is not None and not is_plugin(config.hydra.sweeper, "BasicSweeper"):
            return learn(launcher, hydra_context, config)
        made.append(CheckedLauncher(launcher, check, reporter, hydra_context, config, lists_only))
        return made[-1]

    Plugins.instantiate_launcher = instantiate_checked  # type: ignore[method-assign]
    try:
        yield
    except Exception:
        for launcher in made:  # Hydra may refuse a job after it has written multirun.yaml
            if not launcher.is_launched:
                launcher.forget_record()
        raise
    finally:
        Plugins.instantiate_launcher = instantiate  # type: ignore[method-assign]


class CheckedLauncher(Launcher):
    """A launcher that wraps another one: it checks all jobs before it launches any, and reports on the sweep."""

    def __init__(
        self,
        launcher: Launcher,
        check: Check,
        reporter: SweepReporter | None,
        hydra_context: HydraContext,
        config: DictConfig,
        lists_only: bool = False,
    ) -> None:
        self.launcher = launcher
        self.check = check
        self.lists_only = lists_only
        self.reporter = reporter
        self.hydra_context = hydra_context
        self.config = config
        self.is_launched = False

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Do nothing: the wrapped launcher has been set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Launch all jobs except those that `check` skips, and return their results.

        Raises UserError before the first job starts if any job fails its check, and Failure at the end if any job has
        failed.
        """
        setup_globals()
        self.is_launched = True
        try:
            if not job_overrides:
                raise UserError(
                    "This sweep has no jobs: one of its lists or ranges is empty. Give it at least one value."
                )
            job_overrides = self._with_arms(job_overrides)
            jobs = [Job(index, words) for index, words in enumerate(job_overrides, start=initial_job_idx)]
            to_do = [job for job in jobs if self.is_to_run(job)]
            if not to_do or self.lists_only:
                self.forget_record()
            if self.reporter is not None:
                self.reporter.begin()
        except Exception:  # no job starts, so no record of the sweep may remain
            self.forget_record()
            raise
        if self.lists_only:
            return []
        reporter = self.reporter
        monitor = None if reporter is None else reporter.monitor
        outcomes = Runner(self.launcher, self.config, reporter.start if reporter else None, monitor).run(to_do)
        if reporter is not None:
            reporter.end()
        errors = [(job.words, error_of(outcome)) for job, outcome in zip(to_do, outcomes, strict=True)]
        _raise_failures([(words, error) for words, error in errors if error is not None], len(to_do))
        return [outcome for outcome in outcomes if isinstance(outcome, JobReturn)]

    def _with_arms(self, jobs: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
        """Return the jobs of the study if `arms` is set, otherwise `jobs`. Raises UserError if `arms` is invalid."""
        arms = self.config.get("arms")
        if arms is None:
            return jobs
        if not isinstance(arms, ListConfig) or not arms or not all(isinstance(arm, str) for arm in arms):
            raise UserError("arms must be a list of sweeps, for example -m 'arms=[\"sigma=fixed,shared latent=2\"]'.")
        return [words for job in jobs for words in jobs_of_study(job, arms)]

    def forget_record(self) -> None:
        """Remove the multirun.yaml that Hydra wrote for a sweep that did not start, and any folders left empty."""
        folder = Path(self.config.hydra.sweep.dir)
        (folder / "multirun.yaml").unlink(missing_ok=True)
        with suppress(OSError):  # a folder that is not empty stays
            for place in (folder, folder.parent, folder.parent.parent):
                place.rmdir()

    def is_to_run(self, job: Job) -> bool:
        """Check one job and return whether to launch it. Raises UserError with a message that names the job."""
        try:
            with composed(self.hydra_context, self.config, job.words, job.number) as config:
                if config.get("arms") != self.config.get("arms"):
                    raise UserError(
                        "a study is already a sweep, so it cannot be one of several values: run each study alone"
                    )
                return self.check(config)
        except Exception as error:  # Hydra wraps errors of resolvers; our own bugs are re-raised
            message = translate(error, job.words)
            if message is None:
                raise
            named = type(message)(f"The job {spell(job.words)} cannot run, so no job was started: {message}")
            raise named from error


@contextmanager
def composed(hydra_context: HydraContext, sweep: DictConfig, words: Sequence[str], number: int) -> Iterator[DictConfig]:
    """Yield the complete configuration of one job of a sweep; inside the context, ${hydra:...} refers to it."""
    config = hydra_context.config_loader.load_sweep_config(sweep, list(words))
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield config
    finally:
        HydraConfig.instance().cfg = before


def _raise_failures(failed: Sequence[tuple[Sequence[str], Exception]], count: int) -> None:
    """Raise one Failure that lists the failed jobs, if any; `count` is the number of jobs that were launched.

    If another process has finished a job's run in the meantime, the job has not failed; its message is printed.
    """
    lines = []
    for words, error in failed:
        message = translate(error, words) or error
        if getattr(message, "exit_code", 1) == 0:
            print(message)
        else:
            lines.append(f"  {spell(words)}: {' '.join(explain(message)[0].split())}")
    if lines:
        title = f"{len(lines)} of {count} jobs failed" if count > 1 else "The job failed"
        raise Failure("\n".join([f"{title}:", *lines])) from failed[0][1]
