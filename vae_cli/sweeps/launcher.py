"""Launch the jobs of a sweep: all are checked before the first one starts, and a failed one does not stop the others.

Two public names of Hydra's are used in a way that Hydra does not promise. `Plugins.instantiate_launcher` is replaced,
because Hydra has no hook around the launcher that a user chooses; if the name is gone, `check_sweeps` raises
AttributeError, because a sweep must not start unchecked. `HydraConfig.instance().cfg` is restored after a job's
configuration has been checked; `HydraConfig` has a setter only for configurations that include Hydra's node.
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
def check_sweeps(check: Check, reporter: SweepReporter | None = None, learn: Learn | None = None) -> Iterator[None]:
    """Check every job of a sweep before the first one starts, whichever launcher runs them.

    `check` gets each job's whole configuration, including Hydra's part. If it raises UserError, nothing is started and
    the message names the job; if it returns False, as for a finished run, the job is skipped. A sweeper that learns
    from results does not know all of its jobs beforehand, so `learn` wraps its launcher in another one.
    """
    instantiate = Plugins.instantiate_launcher
    made: list[CheckedLauncher] = []

    def instantiate_checked(
        self: Plugins, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> Launcher:
        launcher = instantiate(self, hydra_context=hydra_context, task_function=task_function, config=config)
        if learn is not None and not is_plugin(config.hydra.sweeper, "BasicSweeper"):
            return learn(launcher, hydra_context, config)
        made.append(CheckedLauncher(launcher, check, reporter, hydra_context, config))
        return made[-1]

    Plugins.instantiate_launcher = instantiate_checked  # type: ignore[method-assign]
    try:
        yield
    except Exception:
        for launcher in made:  # Hydra itself may refuse a job after it has written its record of the sweep
            if not launcher.is_launched:
                launcher.forget_record()
        raise
    finally:
        Plugins.instantiate_launcher = instantiate  # type: ignore[method-assign]


class CheckedLauncher(Launcher):
    """A launcher around another one, which checks the jobs before it launches them, and reports on them."""

    def __init__(
        self,
        launcher: Launcher,
        check: Check,
        reporter: SweepReporter | None,
        hydra_context: HydraContext,
        config: DictConfig,
    ) -> None:
        self.launcher = launcher
        self.check = check
        self.reporter = reporter
        self.hydra_context = hydra_context
        self.config = config
        self.is_launched = False

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Do nothing: the launcher inside is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Launch the jobs left to do. Raises UserError before any starts, and Failure at the end if any fails."""
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
            if not to_do:
                self.forget_record()
            if self.reporter is not None:
                self.reporter.begin()
        except Exception:  # nothing starts, so nothing is left behind
            self.forget_record()
            raise
        reporter = self.reporter
        monitor = None if reporter is None else reporter.monitor
        outcomes = Runner(self.launcher, self.config, reporter.start if reporter else None, monitor).run(to_do)
        if reporter is not None:
            reporter.end()
        errors = [(job.words, error_of(outcome)) for job, outcome in zip(to_do, outcomes, strict=True)]
        _raise_failures([(words, error) for words, error in errors if error is not None], len(to_do))
        return [outcome for outcome in outcomes if isinstance(outcome, JobReturn)]

    def _with_arms(self, jobs: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
        """Return the jobs of a study, if the sweep is one. Raises UserError."""
        arms = self.config.get("arms")
        if arms is None:
            return jobs
        if not isinstance(arms, ListConfig) or not arms or not all(isinstance(arm, str) for arm in arms):
            raise UserError("arms must be a list of sweeps, for example -m 'arms=[\"sigma=fixed,shared latent=2\"]'.")
        return [words for job in jobs for words in jobs_of_study(job, arms)]

    def forget_record(self) -> None:
        """Remove Hydra's record of a sweep that does not start, and the folders that are empty without it."""
        folder = Path(self.config.hydra.sweep.dir)
        (folder / "multirun.yaml").unlink(missing_ok=True)
        with suppress(OSError):  # a folder that is not empty stays
            for place in (folder, folder.parent, folder.parent.parent):
                place.rmdir()

    def is_to_run(self, job: Job) -> bool:
        """Check one job; return False if it is finished. Raises UserError, which names the job."""
        try:
            with composed(self.hydra_context, self.config, job.words, job.number) as config:
                if config.get("arms") != self.config.get("arms"):
                    raise UserError("a study is a whole sweep: choose it alone, not as one of several choices")
                return self.check(config)
        except Exception as error:  # a resolver's message arrives wrapped; other errors are re-raised
            message = translate(error, job.words)
            if message is None:
                raise
            named = type(message)(f"The job {spell(job.words)} cannot run, so none was started: {message}")
            raise named from error


@contextmanager
def composed(hydra_context: HydraContext, sweep: DictConfig, words: Sequence[str], number: int) -> Iterator[DictConfig]:
    """Yield the whole configuration of one job of a sweep; inside, resolvers see this configuration."""
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
    """Raise one Failure that lists which of the `count` jobs failed, if any did.

    A job that another process has finished in the meantime has not failed; the message that says so is printed.
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
