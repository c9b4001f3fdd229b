"""A search: a sweep whose sweeper proposes the next runs from what the finished ones reached."""

from __future__ import annotations

import csv
import logging
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
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
from vae_cli.core.files import write_text
from vae_cli.core.wording import relative
from vae_cli.runs.folder import RunDir
from vae_cli.sweeps.launcher import composed
from vae_cli.sweeps.runner import Job, Outcome, Runner, is_plugin

if TYPE_CHECKING:
    from vae_cli.sweeps.progress import SweepProgress
from vae_cli.sweeps.space import check_sweeper, defined_terms, is_optuna, search_space, set_optuna_defaults, words_of
from vae_cli.sweeps.trials import Trial, mark_failed, reason_of, result_of, shortened, values_of


@dataclass
class Search:
    """Tells a sweeper what each run reached that it proposes, of a finished run without training it again, and ends
    with a table of them all.

    A run that fails is a result of the search like others, and it goes on; as a context the search raises Failure
    where no run was finished, and where one failed that neither diverged nor was impossible.
    """

    trials: list[Trial] = field(default_factory=list)
    config: DictConfig = field(default_factory=lambda: OmegaConf.create({}))
    objective: str = ""
    axes: dict[str, list[str]] = field(default_factory=dict)
    began: float = 0.0

    def around(self, launcher: Launcher, hydra_context: HydraContext, config: DictConfig) -> Launcher:
        """Check the whole search before it starts, and return the launcher for its sweeper. Raises UserError."""
        setup_globals()
        # Both speak on stderr of every trial and every failure, which we do in our own words.
        logging.getLogger("optuna").setLevel(logging.WARNING)
        logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.CRITICAL)
        self.config, self.objective = config, str(config.get("objective"))
        if config.get("arms") is not None:
            raise UserError("arms= lists sweeps, each of them whole: leave the sweeper out, or the study.")
        check_objective(self.objective)
        if is_optuna(config):
            check_sweeper(config.hydra.sweeper, self.objective)
            fixed, self.axes = search_space(words_of(config))
            self._check_corners(hydra_context, fixed)
        self._say_what_is_searched()
        self.began = time.perf_counter()
        return _Launcher(launcher, hydra_context, self)

    def _check_corners(self, hydra_context: HydraContext, fixed: Sequence[str]) -> None:
        """Check every choice and both ends of every axis, one axis at a time."""
        first = {key: values[0] for key, values in self.axes.items()}
        corners = [first, *({**first, key: value} for key, values in self.axes.items() for value in values[1:])]
        seen: dict[Path, dict[str, str]] = {}
        for corner in corners:
            words = [*(f"{key}={value}" for key, value in corner.items()), *fixed]
            shown = " ".join(words[: len(corner)])
            try:
                with composed(hydra_context, self.config, words, 0) as config:
                    path, plain = named_folder(config), to_plain(config)
                    self._check_defined(config, plain)
            except Exception as error:  # whatever is no message goes on as it is
                message = translate(error, words)
                if message is None:
                    raise
                whole = " For whole numbers type int(interval(2, 64))." if "a whole number" in str(message) else ""
                named = type(message)(f"The search cannot try {shown}, so nothing was started: {message}{whole}")
                raise named from error
            if path in seen and seen[path] != corner:
                keys = " and ".join(key for key in corner if corner[key] != seen[path][key])
                raise UserError(
                    f"The search would try values of {keys} in one and the same run, {path}: a run is not named by "
                    f"{keys}{'' if config.run_name is None else f', and run_name={config.run_name} names all alike'}."
                )
            seen[path] = corner

    def _check_defined(self, config: DictConfig, plain: dict[str, Any]) -> None:
        from vae_cli.axes.dataset import Dataset
        from vae_cli.config.build import check_config
        from vae_cli.config.instantiate import build

        check_objective(plain["objective"])
        model = check_config(plain)
        split, _, term = self.objective.partition("/")
        if split == "validation" and plain["dataset"].get("validation") == 0:
            raise UserError(
                f"no image is held out (dataset.validation=0), so there is no {self.objective}. Hold some out, as "
                "dataset.validation=200, or type another objective=..."
            )
        if term in defined_terms(model, build(plain["dataset"], "dataset", Dataset).shape):
            return
        other = "posterior/loc_std" if split == "posterior" else f"{split}/loss"
        turn = " hydra.sweeper.direction=minimize" if config.hydra.sweeper.get("direction") != "minimize" else ""
        raise UserError(
            f"{self.objective} is not defined for sigma={plain['choices']['sigma']}. Type another objective, for "
            f"example objective={other}{turn if other.endswith('/loss') else ''}."
        )

    def _say_what_is_searched(self) -> None:
        sweeper, count = self.config.hydra.sweeper, self.count()
        said = f" over {', '.join(self._searched())}" if self.axes else ""
        verb = f"{sweeper.direction} " if is_optuna(self.config) else ""
        print(f"search: {verb}{self.objective}{said}{f', {count} trials' if count else ''}", flush=True)
        if self.objective.endswith(("/loss", "/penalty")):
            for key in (key for key in self._searched() if key.startswith("regularizer")):
                print(f"warning: {self.objective} has {key} inside: a smaller one looks better. Give it one value.")
        if sweeper.get("n_jobs") == 1 and not is_plugin(self.config.hydra.launcher, "BasicLauncher"):
            print("note: one run is proposed at a time, so this launcher has nothing to do beside it. To train several "
                  "at once type hydra.sweeper.n_jobs=2.")  # fmt: skip

    def count(self) -> int:
        """How many runs will be proposed; 0 where the sweeper does not say."""
        return int(self.config.hydra.sweeper.get("n_trials") or 0)

    def _searched(self) -> list[str]:
        return [key for key, values in self.axes.items() if len(values) > 1]

    def shown(self, trial: Trial) -> str:
        """The searched values of a trial, as they are typed but for their last digits."""
        values = values_of(trial)
        keys = self._searched() or list(values)
        return " ".join(f"{key}={shortened(values.get(key, ''))}" for key in keys) or "(the defaults)"

    def best(self) -> Trial | None:
        """The trial with the best objective so far, the first of several."""
        done = [trial for trial in self.trials if trial.value is not None]
        return min(done, key=self._place) if done else None

    def _place(self, trial: Trial) -> float:
        if trial.value is None:
            return math.inf
        return trial.value if self.config.hydra.sweeper.get("direction") != "maximize" else -trial.value

    # What is said --------------------------------------------------------------------------------------------------

    def say_proposed(self, trial: Trial) -> None:
        """Say which run comes next, how long those that are left will take, and the best so far."""
        number, count = self.trials.index(trial) + 1, self.count()
        trained = sum(one.state in ("finished", "failed") for one in self.trials)
        parts = [f"{number} of {max(count, number)}" if count else f"{number}"]
        if trained and count:
            minutes = (time.perf_counter() - self.began) / trained * (count - number + 1) / 60
            parts.append(f"{minutes:.0f} min left" if minutes >= 1 else "less than a minute left")
        if best := self.best():
            parts.append(f"best {best.value:.4g}")
        print(f"{', '.join(parts)}: {self.shown(trial)}", flush=True)

    def say_ended(self, trial: Trial) -> None:
        """Say what the task did not: that a run failed, or was left alone."""
        if trial.same_as is not None:
            print(f"  the same run as trial {self.trials.index(trial.same_as) + 1}", flush=True)
        elif trial.state == "failed":
            print(f"  failed: {reason_of(trial)}", flush=True)
        elif trial.state == "left alone" and trial.path is not None:
            print(f"  {self.objective} {trial.value:.4g}, left alone: {relative(trial.path)}", flush=True)

    def rows(self) -> list[tuple[Trial, list[str]]]:
        """The runs from the best to the worst, those that failed last, each once, and their cells (see `header`)."""
        once: dict[str, Trial] = {}
        for trial in self.trials:
            once.setdefault(str(trial.path or trial.words), trial)
        best, rows = self.best(), []
        for trial in sorted(once.values(), key=self._place):
            values = values_of(trial)
            rows.append((trial, [
                "best" if trial is best else "",
                str(self.trials.index(trial) + 1),
                "" if trial.value is None else repr(trial.value),
                *(values.get(key, "") for key in self._searched()),
                f"{trial.state}{trial.note}",
                "" if trial.path is None else str(relative(trial.path)),
            ]))  # fmt: skip
        return rows

    def header(self) -> list[str]:
        return ["", "trial", self.objective, *self._searched(), "state", "run"]

    def write(self) -> Path:
        """Write the table beside what the sweeper writes about its best trial."""
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)  # the launcher has made none where every run was finished before
        text = StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerows([self.header(), *(row for _, row in self.rows())])
        write_text(folder / "trials.csv", text.getvalue())
        return folder / "trials.csv"

    def _print_table(self) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        console = Console()
        table = Table(box=None if not console.is_terminal else Table().box)
        for name in self.header():
            table.add_column(escape(name), overflow="fold", justify="left" if name in ("", "state", "run") else "right")
        for trial, row in self.rows():
            style = "bold" if row[0] else "red" if trial.state == "failed" else ""
            table.add_row(*(escape(shortened(cell)) for cell in row[:-1]), escape(row[-1]), style=style)
        if not console.is_terminal:
            console.width = 10_000  # a pipe has no edge at which to break a name
        console.print(table)

    def __enter__(self) -> Search:
        set_optuna_defaults()
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: TracebackType | None) -> None:
        if not self.trials:
            return
        trials, best = [trial for trial, _ in self.rows()], self.best()
        failed = [trial for trial in trials if trial.state == "failed"]
        lines = [f"  {self.shown(trial)}: {reason_of(trial)}" for trial in failed]
        if isinstance(error, ValueError) and len(failed) == len(trials):  # so Optuna ends where there is no best one
            title = f"There is no best run: all {len(failed)} of the search failed" if len(failed) > 1 else "It failed"
            raise Failure("\n".join([f"{title}:", *lines])) from error
        if error is not None and not any(error is trial.error for trial in failed):
            return
        self._print_table()
        if error is not None:  # a failure, of which there were too many: it is said after this
            return
        if lines:
            print("\n".join([f"{len(lines)} of {len(trials)} runs failed:", *lines]))
        if best is not None and best.path is not None:
            run, folder = shlex.quote(str(relative(best.path))), Path(self.config.hydra.sweep.dir)
            written = [name for name in ("trials.csv", "optimization_results.yaml") if (folder / name).exists()]
            print(f"written: {relative(folder)}/ with {', '.join(written)}")
            print(f"next:\n  vae sample {run}\n  vae evaluate {run} --quick")
        unexpected = [trial for trial in failed if not isinstance(trial.error, UserError)]
        if unexpected:
            raise Failure(
                f"The search has a best run, but not every failure is one of training: {reason_of(unexpected[0])}"
            )


