"""What `vae compare` said, kept beside its report: asked again, it says so at once where nothing has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vae_cli.comparison.members import common_folder
from vae_cli.core.files import is_printable, read_text, write_json
from vae_cli.metrics.record import metrics_file
from vae_cli.runs.folder import RunDir

FORMAT = 1
NAME = ".kept.json"
FILES = ("compare.csv", "compare.json", "report.html")
INSIDE = ("figures/*", "tensorboard/*/*/*")


@dataclass(frozen=True)
class Sheet:
    """A table of arms: columns the most telling first, each with a cell of every arm, and what is said below it."""

    title: str
    arms: list[str]
    counts: list[str]
    columns: dict[str, list[str]]
    below: str


@dataclass(frozen=True)
class CachedReport:
    """An answer: the folder of the report, and what was said on the terminal."""

    folder: Path
    notes: list[str]
    sheet: Sheet


def stamp(runs: Sequence[Path], asked: Mapping[str, Any]) -> str:
    """What changes whenever anything changes that a comparison is made of: what was asked, the files of the runs, by
    size, time and number, and the program itself."""
    of_runs = [file for run in runs for file in _files(RunDir(run))]
    program = sorted(Path(__file__).parents[1].rglob("*.py"))
    return _digest([json.dumps({**asked, "runs": [str(run) for run in runs]}, default=str)], [*of_runs, *program])


def _files(run: RunDir) -> tuple[Path, ...]:
    return run.config_file, run.summary_file, run.metrics_file, run.best_file, run.checkpoint_file, metrics_file(run)


def find(runs: Sequence[Path], stamped: str, out: Path | None) -> CachedReport | None:
    """The answer that was kept under this stamp, with its report as it was written; None where there is none."""
    beside = dict.fromkeys([common_folder(runs), *(run.parent for run in runs)])
    for folder in [out] if out else [place / "compare" for place in beside]:
        with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            found = json.loads(read_text(folder / NAME))
            is_same = found["format"] == FORMAT and found["stamp"] == stamped
            if is_same and found["report"] == _report(folder):
                return _checked(folder, found)
    return None


def keep(answer: CachedReport, stamped: str) -> None:
    """Keep an answer whose report has just been written, where there is room for it."""
    folder = answer.folder
    with suppress(OSError):
        about = {"format": FORMAT, "stamp": stamped, "report": _report(folder)}
        write_json(folder / NAME, {**about, "notes": answer.notes, "sheet": asdict(answer.sheet)})


def forget(folder: Path) -> None:
    """Keep nothing about a report that is going to be replaced."""
    (folder / NAME).unlink(missing_ok=True)


def _checked(folder: Path, found: Mapping[str, Any]) -> CachedReport:
    """Raises ValueError, KeyError or TypeError for what this module has not written."""
    sheet = Sheet(**found["sheet"])
    columns = [sheet.arms, sheet.counts, *sheet.columns.values(), found["notes"]]
    texts = [sheet.title, sheet.below, *(text for column in columns for text in column)]
    if not all(isinstance(column, list) for column in columns) or not all(isinstance(text, str) for text in texts):
        raise TypeError
    if not is_printable(dict(found)) or any(len(column) != len(sheet.arms) for column in columns[:-1]):
        raise ValueError
    return CachedReport(folder, found["notes"], sheet)


def _report(folder: Path) -> str:
    """What changes whenever a file of a report does."""
    # No deeper than it is: a folder that somebody has made a link may lead anywhere.
    inside = [file for pattern in INSIDE for file in folder.glob(pattern)]
    return _digest([], [*(folder / name for name in FILES), *sorted(inside)])


def _digest(words: Iterable[str], files: Iterable[Path]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for word in words:
        whole.update(word.encode())
    for file in files:
        stat = None
        with suppress(OSError):
            found = file.stat()
            stat = (found.st_size, found.st_mtime_ns, found.st_ino)
        whole.update(f"{file}\0{stat}\0".encode(errors="surrogateescape"))
    return whole.hexdigest()
