"""The folder of a run: its files, its configuration, its figures and its status."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vae_cli.config.aliases import ADDED, with_current_targets
from vae_cli.config.naming import AXES
from vae_cli.core.errors import Failure, UserError, first_line
from vae_cli.core.files import (
    flush_folder,
    is_locked,
    is_printable,
    open_regular,
    read_text,
    reporting_path,
    write_json,
    write_text,
)
from vae_cli.core.values import flaw, is_finite

# What to do about a damaged file: RETRAIN if the run is lost without it, RECOVER if the run can do without it.
RETRAIN = "Train the run again from the start: repeat its vae train command with overwrite=true."
RECOVER = (
    "Remove the file and repeat the run's vae train command: the run resumes from its checkpoint, or starts from the "
    "beginning with overwrite=true."
)
HIDDEN_EVENTS = "tf-events"  # in the names of event files that TensorBoard must not read
CONFIG_DEPTH = 20  # levels of nesting allowed in config.yaml
METRICS_BYTES = 256_000_000  # maximum size of metrics.jsonl; an epoch has about 1000 bytes
CONFIG_BYTES = 1_000_000  # maximum size of config.yaml; a typical one has about 1000 bytes

Status = Literal["new", "running", "interrupted", "failed", "finished"]


@dataclass(frozen=True)
class RunDir:
    """The folder of a run: the paths of its files, and methods that read and write them."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def checkpoint_file(self) -> Path:
        """The latest training state, from which the run resumes."""
        return self.path / "checkpoint.pt"

    @property
    def best_file(self) -> Path:
        """The weights with the lowest validation loss."""
        return self.path / "best.pt"

    @property
    def next_best_file(self) -> Path:
        """The weights that replace best.pt once a checkpoint refers to them."""
        return self.path / ".best.next"

    @property
    def restart_file(self) -> Path:
        """With on_divergence=restart, the training state at the end of the last epoch, or at the start."""
        return self.path / ".restart.pt"

    def weights_file(self, weights: str) -> Path:
        """Return the file of the `best` or the `last` weights. Without a best.pt, `best` means `last`."""
        return self.best_file if weights == "best" and self.best_file.exists() else self.checkpoint_file

    @property
    def metrics_file(self) -> Path:
        """The training curves: one line of JSON per epoch."""
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        """The status of the run, how it was trained, and its final figures."""
        return self.path / "summary.json"

    @property
    def lock_file(self) -> Path:
        """The file that a process locks while it trains the run."""
        return self.path / ".lock"

    @property
    def log_file(self) -> Path:
        """The log messages written during training."""
        return self.path / "train.log"

    def config(self) -> dict[str, Any]:
        """Read the configuration of the run. Raises UserError if it is missing, Failure if it is damaged."""
        import yaml  # imported here, because completion finds runs without it and must be fast

        try:
            text = read_text(self.config_file, CONFIG_BYTES)
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster; not every PyYAML has it
            if not _is_shallow(text):
                depth = 0
                for event in yaml.parse(text, loader):
                    depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                    if isinstance(event, yaml.AliasEvent) or depth > CONFIG_DEPTH:  # aliases can expand to billions
                        raise ValueError("it has aliases, or is nested too deeply")
            config = yaml.load(text, loader)
        except FileNotFoundError as error:
            what = "its config.yaml is a link to nothing" if self.config_file.is_symlink() else "it has no config.yaml"
            raise UserError(f"{self.path} is not a run: {what}.") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise Failure(f"{self.config_file} is damaged: {first_line(error)}. {RETRAIN}") from error
        for key, value in config.items() if isinstance(config, dict) else ():
            if (reason := flaw({key: value})) is not None:
                named = f"a value of {key!s:.40} is not allowed: {reason}"
                raise Failure(f"{self.config_file} is damaged: {named}. {RETRAIN}")
        if not _is_config(config):
            raise Failure(f"{self.config_file} is damaged: it does not contain the settings of a run. {RETRAIN}")
        return {**ADDED, **with_current_targets(config)}

    def summary(self) -> dict[str, Any]:
        """Read summary.json; return an empty dictionary if it does not exist yet. Raises Failure if it is damaged."""
        try:
            summary = json.loads(read_text(self.summary_file))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise Failure(f"{self.summary_file} is damaged: {first_line(error)}. {RECOVER}") from error
        if not _is_summary(summary):
            raise Failure(f"{self.summary_file} is damaged: it does not contain the figures of a run. {RECOVER}")
        return summary

    def status(self, summary: Mapping[str, Any] | None = None) -> Status:
        """Return the status of the run. If the summary has been read already, pass it to avoid reading it again.

        A process that trains the run holds its lock. If the summary says `running` but no process holds the lock, the
        run was interrupted.
        """
        summary = self.summary() if summary is None else summary
        status = summary.get("status", "interrupted" if self.config_file.exists() else "new")
        if status == "running" and not is_locked(self.lock_file):
            return "interrupted"
        return status

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Create the folder and write config.yaml."""
        import yaml

        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, yaml.safe_dump(dict(config), sort_keys=False))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace summary.json."""
        write_json(self.summary_file, summary)

    @property
    def replaced(self) -> Path:
        """The subfolder that holds the files of the run that this one replaces, until this one has a checkpoint."""
        return self.path / ".replaced"

    def _own_files(self) -> list[Path]:
        """Return the files and subfolders that vae wrote for the run.

        The configuration comes last: without it, the others would not be recognized as a run.
        """
        names = "samples interpolations evaluation export second_stage projector .best.next .restart.pt checkpoint.pt"
        names += " best.pt metrics.jsonl summary.json train.log projector_config.pbtxt config.yaml"
        files = [*self.path.glob("events.*"), *(self.path / name for name in names.split())]
        return [file for file in files if file.is_symlink() or file.exists()]

    def remove_files(self) -> None:
        """Remove the files and subfolders that vae wrote for the run, and nothing else in the folder."""
        for file in self._own_files():
            _remove(file)

    def set_aside(self) -> None:
        """Move the files of the run into `replaced`, until `put_back` or `forget_replaced` is called.

        The checkpoint moves first: if a kill interrupts this, the folder has no checkpoint, and `put_back` undoes it.
        """
        self.forget_replaced()
        self.replaced.mkdir()
        for file in sorted(self._own_files(), key=lambda file: file != self.checkpoint_file):
            # TensorBoard reads every file that has tfevents in its name, in hidden folders, too.
            os.replace(file, self.replaced / file.name.replace("tfevents", HIDDEN_EVENTS))
        flush_folder(self.replaced)
        flush_folder(self.path)

    def put_back(self) -> bool:
        """Restore the run that was set aside, in place of the one that was to replace it; return whether there was one.

        The checkpoint moves last: until then the folder has none, so a second call can complete an interrupted one.
        """
        if not self.replaced.is_dir():
            return False
        names = {file.name.replace(HIDDEN_EVENTS, "tfevents"): file for file in self.replaced.iterdir()}
        if self.config_file.name in names:  # otherwise, the files in the folder are those of the former run
            self.remove_files()
        for name in sorted(names, key=lambda name: (name == self.checkpoint_file.name, name != self.config_file.name)):
            os.replace(names[name], self.path / name)
        self.forget_replaced()
        return bool(names)

    def forget_replaced(self) -> None:
        """Remove the run that was set aside."""
        if self.replaced.exists():
            shutil.rmtree(self.replaced, ignore_errors=True)

    def remove_partial_files(self) -> None:
        """Remove the partial files that a killed process left behind."""
        for part in (*self.path.glob(".*.part"), *self.path.glob("projector/.*.part")):
            if part.is_symlink() or not part.is_dir():
                part.unlink()

    def metrics(self) -> list[dict[str, Any]]:
        """Read the records of all epochs, up to the first malformed line, which a crash may have cut short.

        Raises Failure if the file cannot be read.
        """
        records = []
        for line in self._metrics_lines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(record, dict) or not _is_record(record):
                break
            records.append(record)
        return records

    def _metrics_lines(self) -> list[str]:
        try:
            with open_regular(self.metrics_file) as file:
                size = os.fstat(file.fileno()).st_size
                content = file.read(METRICS_BYTES + 1) if size <= METRICS_BYTES else b""
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else first_line(error)
            raise Failure(f"{self.metrics_file} cannot be read: {reason}. {RECOVER}") from error
        if size > METRICS_BYTES or len(content) > METRICS_BYTES:
            raise Failure(f"{self.metrics_file} cannot be read: it has more than {METRICS_BYTES:,} bytes. {RECOVER}")
        return content.decode(errors="replace").splitlines()

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append the record of an epoch to metrics.jsonl and flush it to disk."""
        with reporting_path(self.metrics_file), self.metrics_file.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def forget_metrics_after(self, step: int) -> None:
        """Remove the records of epochs that ended after the checkpoint's `step`: the resumed run repeats them."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))


