"""The progress of a sweep whose runs train in other processes: a bar for the sweep, and one for each running job."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from vae_cli.core.errors import Failure
from vae_cli.core.wording import relative, time_left
from vae_cli.runs.folder import RunDir
from vae_cli.sweeps.runner import State
from vae_cli.training.summary import summary_line

BARS = 12  # maximum number of runs that are shown with their own bar
TAIL = 4096  # bytes to read from the end of metrics.jsonl, enough for its last record
ENDED = ("finished", "failed")


@dataclass
class Course:
    """The progress of one run.

    stamp is the modification time of summary.json in ns at the start of the sweep, or None if the file did not exist.
    done is the fraction of the run's epochs completed so far (1 once the run has ended); done_before is its value at
    the start of the sweep.
    """

    run: RunDir
    stamp: int | None
    epochs: int
    state: State = "waiting"
    done: float = 0.0
    done_before: float = 0.0

    @property
    def has_ended(self) -> bool:
        """Whether the run is finished or has failed."""
        return self.state in ENDED


class SweepProgress:
    """A monitor that follows the runs of a sweep through the files in their folders.

    Runs are identified by job number. The monitor prints one line for each run that ends; on a terminal it also shows
    bars.
    """

    def __init__(self, runs: Mapping[int, tuple[Path, int]], console: Console, lines: Console) -> None:
        self._courses = {
            job: Course(RunDir(path), _stamp(RunDir(path)), epochs) for job, (path, epochs) in runs.items()
        }
        self._console, self._lines = console, lines
        self._began = time.monotonic()
        self._bar: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        for course in self._courses.values():
            course.done = course.done_before = _share_done(course)

    def state(self, job: int) -> State:
        """Return the state of a job's run, which is `waiting` until the job writes the run's summary.json."""
        course = self._courses[job]
        if not course.has_ended:
            self._read(course)
        return course.state

    def look(self) -> None:
        """Read the states of all runs, report those that have ended since the last call, and update the bars."""
        for job, course in self._courses.items():
            if not course.has_ended and self.state(job) in ENDED:
                self._report(course)
        self._draw()

    def stop(self, is_queued: bool) -> None:
        """If is_queued, leave the jobs in Slurm's queue; otherwise, ask the runs on this machine to save and stop."""
        self.close()
        if is_queued:
            print(
                f"\nno longer watching the sweep: {self}; the jobs stay in Slurm's queue "
                "(squeue lists them, scancel ends them)",
                file=sys.stderr,
            )
            return
        print(f"\nstopping: {self}", file=sys.stderr)
        for course in self._courses.values():
            self._read(course)
            if course.state == "running":
                with suppress(Failure, OSError, TypeError):
                    summary = course.run.summary()
                    # A run that another sweep trains is not ours to stop.
                    if (summary.get("host"), summary.get("sweep_pid")) == (socket.gethostname(), os.getpid()):
                        os.kill(summary["pid"], signal.SIGTERM)

    def close(self) -> None:
        """Remove the bars."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __str__(self) -> str:
        count = dict.fromkeys(("running", "interrupted", "failed", "waiting"), 0)
        for course in self._courses.values():
            if course.state in count:
                count[course.state] += 1
        return ", ".join(f"{number} {state}" for state, number in count.items() if number)

    def _read(self, course: Course) -> None:
        """Update the state of a run if its summary.json was written since the sweep began."""
        stamp = _stamp(course.run)
        if stamp == course.stamp:
            return
        try:
            summary = course.run.summary()
        except Failure:
            return
        status = summary.get("status")
        if status in ("running", "interrupted", "failed", "finished"):
            course.state = status
        course.done = 1.0 if status in ("finished", "failed") else _share_done(course)

    def _report(self, course: Course) -> None:
        """Print the results of a finished run or the error of a failed one, followed by its warnings."""
        ended = self._count_ended()
        left = "" if ended == len(self._courses) else f", {time_left(self._seconds_left())}"
        try:
            summary = course.run.summary()
        except Failure as error:
            summary = {"status": "failed", "error": str(error)}
        path = relative(course.run.path)
        text = (
            summary_line(path, summary) if course.state == "finished" else f"failed: {path}: {summary.get('error', '')}"
        )
        text = "\n".join([text, *(f"  warning: {warning}" for warning in summary.get("warnings", []))])
        # If bars are shown, print the line above them on the same console, unless stdout is redirected to a file.
        is_above_bars = self._bar is not None and self._lines.is_terminal
        console = self._console if is_above_bars else self._lines
        console.print(f"{ended} of {len(self._courses)}{left}: {text}", soft_wrap=True, highlight=False, markup=False)

    def _count_ended(self) -> int:
        return sum(course.has_ended for course in self._courses.values())

    def _seconds_left(self) -> float | None:
        """Estimate the seconds left from the progress since the sweep began; None if there is no progress yet."""
        work = sum(1 - course.done_before for course in self._courses.values())
        left = sum(1 - course.done for course in self._courses.values())
        elapsed = time.monotonic() - self._began
        return elapsed * left / (work - left) if work - left > 1e-3 else None

    def _draw(self) -> None:
        """Update the bars if the console is a terminal."""
        if not self._console.is_terminal:
            return
        if self._bar is None:
            self._bar = Progress(
                BarColumn(bar_width=20), TextColumn("{task.description}"), console=self._console, redirect_stdout=False
            )
            self._tasks = {-1: self._bar.add_task("", total=len(self._courses))}
            self._bar.start()
        parts = [f"{self._count_ended()} of {len(self._courses)} runs", str(self), time_left(self._seconds_left())]
        done = sum(course.done for course in self._courses.values())
        self._bar.update(self._tasks[-1], completed=done, description=", ".join(filter(None, parts)))
        running = [job for job, course in self._courses.items() if course.state == "running"][:BARS]
        for job in [job for job in self._tasks if job >= 0 and job not in running]:
            self._bar.remove_task(self._tasks.pop(job))
        for job in running:
            course = self._courses[job]
            if job not in self._tasks:
                self._tasks[job] = self._bar.add_task("", total=1.0)
            epoch = f"epoch {round(course.done * course.epochs)}/{course.epochs}"
            description = f"{epoch}  {escape(relative(course.run.path).as_posix())}"
            self._bar.update(self._tasks[job], completed=course.done, description=description)


def _stamp(run: RunDir) -> int | None:
    """Return the modification time in ns of a run's summary.json, or None if the file does not exist."""
    with suppress(FileNotFoundError):
        return run.summary_file.stat().st_mtime_ns
    return None


def _share_done(course: Course) -> float:
    """Return the fraction of a run's epochs that have been completed, according to the last record of metrics.jsonl."""
    try:
        with course.run.metrics_file.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines: Sequence[bytes] = file.read().splitlines()
    except OSError:
        return 0.0
    for line in reversed(lines):
        with suppress(ValueError, TypeError, KeyError):
            record: dict[str, Any] = json.loads(line)
            return min(1.0, record["epoch"] / course.epochs)
    return 0.0
