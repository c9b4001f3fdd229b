"""The jobs of a sweep: all are checked before the first starts, and one that fails does not stop the others."""

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
        made.append(CheckedLauncher(launcher, check, reporter, hydra_context, config))
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


class CheckedLauncher(Launcher):
    """A launcher around another one, which checks what it is to launch and reports on it."""

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
            if self.reporter is not None:
                self.reporter.begin()
        except Exception:  # whatever was refused: nothing starts, and nothing is left behind
            self.forget_record()
            raise
        reporter = self.reporter
        monitor = None if reporter is None else reporter.monitor
        outcomes = Runner(self.launcher, self.config, reporter.start if reporter else None, monitor).run(to_do)
        if reporter is not None:
            reporter.end()
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
