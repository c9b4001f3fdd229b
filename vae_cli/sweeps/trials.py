"""The trials of a search, and the table of them."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Literal

from hydra.core.utils import JobReturn, JobStatus

from vae_cli.config.messages import translate
from vae_cli.core.errors import explain
from vae_cli.core.files import write_text
from vae_cli.core.wording import relative


@dataclass
class Trial:
    """A run that the sweeper has proposed, and its outcome.

    path is None if the proposal cannot be a run; value is the objective; `skipped` means that the run was finished
    before; same_as is an earlier trial of the same run.
    """

    words: list[str]
    path: Path | None = None
    epochs: int = 0
    state: Literal["new", "finished", "skipped", "failed"] = "new"
    value: float | None = None
    error: Exception | None = None
    note: str = ""
    same_as: Trial | None = None

    def fail(self, error: Exception) -> None:
        """Record that the trial has failed, and why."""
        self.state, self.value, self.error = "failed", None, translate(error, self.words) or error

    def repeat(self, other: Trial) -> None:
        """Record that an earlier trial was the same run, with its outcome."""
        self.state = "skipped" if other.state == "finished" else other.state
        self.value, self.error, self.note, self.same_as = other.value, other.error, other.note, other

    def result(self) -> JobReturn:
        """Return what the sweeper gets: the value, or an error that is raised when the value is read."""
        is_failed = self.value is None
        result = JobReturn(overrides=self.words, status=JobStatus.FAILED if is_failed else JobStatus.COMPLETED)
        result.return_value = self.error if is_failed else self.value
        return result

    def reason(self) -> str:
        """Why the trial has failed, on one line."""
        return " ".join(explain(self.error)[0].split()) if self.error is not None else ""

    def values(self) -> dict[str, str]:
        """The value of each setting that the trial gives."""
        return {key: value for key, _, value in (word.partition("=") for word in self.words)}


@dataclass
class Trials:
    """All trials of a search in the order of their proposal, and what they are compared by.

    searched has the keys of the axes with more than one value.
    """

    objective: str = ""
    is_maximized: bool = False
    searched: Sequence[str] = ()
    trials: list[Trial] = field(default_factory=list)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)

    def __len__(self) -> int:
        return len(self.trials)

    def number(self, trial: Trial) -> int:
        """The number of a trial, counted from 1."""
        return self.trials.index(trial) + 1

    def best(self) -> Trial | None:
        """The trial with the best objective so far; the earliest of several."""
        done = [trial for trial in self.trials if trial.value is not None]
        return min(done, key=self._cost) if done else None

    def ranked(self) -> list[Trial]:
        """The trials from the best to the worst, failed ones last; of several trials of the same run only one."""
        once: dict[str, Trial] = {}
        for trial in self.trials:
            once.setdefault(str(trial.path or trial.words), trial)
        return sorted(once.values(), key=self._cost)

    def _cost(self, trial: Trial) -> float:
        if trial.value is None:
            return math.inf
        return -trial.value if self.is_maximized else trial.value

    def spell(self, trial: Trial) -> str:
        """The searched settings of a trial as they are typed, with numbers shortened to four digits."""
        values = trial.values()
        keys = self.searched or list(values)
        return " ".join(f"{key}={shortened(values.get(key, ''))}" for key in keys) or "(the defaults)"

    def header(self) -> list[str]:
        """The names of the columns."""
        return ["", "trial", self.objective, *self.searched, "state", "run"]

    def row(self, trial: Trial) -> list[str]:
        """The cells of a trial, one for each column."""
        values = trial.values()
        return [
            "best" if trial is self.best() else "",
            str(self.number(trial)),
            "" if trial.value is None else repr(trial.value),
            *(values.get(key, "") for key in self.searched),
            f"{trial.state}{trial.note}",
            "" if trial.path is None else str(relative(trial.path)),
        ]

    def write(self, folder: Path) -> None:
        """Write the table as trials.csv."""
        folder.mkdir(parents=True, exist_ok=True)  # the launcher makes no folder if every run was finished before
        text = StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header(), *map(self.row, self.ranked())])
        write_text(folder / "trials.csv", text.getvalue())

    def print(self) -> None:
        """Print the table; if the output is a pipe, without lines and at full width."""
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        console = Console()
        table = Table(box=None if not console.is_terminal else Table().box)
        for name in self.header():
            table.add_column(escape(name), overflow="fold", justify="left" if name in ("", "state", "run") else "right")
        for trial in self.ranked():
            cells = self.row(trial)
            style = "bold" if cells[0] else "red" if trial.state == "failed" else ""
            table.add_row(*(escape(shortened(cell)) for cell in cells[:-1]), escape(cells[-1]), style=style)
        if not console.is_terminal:
            console.width = 10_000  # so that no name is broken
        console.print(table)


def shortened(value: str) -> str:
    """Round a number with a fraction to four digits; return any other word unchanged.

    >>> [shortened(value) for value in ("0.123456", "1e-05", "64", "fixed", "1.2.3")]
    ['0.1235', '1e-05', '64', 'fixed', '1.2.3']
    """
    try:
        return f"{float(value):.4g}" if "." in value or "e" in value else value
    except ValueError:
        return value
