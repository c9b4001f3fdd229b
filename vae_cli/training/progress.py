"""Print warnings and the progress of training: a bar on a terminal, otherwise lines for some of the epochs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SHOWN = ("loss", "distortion", "rate", "penalty")
NARROW = ("loss", "rate")  # these fit into 80 columns
WIDE = 120  # columns


def is_milestone(epoch: int, epochs: int) -> bool:
    """Return whether an epoch is a milestone, with pictures and a printed line: 1, 2, ... 9, 10, 20, ... 90, 100, 200,
    ..., and the last epoch."""
    return epoch % 10 ** (len(str(epoch)) - 1) == 0 or epoch == epochs


class Progress:
    """Shows the progress of one run, and prints each warning once."""

    def __init__(
        self, console: Console, epochs: int, steps: int, images: int, warnings: list[str], prints_epochs: bool = True
    ) -> None:
        self.console = console
        self.prints_epochs = prints_epochs
        self.epochs, self.steps, self.images = epochs, steps, images
        self.warnings = list(warnings)
        self._bar = RichProgress(
            TextColumn("[bold]epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=30 if console.width >= WIDE else 8),
            MofNCompleteColumn(),
            TextColumn("[cyan]{task.fields[rate]}"),
            TextColumn("{task.fields[terms]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._began = (0, 0.0)

    def start(self, step: int) -> None:
        """Start the progress bar at a step."""
        fields: dict[str, Any] = {"epoch": step // self.steps, "epochs": self.epochs, "rate": "", "terms": ""}
        self._task = self._bar.add_task("", total=self.epochs * self.steps, completed=step, **fields)
        self._began = (step, time.perf_counter())

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, step: int, means: Mapping[str, float]) -> None:
        """Move the bar to a step, and show the speed and the means of the loss terms next to it."""
        if self._task is not None and self.console.is_terminal:
            first, then = self._began
            speed = (step - first) * self.images / self.steps / max(time.perf_counter() - then, 1e-9)
            shown = SHOWN if self.console.width >= WIDE else NARROW
            terms = " ".join(f"{name} {means[name]:.1f}" for name in shown if name in means)
            epoch = min(self.epochs, (step - 1) // self.steps + 1)
            rate = f"{speed:,.0f} images/s"
            self._bar.update(self._task, completed=step, epoch=epoch, rate=rate, terms=terms)

    def epoch(self, epoch: int, record: Mapping[str, float], measured: Mapping[str, float]) -> None:
        """Print a line if there is no bar and the epoch is a milestone; warn if sigma or the posterior has collapsed.

        `record` contains the loss terms to print; `measured` contains the posterior statistics for the warnings.
        """
        if self.prints_epochs and not self.console.is_terminal and is_milestone(epoch, self.epochs):
            split = "validation" if "validation/loss" in record else "train"
            terms = "  ".join(f"{n} {record[f'{split}/{n}']:.2f}" for n in SHOWN if f"{split}/{n}" in record)
            self.console.print(f"epoch {epoch}/{self.epochs}  {split}: {terms}", soft_wrap=True, highlight=False)
        if measured.get("collapsed", 0.0) > 0.5:
            self.warn(
                "sigma has collapsed: in most latent dimensions it is below 1 % of the standard deviation of loc, so "
                "the noise no longer limits the information in the code."
            )
        if measured.get("active_units") == 0 and epoch >= min(5, self.epochs):
            self.warn(
                "no latent dimension is active: the decoder ignores the code (posterior collapse). "
                "Try a smaller regularizer.beta, or a warm-up: +schedule@regularizer.beta=linear"
            )

    def end(self, epoch: int, patience: int) -> None:
        """Say that training ends after this epoch, since the validation loss has not fallen for `patience` epochs."""
        self.epochs = epoch
        if self._task is not None:
            self._bar.update(self._task, total=epoch * self.steps, epochs=epoch)
        if self.prints_epochs:
            self.console.print(
                f"ending after epoch {epoch}: the validation loss has not fallen for {patience} "
                f"epoch{'s' * (patience > 1)} (patience={patience})",
                soft_wrap=True, highlight=False,
            )  # fmt: skip

    def warn(self, text: str) -> None:
        """Print a warning, unless the run has printed it before."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.console.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=not self.console.is_terminal)
