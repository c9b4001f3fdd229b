"""A table of runs for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from vae_cli.core.errors import Failure, visible
from vae_cli.runs.folder import RunDir

COLORS = {"finished": "green", "running": "cyan", "interrupted": "yellow", "failed": "red", "damaged": "red"}


def print_runs(runs: Sequence[Path], above: Path = Path()) -> None:
    """Print a row for each run: its path relative to `above`, status, epochs, test distortion, rate and ELBO in nats
    per image, and training time in seconds.

    This is not a rich.Table, which takes seconds to lay out a thousand runs. The terminal wraps long lines.
    """
    rows = [["run", "status", "epochs", "distortion", "rate", "elbo", "seconds"]]
    for path in runs:
        shown = path.relative_to(above) if path.is_relative_to(above) else path
        rows.append(_row(RunDir(path), _one_line(shown.as_posix())))
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    table = Text()
    for name, status, *figures in rows:
        table.append(set_cell_size(name, widths[0]) + "  ").append(status.ljust(widths[1]), COLORS.get(status, ""))
        cells = (figure.rjust(width) for figure, width in zip(figures, widths[2:], strict=True))
        table.append("".join(f"  {cell}" for cell in cells) + "\n")
    table.stylize("bold", 0, table.plain.index("\n"))
    Console().print(table, soft_wrap=True, end="")


def _row(run: RunDir, name: str) -> list[str]:
    try:
        summary = run.summary()
        status = run.status(summary)
        records = run.metrics()
    except (Failure, OSError):  # an unreadable folder must not hide the other runs
        return [name, "damaged", *[""] * 5]
    figures = summary.get("test", {})
    epoch = records[-1]["epoch"] if records else 0
    numbers = [f"{figures[key]:.2f}" if key in figures else "" for key in ("distortion", "rate", "elbo")]
    seconds = summary.get("seconds", records[-1]["seconds"] if records else None)
    epochs = _one_line(str(summary.get("config", {}).get("epochs", "?")))
    done = f"{epoch}" if status == "finished" else f"{epoch}/{epochs}"
    return [name, status, done, *numbers, "" if seconds is None else f"{seconds:.1f}"]


def _one_line(text: str) -> str:
    return visible(text).replace("\n", "\\n")
