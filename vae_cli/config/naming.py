"""The name of a run: its differences from the defaults, in words that need no quotes in a shell or an override."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vae_cli.core.errors import UserError
from vae_cli.core.files import expand_home

# Settings that do not change the result of a run, and those that say when it ends, so that a finished run can be
# trained further.
NO_PART_OF_THE_NAME = frozenset(
    [
        *("epochs", "patience", "device", "threads", "data_dir", "runs_dir", "run_name", "overwrite", "log_every"),
        *("checkpoint_minutes", "objective", "metrics", "compile", "on_divergence", "restarts"),
    ]
)
ORDER = [
    *("latent", "network", "sigma", "likelihood", "prior", "regularizer", "optimizer"),
    *("dataset", "batch_size", "seed"),
]
IMAGES = "dataset.path"  # the folder of the images; it names the folder of the runs
LONGEST = 150  # characters
# Names that Windows reserves, or that contain characters which it does not allow.
WINDOWS_RESERVED = re.compile(r"(?!\.\.$)(?:(?i:(con|prn|aux|nul|com\d|lpt\d)(\..*)?)|.*[<>:\"|?*].*|.+[ .])")
AXES = ("dataset", "network", "sigma", "likelihood", "prior", "regularizer", "optimizer")


def run_name(config: Mapping[str, Any], choices: Mapping[str, str], defaults: Mapping[str, Any]) -> str:
    """Return a run's name, built from its differences from the defaults: `latent-8_sigma-fixed`, or `default`.

    `choices` maps each group (`sigma`, `schedule@regularizer.beta`) to the selected choice. `defaults` contains the
    default settings under these choices and, under the key `choices`, the default choice of each group.
    """
    words: list[tuple[str, Any]] = []
    for group, choice in choices.items():
        if choice is not None and choice != defaults["choices"].get(group) and group != "dataset":
            words.append((group.rpartition("@")[2], choice))
    before = flatten({key: value for key, value in defaults.items() if key != "choices"})
    for key, value in flatten(config).items():
        is_part = key.partition(".")[0] not in NO_PART_OF_THE_NAME and key != IMAGES
        if is_part and (key not in before or before[key] != value):
            words.append((key, as_word(key, value)))
    words.sort(key=lambda word: (_place(word[0].partition(".")[0]), word[0]))
    name = "_".join(f"{clean(key)}-{_word(value)}" for key, value in words) or "default"
    if len(name) > LONGEST:
        name = f"{name[: LONGEST - 9]}-{digest(name)}"
    return name


def run_folder(config: Mapping[str, Any], name: str) -> Path:
    """Return the folder of a run: runs_dir / dataset / name, or runs_dir / run_name if the user has named the run.

    If the dataset has a path, as image_folder does, its last part follows the name of the dataset.

    Raises UserError for a runs_dir or run_name that cannot name a folder.
    """
    for key in ("runs_dir", "run_name"):
        check_path(key, config[key])
    runs_dir = expand_home(str(config["runs_dir"]), "runs_dir")
    if config["run_name"] is not None:
        return runs_dir / str(config["run_name"])
    path = config["dataset"].get("path")
    after = f"-{_last_part(path)}" if isinstance(path, str) and path else ""
    return runs_dir / f"{clean(config['choices']['dataset'])}{after}" / name


def check_path(key: str, value: Any) -> None:
    """Raise UserError if the value of a setting cannot be the path of a folder."""
    words = str("x" if value is None else value)
    if not words.strip(" ./") and ".." not in words and words != "/" and (key == "run_name" or not words.strip()):
        raise UserError(f"{key}='{words}' is not a valid name: choose a different one, or leave {key} out.")
    if not words.isprintable():
        raise UserError(f"{key}={words!r} contains invisible characters, such as a line break: leave them out.")
    parts = re.split(r"[/\\\\]", os.path.splitdrive(words)[1])
    if os.name == "nt" and any(WINDOWS_RESERVED.fullmatch(part) for part in parts):
        raise UserError(f"{key}={words}: Windows does not allow this name. Choose a different one.")
    if any(len(part.encode(errors="replace")) > 255 for part in words.split("/")):
        raise UserError(f"{key}={words[:40]}... is too long: file systems allow at most 255 bytes per name.")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration as a flat dictionary with dotted keys.

    >>> flatten({"latent": 2, "sigma": {"value": 1.0}})
    {'latent': 2, 'sigma.value': 1.0}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def what_matters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that affect the result of a run, as a flat dictionary with dotted keys."""
    return {
        key: value
        for key, value in flatten(config).items()
        if not {key.partition(".")[0], key.rpartition(".")[2]} & NO_PART_OF_THE_NAME or key.endswith(".epochs")
    }