class _Launcher(Launcher):
    """Runs what was proposed and has no result yet, and returns one result for each proposal."""

    def __init__(self, launcher: Launcher, hydra_context: HydraContext, search: Search) -> None:
        self.launcher = launcher
        self.hydra_context = hydra_context
        self.search = search

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Do nothing: the launcher inside is set up already."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Raises nothing for a trial that fails: its result does, when it is asked for."""
        setup_globals()
        search = self.search
        proposed = [Trial(list(words)) for words in job_overrides]
        todo: list[Trial] = []
        for index, trial in enumerate(proposed, start=initial_job_idx):
            search.trials.append(trial)
            search.say_proposed(trial)
            self._look_at(trial, index)
            if trial.state == "new" and all(trial.path != other.path for other in todo):
                todo.append(trial)
        jobs = [Job(number, trial.words) for number, trial in enumerate(todo, start=initial_job_idx)]
        outcomes = Runner(self.launcher, search.config, monitor=lambda: self._overview(jobs, todo)).run(jobs)
        for trial, outcome in zip(todo, outcomes, strict=True):
            self._take(trial, outcome)
        for trial in proposed:
            self._repeat(trial)
            search.say_ended(trial)
        search.write()
        return [result_of(trial) for trial in proposed]

    def _look_at(self, trial: Trial, index: int) -> None:
        """Find the folder of a trial, and its objective where the run is finished."""
        from vae_cli.config.build import check_config
        from vae_cli.runs.plan import plan

        try:
            with composed(self.hydra_context, self.search.config, trial.words, index) as config:
                path, plain = named_folder(config), to_plain(config)
                check_config(plain)
                trial.path, trial.epochs = path, plain["epochs"]
                if self._repeat(trial):
                    return
                if plan(RunDir(path), plain) == "finished":
                    self._leave_alone(trial, plain["epochs"])
        except Exception as error:  # a proposal that cannot be a run is one that failed; a mistake of ours is none
            if translate(error, trial.words) is None:
                raise
            mark_failed(trial, error)

    def _repeat(self, trial: Trial) -> bool:
        """Take over the result of an earlier trial that was the same run."""
        for other in self.search.trials:
            if other is not trial and trial.state == "new" and other.path == trial.path and other.state != "new":
                trial.state = "left alone" if other.state == "finished" else other.state
                trial.value, trial.error, trial.note, trial.same_as = other.value, other.error, other.note, other
                return True
        return False

    def _leave_alone(self, trial: Trial, epochs: int | None = None) -> None:
        assert trial.path is not None
        summary = RunDir(trial.path).summary()
        trial.state, trial.value = "left alone", figure(summary, self.search.objective)
        if epochs is not None and summary["epoch"] != epochs:
            trial.note = f", {summary['epoch']} epochs"
        self._check_value(trial)

    def _overview(self, jobs: Sequence[Job], trials: Sequence[Trial]) -> SweepProgress:
        """The bars of trials that are trained side by side; what became of them is said as of all others."""
        from rich.console import Console

        from vae_cli.sweeps.progress import SweepProgress

        runs = {job.number: (trial.path, trial.epochs) for job, trial in zip(jobs, trials, strict=True) if trial.path}
        return SweepProgress(runs, Console(stderr=True), Console(quiet=True))

    def _take(self, trial: Trial, outcome: Outcome) -> None:
        try:
            if isinstance(outcome, Exception):
                raise outcome
            trial.state, trial.value = "finished", outcome.return_value
            if trial.value is None and trial.path is not None:  # its launcher lost what it returned
                trial.value = figure(RunDir(trial.path).summary(), self.search.objective)
        except UserError as error:
            if error.exit_code == 0:  # another process has finished it meanwhile
                self._leave_alone(trial)
            else:
                mark_failed(trial, error)
        except Exception as error:  # whatever the job raised: it is reported with its trial
            mark_failed(trial, error)
        else:
            self._check_value(trial)

    def _check_value(self, trial: Trial) -> None:
        if trial.value is None:
            mark_failed(trial, UserError(f"the run is finished, and has no {self.search.objective}"))
