"""What a person sees of runs that other processes train: a bar for the sweep and one for each run that is under way."""

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

BARS = 12  # runs that get a bar of their own
TAIL = 4096  # bytes at the end of metrics.jsonl, in which its last record is found


@dataclass
class Course:
    """How a run goes on: since when it is watched, and how far it has come."""

    run: RunDir
    stamp: int | None  # of summary.json before the sweep began
    epochs: int
    state: State = "waiting"
    done: float = 0.0  # share of its epochs
    begun_at: float = 0.0  # the same before the sweep began


class SweepProgress:
    """The runs of a sweep, by the numbers of their jobs, looked at through what they write into their folders.

    On a terminal there are bars; elsewhere, a line for each run that has ended.
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
            course.done = course.begun_at = _share_done(course)

    def state(self, job: int) -> State:
        """How far a run has come: `waiting` as long as it has not been touched."""
        course = self._courses[job]
        if course.state not in ("finished", "failed"):
            self._read(course)
        return course.state

    def look(self) -> None:
        """Look at all runs, and say which have ended."""
        for job, course in self._courses.items():
            before = course.state
            if before not in ("finished", "failed") and self.state(job) in ("finished", "failed"):
                self._say(course)
        self._draw()

    def stop(self, is_left: bool) -> None:
        """Ask the runs that are under way on this machine to save and to stop, unless they are left to a queue."""
        self.close()
        if is_left:
            print(f"\nleft: {self}; the jobs stay in the queue (squeue shows them, scancel ends them)", file=sys.stderr)
            return
        print(f"\nstopping: {self}", file=sys.stderr)
        for course in self._courses.values():
            self._read(course)
            if course.state == "running":
                with suppress(Failure, OSError, TypeError):
                    summary = course.run.summary()
                    if summary.get("host") == socket.gethostname():
                        os.kill(summary["pid"], signal.SIGTERM)

    def close(self) -> None:
        """Take the bars away."""
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

    def _say(self, course: Course) -> None:
        ended = sum(course.state in ("finished", "failed") for course in self._courses.values())
        left = "" if ended == len(self._courses) else f", {time_left(self._seconds_left())}"
        try:
            summary = course.run.summary()
        except Failure as error:
            summary = {"status": "failed", "error": str(error)}
        path = relative(course.run.path)
        said = (
            summary_line(path, summary) if course.state == "finished" else f"failed: {path}: {summary.get('error', '')}"
        )
        said = "\n".join([said, *(f"  warning: {text}" for text in summary.get("warnings", []))])
        # Beside a bar the lines go where the bar is, unless they are kept in a file.
        is_seen = self._bar is not None and self._lines.is_terminal
        console = self._console if is_seen else self._lines
        console.print(f"{ended} of {len(self._courses)}{left}: {said}", soft_wrap=True, highlight=False, markup=False)

    def _seconds_left(self) -> float | None:
        work = sum(1 - course.begun_at for course in self._courses.values())
        left = sum(1 - course.done for course in self._courses.values())
        gone = time.monotonic() - self._began
        return gone * left / (work - left) if work - left > 1e-3 else None

    def _draw(self) -> None:
        if not self._console.is_terminal:
            return
        if self._bar is None:
            self._bar = Progress(
                BarColumn(bar_width=20), TextColumn("{task.description}"), console=self._console, redirect_stdout=False
            )
            self._tasks = {-1: self._bar.add_task("", total=len(self._courses))}
            self._bar.start()
        ended = sum(course.state in ("finished", "failed") for course in self._courses.values())
        said = [f"{ended} of {len(self._courses)} runs", str(self), time_left(self._seconds_left())]
        done = sum(course.done for course in self._courses.values())
        self._bar.update(self._tasks[-1], completed=done, description=", ".join(word for word in said if word))
        running = [job for job, course in self._courses.items() if course.state == "running"][:BARS]
        for job in [job for job in self._tasks if job >= 0 and job not in running]:
            self._bar.remove_task(self._tasks.pop(job))
        for job in running:
            course = self._courses[job]
            if job not in self._tasks:
                self._tasks[job] = self._bar.add_task("", total=1.0)
            epoch = f"epoch {round(course.done * course.epochs)}/{course.epochs}"
            said_of_run = f"{epoch}  {escape(relative(course.run.path).as_posix())}"
            self._bar.update(self._tasks[job], completed=course.done, description=said_of_run)


def _stamp(run: RunDir) -> int | None:
    with suppress(FileNotFoundError):
        return run.summary_file.stat().st_mtime_ns
    return None


def _share_done(course: Course) -> float:
    """The share of its epochs that a run has on record."""
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