def hparams(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return a run's row in TensorBoard's HPARAMS tab: its choice on each axis and the settings that affect results."""
    row: dict[str, bool | int | float | str] = dict(config["choices"])
    for key, value in what_matters({k: v for k, v in config.items() if k != "choices"}).items():
        if not key.endswith("_target_") and value is not None:
            word = as_word(key, value)
            row[key] = word if isinstance(word, int | float | str) else show(word)
    return row


def as_word(key: str, value: Any) -> Any:
    """Return the shape of a code as a word; the value of any other setting unchanged.

    >>> as_word("latent", [4, 7, 7]), as_word("prior.latent", 16), as_word("network.hidden", [400, 400])
    ('4x7x7', 16, [400, 400])
    """
    is_shape = key.rpartition(".")[2] == "latent" and isinstance(value, (list, tuple))
    return "x".join(map(show, value)) if is_shape else value


def typed(value: Any) -> str:
    """Return a value as it is typed on the command line.

    >>> [typed(value) for value in (None, True, 0.5, [1, 2])]
    ['null', 'true', '0.5', '[1, 2]']
    """
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    is_huge = isinstance(value, int) and value.bit_length() > 10_000  # Python does not convert these to decimals
    return hex(value) if is_huge else str(value)


def show(value: Any) -> str:
    """Format a value for a run's name or label: as it is typed, but with the items of a list joined by hyphens.

    >>> show([400, 400])
    '400-400'
    """
    if isinstance(value, (list, tuple)):
        return "-".join(show(item) for item in value) or "none"
    return typed(value)


def clean(word: str) -> str:
    """Reduce a word to letters, digits, dots, plus and minus signs, which need no quotes in a shell or an override.

    >>> clean("(0.9, 0.999)")
    '0.9-0.999'
    """
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", word).strip("-.") or "x"


def _word(value: Any) -> str:
    """Return a value as a word of a run's name. A digest tells apart texts that would otherwise have the same word.

    >>> _word([0.9, -1]), _word("batch_norm"), _word("a b")
    ('0.9--1', 'batch-norm', 'a-b-7faae47c')
    """
    text = show(value)
    parts = [part for part in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(part, str)]
    if not parts:
        return text
    is_kept = all("-" not in part and clean(part) == part.replace("_", "-") for part in parts)
    return clean(text) if is_kept else _with_digest(clean(text), text)


def _last_part(path: str) -> str:
    """Return the last part of a path as a word of a name, with a digest if it loses anything that was given.

    >>> _last_part("photos"), _last_part("./my_photos/")
    ('photos', 'my_photos')
    """
    given = os.path.normpath(os.path.expanduser(path))
    last = os.path.basename(os.path.abspath(given))
    cleaned = re.sub(r"[^A-Za-z0-9.+_-]+", "-", last).strip("-.")[:50]
    return cleaned if cleaned == last and given in (last, ".") else _with_digest(cleaned, given)


def _with_digest(word: str, whole: str) -> str:
    return f"{word}-{digest(whole)}".lstrip("-")


def digest(name: str) -> str:
    """Return eight hexadecimal digits that distinguish a shortened name from others."""
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=4).hexdigest()


def _place(key: str) -> int:
    return ORDER.index(key) if key in ORDER else len(ORDER)
