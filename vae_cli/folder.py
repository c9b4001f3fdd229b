"""The folder of a run: what lies in it, how far it has come, and how it is found by name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vae_cli.errors import Failure, UserError, first_line, nearest
from vae_cli.files import blaming, is_locked, write_json, write_text
from vae_cli.naming import AXES

ANEW = "Train the run anew: the command that made it, with overwrite=true."
AGAIN = (
    "Remove the file and type the command that made the run: it goes on from its checkpoint. With overwrite=true it "
    "trains the run anew."
)

SWEEP_FILE = "sweep.json"

Status = Literal["new", "running", "interrupted", "failed", "finished"]


@dataclass(frozen=True)
class RunDir:
    """The folder of a run, and the names of what lies in it."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoint_file(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def best_file(self) -> Path:
        return self.path / "best.pt"

    def weights_file(self, weights: str) -> Path:
        """The `best` weights, where images were held out to tell them, or the `last`."""
        return self.best_file if weights == "best" and self.best_file.exists() else self.checkpoint_file

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    @property
    def log_file(self) -> Path:
        return self.path / "train.log"

    def config(self) -> dict[str, Any]:
        """The whole configuration of the run. Raises UserError where there is none, Failure where it is damaged."""
        import yaml  # not needed to find runs, as completion does

        try:
            config = yaml.safe_load(self.config_file.read_text())
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is not a run: it holds no config.yaml.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise Failure(f"{self.config_file} is damaged: {first_line(error)}. {ANEW}") from error
        if not isinstance(config, dict) or not all(isinstance(config.get(axis), dict) for axis in (*AXES, "choices")):
            raise Failure(f"{self.config_file} is damaged: it does not hold the settings of a run. {ANEW}")
        return config

    def summary(self) -> dict[str, Any]:
        """What summary.json says, or nothing where there is none yet. Raises Failure where it is damaged."""
        try:
            summary = json.loads(self.summary_file.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise Failure(f"{self.summary_file} is damaged: {first_line(error)}. {AGAIN}") from error
        figures = summary.get("test", {}) if isinstance(summary, dict) else None
        if not isinstance(figures, dict) or not all(isinstance(value, int | float) for value in figures.values()):
            raise Failure(f"{self.summary_file} is damaged: it does not hold the figures of a run. {AGAIN}")
        return summary

    def status(self) -> Status:
        """How far the run has come; a run that is under way holds its lock, and one that lost it was interrupted."""
        summary = self.summary()
        status = summary.get("status", "interrupted" if self.config_file.exists() else "new")
        if status == "running" and not is_locked(self.lock_file):
            return "interrupted"
        return status

    def write_config(self, config: Mapping[str, Any]) -> None:
        import yaml

        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, yaml.safe_dump(dict(config), sort_keys=False))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.summary_file, summary)

    def metrics(self) -> list[dict[str, Any]]:
        """One record per epoch, up to a line that is none, as where a crash has cut it short."""
        records = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text(errors="replace").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                if not isinstance(record, dict) or not all(
                    isinstance(record.get(key), int | float) for key in ("epoch", "step", "seconds")
                ):
                    break
                records.append(record)
        return records

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        with blaming(self.metrics_file), self.metrics_file.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def forget_metrics_after(self, step: int) -> None:
        """Drop the records of epochs that were trained after the checkpoint that is resumed, to be written again."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))


class Follower(RunDir):
    """The folder of a run that another process writes, which need not be on this machine: what is written is not."""

    def write_config(self, config: Mapping[str, Any]) -> None:
        pass

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        pass

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        pass

    def forget_metrics_after(self, step: int) -> None:
        pass


def find_runs(folder: Path) -> list[Path]:
    """All runs below a folder, by name, or those of a sweep whose folder it is; hidden folders are not entered."""
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
    """Note in a sweep's own folder which runs are its, as seen from there: they lie beside all others."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SWEEP_FILE, {"runs": [os.path.relpath(run, folder) for run in runs]})


def _runs_of_sweep(folder: Path) -> list[Path]:
    try:
        listed = json.loads((folder / SWEEP_FILE).read_text())["runs"]
        runs = [Path(os.path.normpath(folder / name)) for name in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(
            f"{folder / SWEEP_FILE} is damaged. Name the runs themselves, or the folder above them."
        ) from error
    # Runs that were moved or removed since, and whatever lies outside the folder that holds runs and sweeps.
    above = folder.absolute().parent.parent
    return [run for run in runs if run.absolute().is_relative_to(above) and (run / "config.yaml").exists()]


def finished_runs(runs: Iterable[Path]) -> list[Path]:
    """Those of some runs that have come to their end; one whose summary is damaged has not."""
    finished = []
    for path in runs:
        with suppress(Failure):
            if RunDir(path).status() == "finished":
                finished.append(path)
    return finished


def find_run(name: str, runs_dir: Path) -> Path:
    """A run by its path, by `latest` (the one written last), or by a part of its name that no other run has.

    Raises UserError where there is none, or more than one.
    """
    path = Path(name)
    if (path / "config.yaml").exists():
        return path
    runs = find_runs(runs_dir)
    if name != "latest" and path.is_dir():
        inside = find_runs(path)
        if len(inside) == 1:
            return inside[0]
        if inside:
            raise UserError(f"{name} holds {len(inside)} runs; name one of them:\n{_listed(inside)}")
        if not any(name.strip("/") in run.as_posix() for run in runs):  # else the name of a run is meant
            raise UserError(f"{name} is not a run: it holds no config.yaml.")
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
        raise UserError(f"'{name}' could be {len(matches)} runs; name more of it:\n{_listed(matches)}")
    raise UserError(
        f"There is no run '{name}' below {runs_dir}.{nearest(name, [*names, *(p.name for p in runs)])} "
        f"It has:\n{_listed(runs)}"
    )


def _listed(runs: list[Path], most: int = 12) -> str:
    more = [f"  ... and {len(runs) - most} more: vae runs"] if len(runs) > most else []
    return "\n".join([*(f"  {run}" for run in runs[:most]), *more])


def last_written(run: Path) -> float:
    """When a run was trained last, in seconds."""
    files = [run / "checkpoint.pt", run / "config.yaml"]
    return max(file.stat().st_mtime for file in files if file.exists())
