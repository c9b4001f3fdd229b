"""A search: a sweep whose sweeper proposes runs based on the results of earlier ones."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from vae_cli.config.compose import named_folder, to_plain
from vae_cli.config.messages import translate
from vae_cli.config.objective import check_objective, figure
from vae_cli.core.errors import Failure, UserError
from vae_cli.core.wording import relative
from vae_cli.runs.folder import RunDir
from vae_cli.sweeps.launcher import composed
from vae_cli.sweeps.runner import Job, Outcome, Runner, is_plugin
from vae_cli.sweeps.space import check_sweeper, defined_terms, is_optuna, search_space, set_optuna_defaults, words_of
from vae_cli.sweeps.trials import Trial, Trials

if TYPE_CHECKING:
    from vae_cli.sweeps.progress import SweepProgress


@dataclass
class Search:
    """Checks a search before it starts, reports each trial, and ends with a table of all trials.

    A failed run is an outcome like any other, and the search continues. As a context manager it raises Failure if no
    run finished, or if a run failed unexpectedly: for a reason other than a UserError, such as divergence or settings
    that cannot be combined.
    """

    trials: Trials = field(default_factory=Trials)
    config: DictConfig = field(default_factory=lambda: OmegaConf.create({}))
    objective: str = ""
    axes: dict[str, list[str]] = field(default_factory=dict)
    began: float = 0.0

    def around(self, launcher: Launcher, hydra_context: HydraContext, config: DictConfig) -> Launcher:
        """Check the whole search before it starts, and return the launcher for its sweeper. Raises UserError."""
        setup_globals()
        # Both report every trial and every failure on stderr, which this class does itself.
        logging.getLogger("optuna").setLevel(logging.WARNING)
        logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.CRITICAL)
        self.config, self.objective = config, str(config.get("objective"))
        if config.get("arms") is not None:
            raise UserError("arms= lists sweeps, which cannot be searched: leave out the sweeper or the study.")
        check_objective(self.objective)
        if is_optuna(config):
            check_sweeper(config.hydra.sweeper, self.objective)
            fixed, self.axes = search_space(words_of(config))
            self._check_corners(hydra_context, fixed)
        searched = [key for key, values in self.axes.items() if len(values) > 1]
        is_maximized = config.hydra.sweeper.get("direction") == "maximize"
        self.trials = Trials(self.objective, is_maximized, searched)
        self._announce()
        self.began = time.perf_counter()
        return SearchLauncher(launcher, hydra_context, self)

    def _check_corners(self, hydra_context: HydraContext, fixed: Sequence[str]) -> None:
        """Check every choice and both ends of every axis, one axis at a time."""
        first = {key: values[0] for key, values in self.axes.items()}
        corners = [first, *({**first, key: value} for key, values in self.axes.items() for value in values[1:])]
        seen: dict[Path, dict[str, str]] = {}
        for corner in corners:
            words = [*(f"{key}={value}" for key, value in corner.items()), *fixed]
            typed = " ".join(words[: len(corner)])
            try:
                with composed(hydra_context, self.config, words, 0) as config:
                    path, plain = named_folder(config), to_plain(config)
                    self._check_defined(config, plain)
            except Exception as error:  # an error without a message is a bug, and raised as it is
                message = translate(error, words)
                if message is None:
                    raise
                whole = " For whole numbers type int(interval(2, 64))." if "a whole number" in str(message) else ""
                named = type(message)(f"The search cannot try {typed}, so nothing was started: {message}{whole}")
                raise named from error
            if path in seen and seen[path] != corner:
                keys = " and ".join(key for key in corner if corner[key] != seen[path][key])
                by_hand = "" if config.run_name is None else f", and run_name={config.run_name} gives all the same name"
                raise UserError(
                    f"The search would try several values of {keys} in one and the same run, {path}: a run's name "
                    f"does not include {keys}{by_hand}."
                )
            seen[path] = corner

    def _check_defined(self, config: DictConfig, plain: dict[str, Any]) -> None:
        """Check one configuration, and that the objective is defined for it. Raises UserError."""
        from vae_cli.axes.dataset import Dataset
        from vae_cli.config.build import check_config
        from vae_cli.config.instantiate import build

        check_objective(plain["objective"])
        model = check_config(plain)
        split, _, term = self.objective.partition("/")
        if split == "validation" and plain["dataset"].get("validation") == 0:
            raise UserError(
                f"no images are held out (dataset.validation=0), so there is no {self.objective}. Hold some out, for "
                "example dataset.validation=200, or type another objective=..."
            )
        if term in defined_terms(model, build(plain["dataset"], "dataset", Dataset).shape):
            return
        other = "posterior/loc_std" if split == "posterior" else f"{split}/loss"
        turn = " hydra.sweeper.direction=minimize" if config.hydra.sweeper.get("direction") != "minimize" else ""
        raise UserError(
            f"{self.objective} is not defined for sigma={plain['choices']['sigma']}. Type another objective, for "
            f"example objective={other}{turn if other.endswith('/loss') else ''}."
        )

    def _announce(self) -> None:
        """Print what is searched, and what makes a search misleading or slow."""
        sweeper, searched, count = self.config.hydra.sweeper, self.trials.searched, self.count()
        over = f" over {', '.join(searched)}" if self.axes else ""
        verb = f"{sweeper.direction} " if is_optuna(self.config) else ""
        print(f"search: {verb}{self.objective}{over}{f', {count} trials' if count else ''}", flush=True)
        if self.objective.endswith(("/loss", "/penalty")):
            for key in (key for key in searched if key.startswith("regularizer")):
                print(
                    f"warning: {self.objective} includes {key}, so smaller values look better whatever they do. Give "
                    f"{key} one value."
                )
        if sweeper.get("n_jobs") == 1 and not is_plugin(self.config.hydra.launcher, "BasicLauncher"):
            print(
                "note: one run is proposed at a time, so this launcher never trains two at once. To train several at "
                "once type hydra.sweeper.n_jobs=2."
            )

    def count(self) -> int:
        """How many runs will be proposed; 0 if the sweeper does not say."""
        return int(self.config.hydra.sweeper.get("n_trials") or 0)

    def say_proposed(self, trial: Trial) -> None:
        """Print which run comes next, the time left, and the best value so far."""
        number, count = self.trials.number(trial), self.count()
        trained = sum(one.state in ("finished", "failed") for one in self.trials)
        parts = [f"{number} of {max(count, number)}" if count else f"{number}"]
        if trained and count:
            minutes = (time.perf_counter() - self.began) / trained * (count - number + 1) / 60
            parts.append(f"{minutes:.0f} min left" if minutes >= 1 else "less than a minute left")
        if best := self.trials.best():
            parts.append(f"best {best.value:.4g}")
        print(f"{', '.join(parts)}: {self.trials.spell(trial)}", flush=True)

    def say_ended(self, trial: Trial) -> None:
        """Print the outcome of a trial unless its training has done so: a failure, or a run that was skipped."""
        if trial.same_as is not None:
            print(f"  the same run as trial {self.trials.number(trial.same_as)}", flush=True)
        elif trial.state == "failed":
            print(f"  failed: {trial.reason()}", flush=True)
        elif trial.state == "skipped" and trial.path is not None:
            print(f"  {self.objective} {trial.value:.4g}, finished before: {relative(trial.path)}", flush=True)

    def write(self) -> None:
        """Write the table next to what the sweeper writes about its best trial."""
        self.trials.write(Path(self.config.hydra.sweep.dir))

    def __enter__(self) -> Search:
        set_optuna_defaults()
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: TracebackType | None) -> None:
        if not self.trials:
            return
        ranked = self.trials.ranked()
        failed = [trial for trial in ranked if trial.state == "failed"]
        lines = [f"  {self.trials.spell(trial)}: {trial.reason()}" for trial in failed]
        if isinstance(error, ValueError) and len(failed) == len(ranked):  # Optuna's, if no trial has a value
            title = f"There is no best run: all {len(failed)} of the search failed" if len(failed) > 1 else "It failed"
            raise Failure("\n".join([f"{title}:", *lines])) from error
        if error is not None and not any(error is trial.error for trial in failed):
            return
        self.trials.print()
        if error is not None:  # more runs failed than the sweeper allows; the error is printed after this
            return
        if lines:
            print("\n".join([f"{len(lines)} of {len(ranked)} runs failed:", *lines]))
        self._say_next()
        unexpected = [trial for trial in failed if not isinstance(trial.error, UserError)]
        if unexpected:
            raise Failure(
                f"The search has a best run, but a run failed for an unexpected reason: {unexpected[0].reason()}"
            )

    def _say_next(self) -> None:
        """Print what was written, and what to type next for the best run."""
        best = self.trials.best()
        if best is not None and best.path is not None:
            run, folder = shlex.quote(str(relative(best.path))), Path(self.config.hydra.sweep.dir)
            written = [name for name in ("trials.csv", "optimization_results.yaml") if (folder / name).exists()]
            print(f"written: {relative(folder)}/ with {', '.join(written)}")
            print(f"next:\n  vae sample {run}\n  vae evaluate {run} --quick")


class SearchLauncher(Launcher):
    """A launcher around another one. It trains proposals that have no result yet, and returns a result for each."""

    def __init__(self, launcher: Launcher, hydra_context: HydraContext, search: Search) -> None:
        self.launcher = launcher
        self.hydra_context = hydra_context
        self.search = search

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Do nothing: the launcher inside is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Return one result for each proposal. The result of a failed trial raises its error when its value is read."""
        setup_globals()
        search = self.search
        proposed = [Trial(list(words)) for words in job_overrides]
        to_do: list[Trial] = []
        for index, trial in enumerate(proposed, start=initial_job_idx):
            search.trials.trials.append(trial)
            search.say_proposed(trial)
            self._check(trial, index)
            if trial.state == "new" and all(trial.path != other.path for other in to_do):
                to_do.append(trial)
        jobs = [Job(number, trial.words) for number, trial in enumerate(to_do, start=initial_job_idx)]
        outcomes = Runner(self.launcher, search.config, monitor=lambda: self._progress(jobs, to_do)).run(jobs)
        for trial, outcome in zip(to_do, outcomes, strict=True):
            self._record(trial, outcome)
        for trial in proposed:
            self._repeat_earlier(trial)
            search.say_ended(trial)
        search.write()
        return [trial.result() for trial in proposed]

    def _check(self, trial: Trial, index: int) -> None:
        """Find the folder of a trial, and its objective if the run is finished already."""
        from vae_cli.config.build import check_config
        from vae_cli.runs.plan import plan

        try:
            with composed(self.hydra_context, self.search.config, trial.words, index) as config:
                path, plain = named_folder(config), to_plain(config)
                check_config(plain)
                trial.path, trial.epochs = path, plain["epochs"]
                if self._repeat_earlier(trial):
                    return
                if plan(RunDir(path), plain) == "finished":
                    self._skip(trial, plain["epochs"])
        except Exception as error:  # a proposal that cannot be a run has failed; our own bugs are re-raised
            if translate(error, trial.words) is None:
                raise
            trial.fail(error)

    def _repeat_earlier(self, trial: Trial) -> bool:
        """Take over the outcome of an earlier trial that was the same run, if there is one."""
        for other in self.search.trials:
            if other is not trial and trial.state == "new" and other.path == trial.path and other.state != "new":
                trial.repeat(other)
                return True
        return False

    def _skip(self, trial: Trial, epochs: int | None = None) -> None:
        """Take the objective of a run that is finished already."""
        assert trial.path is not None
        summary = RunDir(trial.path).summary()
        trial.state, trial.value = "skipped", figure(summary, self.search.objective)
        if epochs is not None and summary["epoch"] != epochs:
            trial.note = f", {summary['epoch']} epochs"
        self._check_value(trial)

    def _progress(self, jobs: Sequence[Job], trials: Sequence[Trial]) -> SweepProgress:
        """Show bars for trials that are trained side by side; their outcomes are printed like those of all others."""
        from rich.console import Console

        from vae_cli.sweeps.progress import SweepProgress

        runs = {job.number: (trial.path, trial.epochs) for job, trial in zip(jobs, trials, strict=True) if trial.path}
        return SweepProgress(runs, Console(stderr=True), Console(quiet=True))

    def _record(self, trial: Trial, outcome: Outcome) -> None:
        """Record the outcome of a trial that was trained."""
        try:
            if isinstance(outcome, Exception):
                raise outcome
            trial.state, trial.value = "finished", outcome.return_value
            if trial.value is None and trial.path is not None:  # its launcher has lost the returned value
                trial.value = figure(RunDir(trial.path).summary(), self.search.objective)
        except UserError as error:
            if error.exit_code == 0:  # another process has finished the run meanwhile
                self._skip(trial)
            else:
                trial.fail(error)
        except Exception as error:  # whatever the job raised is reported with its trial
            trial.fail(error)
        else:
            self._check_value(trial)

    def _check_value(self, trial: Trial) -> None:
        if trial.value is None:
            trial.fail(UserError(f"the run is finished, but has no {self.search.objective}"))
