"""A search: a sweep whose sweeper proposes runs based on the results of earlier runs."""

from __future__ import annotations

import logging
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
from vae_cli.config.objective import PARTS, check_objective, figure
from vae_cli.config.settings import Config
from vae_cli.config.trust import in_shell
from vae_cli.core.errors import Failure, UserError
from vae_cli.core.wording import relative
from vae_cli.runs.folder import RunDir
from vae_cli.sweeps.launcher import composed
from vae_cli.sweeps.runner import Job, Outcome, Runner, is_plugin
from vae_cli.sweeps.space import check_sweeper, defined_terms, is_optuna, search_space, set_optuna_defaults, words_of
from vae_cli.sweeps.trials import Trial, Trials

if TYPE_CHECKING:
    from vae_cli.sweeps.progress import SweepProgress


class NothingStarted(UserError):
    """Raised in place of a search that is only checked. Exit code 0."""

    exit_code = 0


@dataclass
class Search:
    """Checks a search before it starts, reports each trial, and prints a table of all trials at the end.

    The search continues after a failed run. Used as a context manager, it raises Failure on exit if no run has a value
    of the objective, or if a run failed with an error other than a UserError. UserErrors are expected: a run diverges,
    for example, or a combination of settings is impossible.
    """

    trials: Trials = field(default_factory=Trials)
    config: DictConfig = field(default_factory=lambda: OmegaConf.create({}))
    objective: str = ""
    axes: dict[str, list[str]] = field(default_factory=dict)
    began: float = 0.0
    lists_only: bool = False  # no trial is started

    def around(self, launcher: Launcher, hydra_context: HydraContext, config: DictConfig) -> Launcher:
        """Check the search before it starts, and return a launcher that wraps `launcher`. Raises UserError."""
        setup_globals()
        # Both loggers print every trial and every failure to stderr; this class prints them itself.
        logging.getLogger("optuna").setLevel(logging.WARNING)
        logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.CRITICAL)
        self.config, self.objective = config, str(config.get("objective"))
        if config.get("arms") is not None:
            raise UserError("a study (arms=) cannot be searched: leave out either the study or hydra/sweeper=...")
        check_objective(self.objective)
        if is_optuna(config):
            check_sweeper(config.hydra.sweeper, self.objective)
            fixed, self.axes = search_space(words_of(config))
            self._check_corners(hydra_context, fixed)
        searched = [key for key, values in self.axes.items() if len(values) > 1]
        is_maximized = config.hydra.sweeper.get("direction") == "maximize"
        self.trials = Trials(self.objective, is_maximized, searched)
        self._announce()
        if self.lists_only:
            raise NothingStarted("No run was started. A search proposes its runs one after another.")
        self.began = time.perf_counter()
        return SearchLauncher(launcher, hydra_context, self)

    def _check_corners(self, hydra_context: HydraContext, fixed: Sequence[str]) -> None:
        """Check every choice and both ends of every interval, varying one axis at a time. Raises UserError."""
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
            except Exception as error:  # our own bugs are re-raised
                message = translate(error, words)
                if message is None:
                    raise
                whole = " For whole numbers type int(interval(2, 64))." if "a whole number" in str(message) else ""
                named = type(message)(f"The search cannot try {typed}, so nothing was started: {message}{whole}")
                raise named from error
            if path in seen and seen[path] != corner:
                keys = " and ".join(key for key in corner if corner[key] != seen[path][key])
                by_hand = "" if config.run_name is None else f", or leave out run_name={config.run_name}"
                raise UserError(
                    f"The search would try several values of {keys} in the same run, {path}, because the run's name "
                    f"does not include {keys}. Give {keys} one value{by_hand}."
                )
            seen[path] = corner

    def _check_defined(self, config: DictConfig, plain: dict[str, Any]) -> None:
        """Check one configuration, and that the objective is defined for it. Raises UserError."""
        from vae_cli.axes.dataset import Dataset
        from vae_cli.axes.regularizer import Regularizer
        from vae_cli.config.build import check_config
        from vae_cli.config.instantiate import build

        check_objective(plain["objective"])
        model = check_config(plain)
        split, _, term = self.objective.partition("/")
        if split == "validation" and plain["dataset"].get("validation") == 0:
            raise UserError(
                f"no images are held out (dataset.validation=0), so there is no {self.objective}. Hold some out, for "
                "example dataset.validation=200, or choose a different objective=..."
            )
        regularizer = build(plain["regularizer"], "regularizer", Regularizer)
        if term in defined_terms(model, regularizer, build(plain["dataset"], "dataset", Dataset).shape):
            return
        axis = "regularizer" if term in PARTS else "sigma"
        other = "posterior/loc_std" if split == "posterior" else f"{split}/loss"
        turn = " hydra.sweeper.direction=minimize" if config.hydra.sweeper.get("direction") != "minimize" else ""
        raise UserError(
            f"{self.objective} is not defined for {axis}={plain['choices'][axis]}. Choose a different objective, for "
            f"example objective={other}{turn if other.endswith('/loss') else ''}."
        )

    def _announce(self) -> None:
        """Print the objective and the searched settings; warn if the search will be misleading or needlessly slow."""
        sweeper, searched, count = self.config.hydra.sweeper, self.trials.searched, self.count()
        over = f" over {', '.join(searched)}" if self.axes else ""
        verb = f"{sweeper.direction} " if is_optuna(self.config) else ""
        print(f"search: {verb}{self.objective}{over}{f', {count} trials' if count else ''}", flush=True)
        if self.objective.endswith(("/loss", "/penalty")):
            for key in (key for key in searched if key.startswith("regularizer")):
                print(
                    f"warning: {self.objective} is computed with {key}, so a smaller {key} looks better even if the "
                    f"model is not. Give {key} one value, or choose another objective."
                )
        if sweeper.get("n_jobs") == 1 and not is_plugin(self.config.hydra.launcher, "BasicLauncher"):
            print(
                "note: the sweeper proposes one run at a time, so this launcher never trains two runs in parallel. To "
                "train two in parallel, type hydra.sweeper.n_jobs=2."
            )

    def count(self) -> int:
        """Return the number of runs that the sweeper will propose, or 0 if its settings do not include n_trials."""
        return int(self.config.hydra.sweeper.get("n_trials") or 0)

    def say_proposed(self, trial: Trial) -> None:
        """Print the proposed run, its number, the estimated time left, and the best value so far."""
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
        """Print the outcome of a trial if it repeats another trial, failed or was skipped; otherwise print nothing."""
        if trial.same_as is not None:
            print(f"  the same run as trial {self.trials.number(trial.same_as)}", flush=True)
        elif trial.state == "failed":
            print(f"  failed: {trial.reason()}", flush=True)
        elif trial.state == "skipped" and trial.path is not None:
            print(f"  {self.objective} {trial.value:.4g}, already finished: {relative(trial.path)}", flush=True)

    def write(self) -> None:
        """Write the table of trials to trials.csv in the sweep's folder."""
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
        if isinstance(error, ValueError) and len(failed) == len(ranked):  # Optuna raises it if no trial has a value
            title = f"all {len(failed)} runs of the search failed" if len(failed) > 1 else "the only run failed"
            raise Failure("\n".join([f"There is no best run, because {title}:", *lines])) from error
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
                "The search found a best run, but another run failed with an unexpected error: "
                f"{unexpected[0].reason()}"
            )

    def _say_next(self) -> None:
        """Print which files were written, and the commands to type next for the best run."""
        best = self.trials.best()
        if best is not None and best.path is not None:
            run, folder = in_shell(relative(best.path)), Path(self.config.hydra.sweep.dir)
            written = [name for name in ("trials.csv", "optimization_results.yaml") if (folder / name).exists()]
            print(f"written: {relative(folder)}/ with {', '.join(written)}")
            print(f"next:\n  vae sample {run}\n  vae evaluate {run} --quick")


