"""A table of runs for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from vae_cli.config.naming import flatten, typed
from vae_cli.core.errors import Failure, UserError, nearest, visible
from vae_cli.runs.find import last_written
from vae_cli.runs.folder import RunDir

COLORS = {"finished": "green", "running": "cyan", "interrupted": "yellow", "failed": "red", "damaged": "red"}
FIGURES = ("distortion", "rate", "elbo")  # of the test images
COLUMNS = ("run", "status", "epochs", *FIGURES, "seconds")


@dataclass(frozen=True)
class Row:
    """What the table shows of a run. If the run is damaged, it has no settings and no figures."""

    name: str
    status: str = "damaged"
    epochs: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)  # FIGURES, epochs and seconds
    settings: Mapping[str, str] = field(default_factory=lambda: {"status": "damaged"})  # as they are typed
    written: float = 0.0

    def cells(self) -> list[str]:
        """Return the text of each column."""
        digits = {**dict.fromkeys(FIGURES, 2), "seconds": 1}
        numbers = [_cell(self.figures[key], digits[key]) if key in self.figures else "" for key in digits]
        return [self.name, self.status, self.epochs, *numbers]


def print_runs(
    runs: Sequence[Path], above: Path = Path(), sort: str = "run", reverse: bool = False, where: Sequence[str] = ()
) -> None:
    """Print a row for each run: its path relative to `above`, status, epochs, test distortion, rate and ELBO in nats
    per image, and training time in seconds.

    `sort` is a column or newest: elbo puts the highest first and newest the latest; all others are ascending. Runs
    without the value come last. `where` selects runs by their settings, each KEY=VALUE, or by status=STATUS. Raises
    UserError if a condition is malformed or no run meets all of them.
    """
    rows = [row_of(RunDir(path), path.relative_to(above) if path.is_relative_to(above) else path) for path in runs]
    if where:
        rows = _matching(rows, where)
    rows.sort(key=lambda row: _rank(row, sort), reverse=reverse)
    if sort in (*FIGURES, "epochs", "seconds"):
        rows.sort(key=lambda row: sort not in row.figures)
    console = Console()
    table = [list(COLUMNS), *(row.cells() for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
    is_wide = console.is_terminal and sum(widths) + 2 * (len(widths) - 1) > console.width
    text = _stacked(table) if is_wide else _aligned(table, widths)
    console.print(text, soft_wrap=True, end="")


def _cell(number: float, digits: int) -> str:
    return f"{number:.{digits}f}" if abs(number) < 1e9 else f"{number:.3g}"


def _aligned(table: Sequence[Sequence[str]], widths: Sequence[int]) -> Text:
    """Lay out one line for each run. This is not a rich.Table, which takes seconds to lay out a thousand runs."""
    text = Text()
    for name, status, *figures in table:
        text.append(set_cell_size(name, widths[0]) + "  ").append(status.ljust(widths[1]), COLORS.get(status, ""))
        cells = (figure.rjust(width) for figure, width in zip(figures, widths[2:], strict=True))
        text.append("".join(f"  {cell}" for cell in cells) + "\n")
    text.stylize("bold", 0, text.plain.index("\n"))
    return text


def _stacked(table: Sequence[Sequence[str]]) -> Text:
    """Lay out two lines for each run, its name above its figures, for a terminal that is too narrow for one."""
    (_, _, *titles), *rows = table
    text = Text()
    for name, status, *figures in rows:
        text.append(name, "bold").append("\n  ").append(status, COLORS.get(status, ""))
        for title, figure in zip(titles, figures, strict=True):
            if figure:
                text.append(f"  {title} {figure}")
        text.append("\n")
    return text


def row_of(run: RunDir, shown: Path) -> Row:
    """Read the row of a run. An unreadable folder is a damaged run, so that it does not hide the others."""
    name = _one_line(shown.as_posix())
    try:
        summary = run.summary()
        status = run.status(summary)
        records = run.metrics()
    except (Failure, OSError):
        return Row(name)
    test, config = summary.get("test", {}), summary.get("config", {})
    epoch = records[-1]["epoch"] if records else 0
    figures = {key: float(test[key]) for key in FIGURES if key in test} | {"epochs": float(epoch)}
    seconds = summary.get("seconds", records[-1]["seconds"] if records else None)
    if seconds is not None:
        figures["seconds"] = seconds
    settings = {key: typed(value) for key, value in flatten(config).items() if key.partition(".")[0] != "choices"}
    if isinstance(choices := config.get("choices"), dict):
        settings |= {str(axis): str(choice) for axis, choice in choices.items()}
    epochs = f"{epoch}" if status == "finished" else f"{epoch}/{_one_line(settings.get('epochs', '?'))}"
    return Row(name, status, epochs, figures, {**settings, "status": status}, last_written(run.path))


def _matching(rows: Sequence[Row], conditions: Sequence[str]) -> list[Row]:
    """Return the rows that meet all conditions. Raises UserError if a condition is malformed or no row is left."""
    for condition in conditions:
        key, equals, value = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition}: give a setting and its value, for example --where sigma=fixed.")
        values = sorted({row.settings[key] for row in rows if key in row.settings})
        if not values:
            known = sorted({name for row in rows for name in row.settings})
            raise UserError(f"--where {condition}: no run has a setting '{key}'.{nearest(key, known)}")
        if not any(_is_same(there, value) for there in values):
            near = nearest(value, values)
            raise UserError(
                f"--where {condition}: no run has this value.{near} Values of {key}: {', '.join(values[:12])}."
            )
    asked = [condition.partition("=")[::2] for condition in conditions]
    found = [row for row in rows if all(_is_same(row.settings.get(key), value) for key, value in asked)]
    if not found:
        raise UserError(f"No run has all of these settings: {', '.join(conditions)}.")
    return found


def _is_same(there: str | None, given: str) -> bool:
    """Return whether two values are the same as they are typed, or the same number: 1, 1.0 and 1e0."""
    if there is None or there == given or there.replace(" ", "") == given.replace(" ", ""):
        return there is not None
    try:
        return float(there) == float(given)
    except ValueError:
        return False


def _rank(row: Row, sort: str) -> tuple[Any, ...]:
    if sort in ("run", "status"):
        return (row.name,) if sort == "run" else (row.status, row.name)
    if sort == "newest":
        return (-row.written, row.name)
    value = row.figures.get(sort, 0.0)
    return (-value if sort == "elbo" else value, row.name)


def _one_line(text: str) -> str:
    return visible(text).replace("\n", "\\n")
