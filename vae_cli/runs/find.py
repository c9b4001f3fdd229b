"""Find all runs below a folder, or one run by its name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from vae_cli.core.errors import Failure, UserError, nearest
from vae_cli.core.files import is_printable, read_text, write_json
from vae_cli.runs.folder import RunDir

SWEEP_FILE = "sweep.json"  # in a sweep's folder, which lists its runs but does not contain them


def find_runs(folder: Path) -> list[Path]:
    """Return the runs below a folder, sorted by name, or the runs of a sweep, given its folder. Hidden folders are
    skipped."""
    if (folder / SWEEP_FILE).is_file():
        return _runs_of_sweep(folder)
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "config.yaml" in files:
            found.append(Path(path))
            folders.clear()
    return sorted(found)


def write_sweep(folder: Path, runs: Iterable[Path]) -> None:
    """List the runs of a sweep in its folder, as paths relative to that folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SWEEP_FILE, {"runs": [os.path.relpath(run, folder) for run in runs]})


def _runs_of_sweep(folder: Path) -> list[Path]:
    try:
        listed = json.loads(read_text(folder / SWEEP_FILE))["runs"]
        runs = [Path(os.path.normpath(folder / name)) for name in listed if is_printable(name) and "\0" not in name]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Failure(
            f"{folder / SWEEP_FILE} is damaged. Name the runs themselves, or the folder that contains them."
        ) from error
    # Left out: runs that were moved or removed, and anything outside the folder that contains runs and sweeps.
    above = folder.absolute().parent.parent
    return [run for run in runs if run.absolute().is_relative_to(above) and (run / "config.yaml").exists()]


def finished_runs(runs: Iterable[Path]) -> list[Path]:
    """Return the runs that are finished. A run with a damaged summary is not."""
    finished = []
    for path in runs:
        with suppress(Failure):
            if RunDir(path).status() == "finished":
                finished.append(path)
    return finished


def find_run(name: str, runs_dir: Path) -> Path:
    """Find a run by its folder, by `latest` (the run trained last), or by a part of its name that no other run has.

    Raises UserError if no run or more than one fits.
    """
    path = Path(name)
    if any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise UserError(f"There is no run '{name[:40]}...': the name is too long for a file system.")
    if (path / "config.yaml").exists():
        return path
    runs = find_runs(runs_dir)
    if name != "latest" and path.is_dir():
        inside = find_runs(path)
        if len(inside) == 1:
            return inside[0]
        if inside:
            raise UserError(f"{name} contains {len(inside)} runs; type one of them:\n{_listed(inside)}")
        if not any(name.strip("/") in run.as_posix() for run in runs):  # otherwise it is part of a run's name
            raise UserError(f"{name} is not a run: it has no config.yaml.")
    if not runs:
        raise UserError(f"There is no run below {runs_dir}. Train one first: vae train sigma=fixed")
    if name == "latest":
        return max(runs, key=last_written)
    names = {path.relative_to(runs_dir).as_posix(): path for path in runs}
    exact = [path for key, path in names.items() if name in (key, path.name)]
    matches = exact or [path for key, path in names.items() if name.strip("/") in key]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"'{name}' fits {len(matches)} runs; type more of the name:\n{_listed(matches)}")
    raise UserError(
        f"There is no run '{name}' below {runs_dir}.{nearest(name, [*names, *(p.name for p in runs)])} "
        f"The runs there are:\n{_listed(runs)}"
    )


def _listed(runs: list[Path], most: int = 12) -> str:
    more = [f"  ... and {len(runs) - most} more: vae runs"] if len(runs) > most else []
    return "\n".join([*(f"  {run}" for run in runs[:most]), *more])


def last_written(run: Path) -> float:
    """Return the time at which a run was last written, in seconds since 1970."""
    files = [run / "checkpoint.pt", run / "config.yaml"]
    return max(file.stat().st_mtime for file in files if file.exists())
