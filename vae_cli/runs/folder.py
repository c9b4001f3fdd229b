"""The folder of a run: what lies in it, how far it has come, and how it is found by name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vae_cli.config.aliases import with_current_targets
from vae_cli.config.naming import AXES
from vae_cli.core.errors import Failure, UserError, first_line
from vae_cli.core.files import is_locked, is_printable, read_text, reporting_path, write_json, write_text
from vae_cli.core.values import is_finite

if TYPE_CHECKING:
    pass

ANEW = "Train the run anew: the command that made it, with overwrite=true."
AGAIN = (
    "Remove the file and type the command that made the run: it goes on from its checkpoint. With overwrite=true it "
    "trains the run anew."
)
CONFIG_DEPTH = 20
CONFIG_BYTES = 1_000_000  # of a configuration at most; it has about a thousand

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
            text = read_text(self.config_file, CONFIG_BYTES)
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where it was built
            if not _is_shallow(text):
                depth = 0
                for event in yaml.parse(text, loader):
                    depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                    if isinstance(event, yaml.AliasEvent) or depth > CONFIG_DEPTH:  # a few lines can stand for billions
                        raise ValueError("it refers to itself, or lists lie in lists without end")
            config = yaml.load(text, loader)
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is not a run: it holds no config.yaml.") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise Failure(f"{self.config_file} is damaged: {first_line(error)}. {ANEW}") from error
        if not _is_config(config):
            raise Failure(f"{self.config_file} is damaged: it does not hold the settings of a run. {ANEW}")
        return with_current_targets(config)

    def summary(self) -> dict[str, Any]:
        """What summary.json says, or nothing where there is none yet. Raises Failure where it is damaged."""
        try:
            summary = json.loads(read_text(self.summary_file))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise Failure(f"{self.summary_file} is damaged: {first_line(error)}. {AGAIN}") from error
        if not _is_summary(summary):
            raise Failure(f"{self.summary_file} is damaged: it does not hold the figures of a run. {AGAIN}")
        return summary

    def status(self, summary: Mapping[str, Any] | None = None) -> Status:
        """How far the run has come, by its summary, which need not be read again; a run that is under way holds its
        lock, and one that lost it was interrupted."""
        summary = self.summary() if summary is None else summary
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
        if self.metrics_file.is_file():
            for line in self.metrics_file.read_text(errors="replace").splitlines():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    break
                if not isinstance(record, dict) or not all(
                    is_finite(value) for value in (*record.values(), *map(record.get, ("epoch", "step", "seconds")))
                ):
                    break
                records.append(record)
        return records

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        with reporting_path(self.metrics_file), self.metrics_file.open("a") as file:
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


def _is_shallow(text: str) -> bool:
    """Whether it is seen at once that a YAML text has no aliases and no more than CONFIG_DEPTH levels: a level takes a
    bracket, a dash, a question mark or a column of indentation."""
    signs = sum(map(text.count, "[{-?"))
    indented = max((len(line) - len(line.lstrip(" ")) for line in text.splitlines()), default=0)
    return "*" not in text and "&" not in text and signs + indented + 1 <= CONFIG_DEPTH


def _is_config(config: object) -> bool:
    """Whether this has the form of a run's configuration, as far as commands rely on it that build no model."""
    if not isinstance(config, dict) or not all(isinstance(config.get(axis), dict) for axis in (*AXES, "choices")):
        return False
    if not all(isinstance(config[axis].get("_target_"), str) for axis in AXES) or not is_printable(config):
        return False
    numbers = [config.get(key) for key in ("latent", "seed", "epochs")]
    choices = config["choices"]
    return (
        all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        and all(isinstance(choices.get(axis), str) for axis in AXES)
        and all(isinstance(word, str) for pair in choices.items() for word in pair)
    )


SUMMARY: dict[str, type | tuple[type, ...]] = {
    "status": str, "epoch": int, "step": int, "config": dict, "versions": dict, "warnings": list, "error": str,
    "started": str, "host": str, "pid": int, "device": str, "git_commit": (str, type(None)),
}  # fmt: skip


def _is_summary(summary: object) -> bool:
    """Whether this has the form of a summary: every field that is there is of its kind, and every figure a number."""
    if not isinstance(summary, dict) or not is_printable(summary):
        return False
    if not all(isinstance(summary[key], kind) for key, kind in SUMMARY.items() if key in summary):
        return False
    if summary.get("status", "running") not in ("running", "interrupted", "failed", "finished"):
        return False
    if not all(is_finite(summary.get(key, 0)) for key in ("seconds", "images_per_second")):
        return False
    if not all(isinstance(text, str) for text in summary.get("warnings", [])):
        return False
    splits = [summary.get(split, {}) for split in ("train", "validation", "test", "posterior")]
    return all(isinstance(split, dict) and all(map(is_finite, split.values())) for split in splits)


def refuse_link(run: Path, kind: str) -> None:
    """Raise UserError where a folder in a run's folder is a link that leads out of it."""
    if not (run / kind).resolve().is_relative_to(run.resolve()):
        raise UserError(f"{run / kind} is a link that leads out of the run's folder, and is not followed: remove it.")
