"""The cache of `vae compare`: the printed output, stored next to the report, valid until a run or the program changes.

The cache contains only text. Anyone who can write to the folder can change it, so it is checked when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vae_cli.comparison.members import common_folder
from vae_cli.comparison.table import SummaryTable
from vae_cli.core.files import is_printable, read_text, write_json
from vae_cli.metrics.record import metrics_file
from vae_cli.runs.folder import RunDir

FORMAT = 2
NAME = ".kept.json"
FILES = ("compare.csv", "compare.json", "report.html")
INSIDE = ("figures/*", "tensorboard/*/*/*")
PROGRAM = ("*.py", "*.j2", "*.toml")


@dataclass(frozen=True)
class CachedReport:
    """The folder of a report, and the notes and the table that were printed when it was written."""

    folder: Path
    notes: list[str]
    table: SummaryTable


def stamp(runs: Sequence[Path], request: Mapping[str, Any]) -> str:
    """Return a digest that changes whenever `request`, the program or a file of a run changes. Files are compared by
    size, inode and times of modification and of change."""
    of_runs = [file for run in runs for file in _files(RunDir(run))]
    package = Path(__file__).parents[1]
    program = sorted(file for pattern in PROGRAM for file in package.rglob(pattern))
    return _digest([json.dumps({**request, "runs": [str(run) for run in runs]}, default=str)], [*of_runs, *program])


def _files(run: RunDir) -> tuple[Path, ...]:
    return run.config_file, run.summary_file, run.metrics_file, run.best_file, run.checkpoint_file, metrics_file(run)


def find(runs: Sequence[Path], stamped: str, out: Path | None) -> CachedReport | None:
    """Return the cached report with this stamp; None if there is no such report or its files have changed."""
    beside = dict.fromkeys([common_folder(runs), *(run.parent for run in runs)])
    for folder in [out] if out else [place / "compare" for place in beside]:
        with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            found = json.loads(read_text(folder / NAME))
            is_same = found["format"] == FORMAT and found["stamp"] == stamped
            if is_same and found["report"] == _report(folder):
                return _checked(folder, found)
    return None


def store(report: CachedReport, stamped: str) -> None:
    """Cache a report that has just been written; do nothing if the file cannot be written."""
    with suppress(OSError):
        about = {"format": FORMAT, "stamp": stamped, "report": _report(report.folder)}
        write_json(report.folder / NAME, {**about, "notes": report.notes, "table": asdict(report.table)})


def forget(folder: Path) -> None:
    """Delete the cache of the report in a folder, before the report is replaced."""
    (folder / NAME).unlink(missing_ok=True)


def _checked(folder: Path, found: Mapping[str, Any]) -> CachedReport:
    """Check the content of a cache file, and return it as a report. Raises ValueError, KeyError or TypeError if it is
    malformed."""
    table = SummaryTable(**found["table"])
    columns = [table.arms, table.counts, *table.columns.values(), found["notes"]]
    texts = [table.title, table.below, *(text for column in columns for text in column)]
    if not all(isinstance(column, list) for column in columns) or not all(isinstance(text, str) for text in texts):
        raise TypeError
    if not is_printable(dict(found)) or any(len(column) != len(table.arms) for column in columns[:-1]):
        raise ValueError
    return CachedReport(folder, found["notes"], table)


def _report(folder: Path) -> str:
    """Return a digest that changes whenever a file of a report changes."""
    # Not a recursive search, because a link in the folder could lead anywhere.
    inside = [file for pattern in INSIDE for file in folder.glob(pattern)]
    return _digest([], [*(folder / name for name in FILES), *sorted(inside)])


def _digest(words: Iterable[str], files: Iterable[Path]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for word in words:
        whole.update(word.encode())
    for file in files:
        stat = None
        with suppress(OSError):
            found = file.stat()  # ctime cannot be set, so it reveals an edit even if the mtime was restored
            stat = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
        whole.update(f"{file}\0{stat}\0".encode(errors="surrogateescape"))
    return whole.hexdigest()
