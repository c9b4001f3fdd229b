"""Find all runs in a folder and its subfolders, or one run by its name."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from vae_cli.core.errors import Failure, UserError, nearest, visible
from vae_cli.core.files import expand_home, is_printable, read_text, write_json
from vae_cli.runs.folder import RunDir

SWEEP_FILE = "sweep.json"  # in the folder of a sweep, which lists its runs; the runs themselves are stored elsewhere


def say_unreadable(error: OSError) -> None:
    """Print which folder cannot be read, and why. Nothing is printed about a folder that does not exist."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return
    print(visible(f"warning: {error.filename} cannot be read: {error.strerror}"), file=sys.stderr)


def find_runs(folder: Path, unreadable: Callable[[OSError], object] | None = None) -> list[Path]:
    """Return the paths of all runs in a folder and its subfolders, sorted. Hidden folders are skipped.

    If the folder contains a sweep.json, return the runs of that sweep instead. `unreadable` is called with the error of
    each subfolder that cannot be read, which is otherwise left out.
    """
    if (folder / SWEEP_FILE).is_file():
        return _runs_of_sweep(folder)
    found = []
    for path, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "config.yaml" in files:
            found.append(Path(path))
            folders.clear()
    return sorted(found)


def write_sweep(folder: Path, runs: Iterable[Path]) -> None:
    """Write sweep.json, which lists the runs of a sweep as paths relative to the folder of the sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SWEEP_FILE, {"runs": [os.path.relpath(run, folder) for run in runs]})


def _runs_of_sweep(folder: Path) -> list[Path]:
    try:
        listed = json.loads(read_text(folder / SWEEP_FILE))["runs"]
        runs = [Path(os.path.normpath(folder / name)) for name in listed if is_printable(name) and "\0" not in name]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Failure(
            f"{folder / SWEEP_FILE} is damaged. Give the paths of the runs, or of the folder that contains them."
        ) from error
    # Leave out runs that were moved or removed, and paths outside runs_dir, which contains .sweeps/NAME.
    above = folder.absolute().parent.parent
    return [run for run in runs if run.absolute().is_relative_to(above) and (run / "config.yaml").exists()]


def finished_runs(runs: Iterable[Path]) -> list[Path]:
    """Return the finished runs. Runs with a damaged summary are left out."""
    finished = []
    for path in runs:
        with suppress(Failure):
            if RunDir(path).status() == "finished":
                finished.append(path)
    return finished


def find_run(name: str, runs_dir: Path) -> Path:
    """Find a run by its folder, by a unique part of its name, or by `latest` (the most recently trained run).

    Raises UserError unless exactly one run matches.
    """
    path = expand_home(name, "RUN") if name.startswith("~") else Path(name)
    if any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise UserError(f"There is no run '{name[:40]}...': the name is too long. To see all names, type: vae runs")
    if (path / "config.yaml").exists():
        return path
    runs = find_runs(runs_dir, say_unreadable)
    if name != "latest" and path.is_dir():
        inside = find_runs(path)
        if len(inside) == 1:
            return inside[0]
        if inside:
            raise UserError(f"{name} contains {len(inside)} runs; choose one of them:\n{_listed(inside)}")
        if not any(name.strip("/") in run.as_posix() for run in runs):  # otherwise it is part of a run's name
            raise UserError(f"{name} is not a run: it has no config.yaml.")
    if not runs:
        raise UserError(f"There are no runs in {runs_dir}. Train one first: vae train sigma=fixed")
    if name == "latest":
        return max(runs, key=last_written)
    names = {path.relative_to(runs_dir).as_posix(): path for path in runs}
    exact = [path for key, path in names.items() if name in (key, path.name)]
    matches = exact or [path for key, path in names.items() if name.strip("/") in key]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"'{name}' matches {len(matches)} runs; use a longer part of the name:\n{_listed(matches)}")
    raise UserError(
        f"There is no run '{name}' in {runs_dir}.{nearest(name, [*names, *(p.name for p in runs)])} "
        f"Existing runs:\n{_listed(runs)}"
    )


def _listed(runs: list[Path], most: int = 12) -> str:
    more = [f"  ... and {len(runs) - most} more: vae runs"] if len(runs) > most else []
    return "\n".join([*(f"  {run}" for run in runs[:most]), *more])


def last_written(run: Path) -> float:
    """Return the Unix time at which the checkpoint or configuration of a run was last written."""
    files = [run / "checkpoint.pt", run / "config.yaml"]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)  # links may be broken
