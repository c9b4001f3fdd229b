"""The trials of a search, and their table."""

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

    path is the folder of the run, or None if the proposal is invalid; value is the value of the objective; the state
    `skipped` means that the run was already finished; note is appended to the state in the table; same_as is another
    trial of the same run, whose outcome this trial has copied.
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
        """Record that the trial has failed with this error."""
        self.state, self.value, self.error = "failed", None, translate(error, self.words) or error

    def repeat(self, other: Trial) -> None:
        """Copy the outcome of another trial of the same run."""
        self.state = "skipped" if other.state == "finished" else other.state
        self.value, self.error, self.note, self.same_as = other.value, other.error, other.note, other

    def result(self) -> JobReturn:
        """Return the result for the sweeper: the trial's value, or an error that is raised when the value is read."""
        is_failed = self.value is None
        result = JobReturn(overrides=self.words, status=JobStatus.FAILED if is_failed else JobStatus.COMPLETED)
        result.return_value = self.error if is_failed else self.value
        return result

    def reason(self) -> str:
        """Return the message of the trial's error on one line; empty if it has no error."""
        return " ".join(explain(self.error)[0].split()) if self.error is not None else ""

    def values(self) -> dict[str, str]:
        """Return the settings that the trial's overrides set, with their values."""
        return {key: value for key, _, value in (word.partition("=") for word in self.words)}


@dataclass
class Trials:
    """All trials of a search, in the order in which they were proposed, and the objective that ranks them.

    searched lists the keys of the axes with more than one value.
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
        """Return the number of a trial, counted from 1."""
        return self.trials.index(trial) + 1

    def best(self) -> Trial | None:
        """Return the trial with the best value so far, the earliest in case of a tie; None if no trial has a value."""
        done = [trial for trial in self.trials if trial.value is not None]
        return min(done, key=self._cost) if done else None

    def ranked(self) -> list[Trial]:
        """Return the first trial of each run, from the best to the worst; failed trials come last."""
        once: dict[str, Trial] = {}
        for trial in self.trials:
            once.setdefault(str(trial.path or trial.words), trial)
        return sorted(once.values(), key=self._cost)

    def _cost(self, trial: Trial) -> float:
        if trial.value is None:
            return math.inf
        return -trial.value if self.is_maximized else trial.value

    def spell(self, trial: Trial) -> str:
        """Return the searched settings of a trial as overrides, with numbers rounded to four significant digits."""
        values = trial.values()
        keys = self.searched or list(values)
        return " ".join(f"{key}={shortened(values.get(key, ''))}" for key in keys) or "(the defaults)"

    def header(self) -> list[str]:
        """Return the names of the table's columns."""
        return ["", "trial", self.objective, *self.searched, "state", "run"]

    def row(self, trial: Trial) -> list[str]:
        """Return the row of a trial in the table, one cell for each column."""
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
        """Write the table to trials.csv in a folder."""
        folder.mkdir(parents=True, exist_ok=True)  # the launcher creates no folder if every run was already finished
        text = StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header(), *map(self.row, self.ranked())])
        write_text(folder / "trials.csv", text.getvalue())

    def print(self) -> None:
        """Print the table; if the output is not a terminal, omit the frame and do not wrap cells."""
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
            console.width = 10_000  # so that no cell is wrapped
        console.print(table)


def shortened(value: str) -> str:
    """Round a number that has a decimal point or an exponent to four significant digits; return other text unchanged.

    >>> [shortened(value) for value in ("0.123456", "1e-05", "64", "fixed", "1.2.3")]
    ['0.1235', '1e-05', '64', 'fixed', '1.2.3']
    """
    try:
        return f"{float(value):.4g}" if "." in value or "e" in value else value
    except ValueError:
        return value
