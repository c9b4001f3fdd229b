"""The text that a sweep prints: the number of jobs, the progress, the table of runs and the next commands."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from omegaconf import DictConfig

from vae_cli.config.compose import named_folder, to_plain
from vae_cli.config.trust import in_shell
from vae_cli.core.errors import UserError, visible
from vae_cli.core.wording import relative, time_left
from vae_cli.runs.find import finished_runs, write_sweep
from vae_cli.sweeps.runner import spell

if TYPE_CHECKING:
    from vae_cli.runs.plan import Plan
    from vae_cli.sweeps.progress import SweepProgress

WORDS: dict[Plan | Literal["elsewhere"], str] = {
    "finished": "finished (skipped)",
    "elsewhere": "running in another process (skipped)",
    "put_back": "finished (to put back, since the run that was to replace it was killed)",
    "resume": "to resume",
    "new": "to run",
}


class ConsoleReporter:
    """Checks the jobs of a sweep before the first one starts, and reports the sweep on the terminal.

    lists_only  no job is started: `begin` lists the jobs
    is_single   several jobs are refused, since the command has no -m
    """

    def __init__(self, lists_only: bool = False) -> None:
        self.lists_only = lists_only
        self.is_single = False
        self._words: dict[Path, list[str]] = {}  # the overrides of each job
        self._plans: dict[Path, Plan | Literal["elsewhere"]] = {}
        self._longer: dict[Path, int] = {}  # epochs of finished runs that were trained for longer than this sweep asks
        self._epochs = 0
        self._on_other_images: list[Path] = []  # runs whose images have changed since they were trained
        self._to_do: dict[int, tuple[Path, int]] = {}  # run folder and number of epochs of each job, by job number
        self._folder: Path | None = None  # folder of the sweep itself
        self._started_at = 0.0

    def check(self, config: DictConfig) -> bool:
        """Check one job without loading its data, and return whether its run needs training. Raises UserError."""
        from vae_cli.config.build import check_config
        from vae_cli.runs.folder import RunDir
        from vae_cli.runs.plan import InTraining, has_other_images, plan

        path, plain = named_folder(config), to_plain(config)
        check_config(plain)
        if path in self._plans:
            raise UserError(
                f"two jobs of this sweep would train the same run, {path}: they have the same run_name, or they differ "
                "at most in settings that do not define a run, such as epochs or device. "
                "Remove one of the two jobs, or leave out run_name."
            )
        if self.is_single and self._plans:
            raise UserError("several values were given: type -m to sweep over them, or give one value.")
        self._words[path] = list(config.hydra.overrides.task)
        try:
            self._plans[path] = plan(RunDir(path), plain)
        except InTraining:  # for example, a worker process that outlived an earlier sweep
            self._plans[path] = "elsewhere"
        if self._plans[path] in ("finished", "resume") and has_other_images(RunDir(path), plain):
            self._on_other_images.append(path)
        if self._plans[path] == "finished":
            epochs = int(RunDir(path).summary().get("epoch", 0))
            if epochs > plain["epochs"]:
                self._longer[path], self._epochs = epochs, plain["epochs"]
        if self._plans[path] in ("finished", "elsewhere"):
            return False
        self._to_do[config.hydra.job.num] = (path, plain["epochs"])
        self._folder = Path(config.hydra.sweep.dir)
        return True

    def begin(self) -> None:
        """Print how many jobs will run, resume or be skipped; list them, or write the list to the sweep's folder."""
        count = Counter(self._plans.values())
        parts = [f"{count[plan]} {words}" for plan, words in WORDS.items() if count[plan]]
        print(f"{len(self._plans)} job{'s' * (len(self._plans) > 1)}: {', '.join(parts)}", flush=True)
        if self._longer:
            trained = " and ".join(map(str, sorted({*self._longer.values()})))
            print(
                f"warning: {len(self._longer)} of the finished runs were trained for {trained} epochs, not "
                f"{self._epochs}. For runs of equal length, type epochs={max(self._longer.values())}, "
                "runs_dir=FOLDER (a new folder), or overwrite=true.",
                flush=True,
            )
        if self._on_other_images:
            print(
                f"warning: {len(self._on_other_images)} of the runs were trained before files of the images changed. "
                "If pixels have changed, these runs cannot be resumed or compared with new ones. To train all runs on "
                "the images as they are now, type runs_dir=FOLDER (a new folder), or overwrite=true.",
                flush=True,
            )
        self._started_at = time.monotonic()
        if self.lists_only:
            self._print_jobs()
        elif self._folder is not None:
            write_sweep(self._folder, self._plans)

    def _print_jobs(self) -> None:
        """Print what would happen to each run, its folder, and the overrides of its job."""
        rows = [(WORDS[plan], str(relative(path)), spell(self._words[path])) for path, plan in self._plans.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print(visible("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()))

    def start(self, number: int, count: int, failed: int, words: Sequence[str]) -> None:
        """Print that job `number` of `count` starts, how many have failed so far, and an estimate of the time left.

        The estimate assumes that all jobs take the same time.
        """
        parts = [f"{number} of {count}", *([f"{failed} failed"] if failed else [])]
        if number > 1:
            parts.append(time_left((time.monotonic() - self._started_at) / (number - 1) * (count - number + 1)))
        print(f"{', '.join(parts)}: {spell(words)}", flush=True)

    def monitor(self) -> SweepProgress:
        """Return a monitor for the jobs of the sweep, which run in parallel in other processes."""
        from rich.console import Console

        from vae_cli.sweeps.progress import SweepProgress

        return SweepProgress(self._to_do, Console(stderr=True), Console())

    def end(self) -> None:
        """Print the runs of the sweep as a table, and the commands to type next."""
        from vae_cli.runs.table import print_runs

        paths = [relative(path) for path in self._plans]
        print_runs(paths)
        if len(finished_runs(paths)) > 1:
            print(f"next:\n  vae compare {in_shell(os.path.commonpath([path.parent for path in paths]))}")
            if self._folder is not None:
                print(f"  vae compare {in_shell(relative(self._folder))}  # only the runs of this sweep")
