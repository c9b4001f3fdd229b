"""A run on disk: its folder, its checkpoint, and the trained model in it."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor
from torch.distributions import Distribution

from vae_cli.build import Config, build, build_model, find_device
from vae_cli.dataset import Dataset, Splits
from vae_cli.errors import Failure, UserError, nearest
from vae_cli.evaluation import questioned
from vae_cli.files import replace_file, write_json, write_text
from vae_cli.model import VAE

CHECKPOINT_FORMAT = 1

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

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def log_file(self) -> Path:
        return self.path / "train.log"

    def config(self) -> Config:
        """The whole configuration of the run. Raises UserError where there is none, Failure where it is damaged."""
        try:
            config = yaml.safe_load(self.config_file.read_text())
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is not a run: it holds no config.yaml.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise Failure(f"{self.config_file} is damaged: {_first_line(error)}") from error
        if not isinstance(config, dict):
            raise Failure(f"{self.config_file} is damaged: it holds no settings.")
        return config

    def summary(self) -> dict[str, Any]:
        """What summary.json says, or nothing where there is none yet. Raises Failure where it is damaged."""
        try:
            summary = json.loads(self.summary_file.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise Failure(f"{self.summary_file} is damaged: {_first_line(error)}") from error
        return summary if isinstance(summary, dict) else {}

    def status(self) -> Status:
        """How far the run has come; a run whose process is no longer there was interrupted."""
        summary = self.summary()
        status = summary.get("status", "interrupted" if self.config_file.exists() else "new")
        if status == "running" and not _is_alive(summary.get("host"), summary.get("pid")):
            return "interrupted"
        return status  # type: ignore[no-any-return]

    def write_config(self, config: Config) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, yaml.safe_dump(config, sort_keys=False))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.summary_file, summary)

    def metrics(self) -> list[dict[str, Any]]:
        """One record per epoch; a line that was cut short by a crash is not counted."""
        records = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text().splitlines():
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
        return records

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop the records of epochs that were trained after the checkpoint that is resumed, to be written again."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replace a checkpoint: tensors and plain values only, so that it loads without running code."""
    replace_file(path, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **state}, file))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a checkpoint without running code. Raises UserError where there is none, Failure where it is damaged or was
    written by a newer version."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent} has no {path.name}: its training has not come to a first checkpoint. "
            "Type the command that started it again, and it goes on."
        ) from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise Failure(f"{path} is damaged and cannot be loaded: {_first_line(error)}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise Failure(f"{path} is not a checkpoint of vae.")
    if state["format"] > CHECKPOINT_FORMAT:
        raise Failure(
            f"{path} has format {state['format']}, and this version of vae knows formats up to {CHECKPOINT_FORMAT}; "
            "install a newer vae."
        )
    return state


class Run:
    """A trained run: `model`, `encode`, `decode`, `sample`, and the images that it was trained on.

    weights are the `best` on validation images, where some were held out, or the `last`.
    Raises UserError or Failure where the folder cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        weights: Literal["best", "last"] = "best",
        device: str = "auto",
        data_dir: str | None = None,
    ) -> None:
        self.folder = RunDir(Path(path))
        self.config = self.folder.config()
        if data_dir is not None:
            self.config["data_dir"] = data_dir
            if "data_dir" in self.config["dataset"]:
                self.config["dataset"]["data_dir"] = data_dir
        self.device = find_device(device)
        use_best = weights == "best" and self.folder.best_file.exists()
        self.weights_file = self.folder.best_file if use_best else self.folder.checkpoint_file
        state = load_checkpoint(self.weights_file, self.device)
        self.step: int = state["step"]
        self.shape: tuple[int, int, int] = tuple(state["shape"])
        self.model: VAE = build_model(self.config, self.shape)
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise Failure(
                f"{self.weights_file} does not fit {self.folder.config_file}: {_first_line(error)}"
            ) from error
        self.model.to(self.device).eval()

    @property
    def path(self) -> Path:
        return self.folder.path

    @cached_property
    def splits(self) -> Splits:
        """The images, loaded when they are first asked for. Raises UserError or Failure as the data set does."""
        splits: Splits = build(self.config["dataset"], "dataset", Dataset).load()
        return splits

    def images(self, x: Tensor) -> Tensor:
        """Images as the model takes them: on its device, 8-bit values scaled to [0, 1]."""
        scaled = x.to(torch.float32) / 255 if x.dtype == torch.uint8 else x.to(torch.float32)
        return scaled.to(self.device)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Distribution:
        """q(z|x), batch (B,) and event (D,), of images (B, C, H, W) with values in [0, 1] or 8-bit."""
        return self.model.encode(self.model.likelihood.observe(self.images(x)))  # type: ignore[operator]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Distribution:
        """p(x|z), batch (*S, B) and event (C, H, W), of codes (*S, B, D)."""
        return self.model.decode(z.to(self.device, torch.float32))

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0) -> Tensor:
        """The mean images (n, C, H, W) of n codes drawn from the prior."""
        with questioned(self.model, seed, self.device):
            return self.decode(self.model.prior().sample((n,))).mean


def load_run(
    run: str | Path = "latest",
    weights: Literal["best", "last"] = "best",
    device: str = "auto",
    runs_dir: str | Path = "runs",
    data_dir: str | None = None,
) -> Run:
    """Load a trained run by its path, by `latest`, or by a unique part of its name (see find_run)."""
    return Run(find_run(str(run), Path(runs_dir)), weights, device, data_dir)


def find_runs(folder: Path) -> list[Path]:
    """All runs below a folder, by name; hidden folders are not entered."""
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "config.yaml" in files:
            found.append(Path(path))
            folders.clear()
    return sorted(found)


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
        raise UserError(f"{name} is not a run: it holds no config.yaml.")
    if not runs:
        raise UserError(f"There is no run below {runs_dir}. Train one first: vae train sigma=fixed")
    if name == "latest":
        return max(runs, key=_last_written)
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


def _last_written(run: Path) -> float:
    files = [run / "checkpoint.pt", run / "config.yaml"]
    return max(file.stat().st_mtime for file in files if file.exists())


def _is_alive(host: Any, pid: Any) -> bool:
    if host != socket.gethostname() or not isinstance(pid, int):
        return host is not None and host != socket.gethostname()  # another machine's processes cannot be seen from here
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