class SearchLauncher(Launcher):
    """A launcher that wraps another one: it trains the proposed runs that have no result yet."""

    def __init__(self, launcher: Launcher, hydra_context: HydraContext, search: Search) -> None:
        self.launcher = launcher
        self.hydra_context = hydra_context
        self.search = search

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Do nothing: the wrapped launcher has been set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Train the proposed runs that have no result yet, and return one result for each proposal.

        The result of a failed trial raises the trial's error when its value is read.
        """
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
        """Check a trial and find the folder of its run; if the run already has an outcome, record that outcome."""
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
                    self._skip(trial, plain)
        except Exception as error:  # an invalid proposal is a failed trial; our own bugs are re-raised
            if translate(error, trial.words) is None:
                raise
            trial.fail(error)

    def _repeat_earlier(self, trial: Trial) -> bool:
        """If another trial of the same run has an outcome, copy it; return whether an outcome was copied."""
        for other in self.search.trials:
            if other is not trial and trial.state == "new" and other.path == trial.path and other.state != "new":
                trial.repeat(other)
                return True
        return False

    def _skip(self, trial: Trial, asked: Config | None = None) -> None:
        """Mark a trial as skipped, and read its value from the summary of the finished run, which may differ from the
        configuration that was `asked` for in the number of epochs and in the images."""
        from vae_cli.runs.plan import has_other_images

        assert trial.path is not None
        summary = RunDir(trial.path).summary()
        trial.state, trial.value = "skipped", figure(summary, self.search.objective)
        if asked is not None and summary["epoch"] != asked["epochs"]:
            trial.note = f", {summary['epoch']} epochs"
        if asked is not None and has_other_images(RunDir(trial.path), asked):
            trial.note += ", trained before the images changed"
        self._check_value(trial)

    def _progress(self, jobs: Sequence[Job], trials: Sequence[Trial]) -> SweepProgress:
        """Return a monitor for trials that train in parallel; it prints only on a terminal."""
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
            if trial.value is None and trial.path is not None:  # the launcher has lost the value that the job returned
                trial.value = figure(RunDir(trial.path).summary(), self.search.objective)
        except UserError as error:
            if error.exit_code == 0:  # another process has finished the run in the meantime
                self._skip(trial)
            else:
                trial.fail(error)
        except Exception as error:  # any error of the job is reported with its trial
            trial.fail(error)
        else:
            self._check_value(trial)

    def _check_value(self, trial: Trial) -> None:
        if trial.value is None:
            trial.fail(UserError(f"the run is finished, but its summary has no {self.search.objective}"))
