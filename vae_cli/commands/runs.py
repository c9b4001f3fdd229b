"""`vae runs`: the runs below a folder as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vae_cli.errors import Failure, UserError, visible
from vae_cli.folder import RunDir, find_runs

COLORS = {"finished": "green", "running": "cyan", "interrupted": "yellow", "failed": "red"}


def main(folder: Path) -> None:
    """Print name, status, epochs, test distortion, rate and ELBO in nats per image, and seconds. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Train a run first: vae train sigma=fixed")
    runs = find_runs(folder)
    if not runs:
        raise UserError(f"There is no run below {folder}. Train one first: vae train sigma=fixed")
    show(runs, folder)


def show(runs: Sequence[Path], above: Path = Path()) -> None:
    """Print these runs as a table, with names that begin below a folder."""
    console = Console()
    table = Table(box=None if not console.is_terminal else Table().box)
    table.add_column("run", overflow="fold")
    table.add_column("status")
    for name in ("epochs", "distortion", "rate", "elbo", "seconds"):
        table.add_column(name, justify="right")
    for path in runs:
        shown = path.relative_to(above) if path.is_relative_to(above) else path
        table.add_row(*_row(RunDir(path), escape(visible(shown.as_posix()).replace("\n", "\\n"))))
    if not console.is_terminal:
        console.width = 10_000  # a pipe has no edge at which to break a name
    console.print(table)


def _row(run: RunDir, name: str) -> list[str]:
    try:
        summary = run.summary()
        status = run.status(summary)
    except (Failure, OSError):  # one folder that cannot be read does not hide the others
        return [name, "[red]damaged[/red]", *[""] * 5]
    figures = summary.get("test", {})
    records = run.metrics()
    epoch = records[-1]["epoch"] if records else 0
    numbers = [f"{figures[key]:.2f}" if key in figures else "" for key in ("distortion", "rate", "elbo")]
    seconds = summary.get("seconds", records[-1]["seconds"] if records else None)
    color = COLORS.get(status, "white")
    total = escape(str(summary.get("config", {}).get("epochs", "?")))
    done = f"{epoch}" if status == "finished" else f"{epoch}/{total}"
    return [name, f"[{color}]{status}[/{color}]", done, *numbers, "" if seconds is None else f"{seconds:.1f}"]