class ReadOnlyRunDir(RunDir):
    """The folder of a run that another process, maybe on another machine, writes to: methods that write do nothing."""

    def write_config(self, config: Mapping[str, Any]) -> None:
        pass

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        pass

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        pass

    def forget_metrics_after(self, step: int) -> None:
        pass

    def remove_files(self) -> None:
        pass

    def set_aside(self) -> None:
        pass

    def put_back(self) -> bool:
        return False

    def forget_replaced(self) -> None:
        pass

    def remove_partial_files(self) -> None:
        pass


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_record(record: Mapping[str, Any]) -> bool:
    """Return whether a line of metrics.jsonl is well formed: figures are finite, epochs and steps are counted."""
    counts = [record.get(key) for key in ("epoch", "step")]
    return all(map(is_finite, (*record.values(), record.get("seconds")))) and all(
        isinstance(count, int) and 0 <= count < 2**53 for count in counts
    )


def _is_shallow(text: str) -> bool:
    """Return whether a quick check shows that a YAML text has no aliases and at most CONFIG_DEPTH levels of nesting.

    Each level needs a bracket, a dash, a question mark or a column of indentation; the total number of these is thus an
    upper bound on the depth.
    """
    signs = sum(map(text.count, "[{-?"))
    indented = max((len(line) - len(line.lstrip(" ")) for line in text.splitlines()), default=0)
    return "*" not in text and "&" not in text and signs + indented + 1 <= CONFIG_DEPTH


def _is_config(config: object) -> bool:
    """Return whether a parsed config.yaml has the settings that commands use before they build a model."""
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
    "started": str, "host": str, "pid": int, "device": str, "image_files": str, "git_commit": (str, type(None)),
}  # fmt: skip


def _is_summary(summary: object) -> bool:
    """Return whether a parsed summary.json is well formed: fields have the right types, and all figures are finite."""
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
    """Raise UserError if a subfolder of a run's folder is a link that points outside the run's folder."""
    if not (run / kind).resolve().is_relative_to(run.resolve()):
        raise UserError(f"{run / kind} is a link to a folder outside the run's folder. Remove the link.")
