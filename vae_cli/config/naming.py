"""The name of a run: what differs from the defaults, in words that need no quotes in a shell or in Hydra."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vae_cli.core.errors import UserError

# What does not change the result of a run, or (epochs) may change later without making it another run.
NO_PART_OF_THE_NAME = frozenset(
    [
        *("epochs", "device", "threads", "data_dir", "runs_dir", "run_name", "overwrite", "log_every"),
        *("checkpoint_minutes", "objective", "compile", "on_divergence", "restarts"),
    ]
)
ORDER = [
    *("latent", "network", "sigma", "likelihood", "prior", "regularizer", "optimizer"),
    *("dataset", "batch_size", "seed"),
]
LONGEST = 150
AXES = ("dataset", "network", "sigma", "likelihood", "prior", "regularizer", "optimizer")


def run_name(config: Mapping[str, Any], choices: Mapping[str, str], defaults: Mapping[str, Any]) -> str:
    """Name what differs between a configuration and the defaults, both plain: `latent-8_sigma-fixed`, or `default`.

    choices maps a group (`sigma`, `schedule@regularizer.beta`) to the word that was chosen for it; defaults holds the
    settings as they are under these choices, and under `choices` the words that stand for themselves.
    """
    words: list[tuple[str, str]] = []
    for group, choice in choices.items():
        if choice is not None and choice != defaults["choices"].get(group) and group != "dataset":
            words.append((group.rpartition("@")[2], choice))
    before = flatten({key: value for key, value in defaults.items() if key != "choices"})
    for key, value in flatten(config).items():
        if key.partition(".")[0] not in NO_PART_OF_THE_NAME and (key not in before or before[key] != value):
            words.append((key, show(value)))
    words.sort(key=lambda word: (_place(word[0].partition(".")[0]), word[0]))
    name = "_".join(f"{clean(key)}-{clean(value)}" for key, value in words) or "default"
    if len(name) > LONGEST:
        name = f"{name[: LONGEST - 9]}-{digest(name)}"
    return name


def run_folder(config: Mapping[str, Any], name: str) -> Path:
    """The folder of a run: runs_dir / dataset / name, or the name that was given by hand."""
    for key in ("runs_dir", "run_name"):
        refuse_no_path(key, config[key])
    if config["run_name"] is not None:
        return Path(config["runs_dir"]) / str(config["run_name"])
    return Path(config["runs_dir"]) / clean(config["choices"]["dataset"]) / name


def refuse_no_path(key: str, value: Any) -> None:
    """Raise UserError for a setting that cannot be the name of a folder."""
    words = str("x" if value is None else value)
    if not words.strip(" ./") and ".." not in words and words != "/" and (key == "run_name" or not words.strip()):
        raise UserError(f"{key}='{words}' names nothing: give a name, or leave it out.")
    if not words.isprintable():
        raise UserError(f"{key}={words!r} holds characters that cannot be seen, such as a line break: leave them out.")
    if any(len(part.encode(errors="replace")) > 255 for part in words.split("/")):
        raise UserError(f"{key}={words[:40]}... is too long for a file system: a name has at most 255 bytes.")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def what_matters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that its result depends on, on one level."""
    return {
        key: value
        for key, value in flatten(config).items()
        if not {key.partition(".")[0], key.rpartition(".")[2]} & NO_PART_OF_THE_NAME or key.endswith(".epochs")
    }


def hparams(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The row of a run in TensorBoard's HPARAMS tab: the choice of each axis and every setting that matters."""
    row: dict[str, bool | int | float | str] = dict(config["choices"])
    for key, value in what_matters({k: v for k, v in config.items() if k != "choices"}).items():
        if not key.endswith("_target_") and value is not None:
            row[key] = value if isinstance(value, int | float | str) else show(value)
    return row


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, (list, tuple)):
        return "-".join(show(item) for item in value) or "none"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def clean(word: str) -> str:
    """Letters, digits, dot, plus, minus: what no shell and no Hydra override has to quote."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", word).strip("-.") or "x"


def digest(name: str) -> str:
    """Eight letters that stand for a name that is too long."""
    return hashlib.blake2b(name.encode(), digest_size=4).hexdigest()


def _place(key: str) -> int:
    return ORDER.index(key) if key in ORDER else len(ORDER)
