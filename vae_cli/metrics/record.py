"""What was measured of a run, as it lies beside it. It is read without torch, which takes seconds to import."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vae_cli.core.errors import Failure, first_line
from vae_cli.core.files import is_printable, read_text
from vae_cli.core.values import is_finite
from vae_cli.runs.folder import RunDir

FORMAT = 1
Profile = Literal["quick", "default", "full"]
PROFILES: tuple[Profile, ...] = ("quick", "default", "full")  # each looks at more than the one before

# All metrics, by the module that has their classes. To add a metric: its class there, and its name here.
MODULES = {
    "information": ("Rate", "SignalToNoise", "MutualInformation"),
    "tolerance": ("NoiseProbe", "Quantization"),
    "neighbours": ("Jacobian", "Interpolation", "ClassChange", "NeighbourLabels"),
    "shortcuts": ("Collapse", "Reidentification", "Generalization", "Probes"),
    "scales": ("ScaleDistribution", "PullOverTraining"),
    "price": ("Bound", "AggregateFit", "RefittedPrior"),
    "quality": ("Quality",),
}


def rank(profile: str) -> int:
    """How thorough a profile is; -1 for a word that is none."""
    return PROFILES.index(profile) if profile in PROFILES else -1


def missing(found: Mapping[str, Any]) -> list[str]:
    """The metrics, by name, that an evaluation does not hold yet."""
    entries = [*found.get("figures", {}).values(), *found.get("left_out", {}).values()]
    present = {entry.get("metric") for entry in entries}
    return [name for names in MODULES.values() for name in names if name not in present]


def metrics_file(folder: RunDir) -> Path:
    return folder.path / "evaluation" / "metrics.json"


def stored_evaluation(folder: RunDir) -> dict[str, Any] | None:
    """What was measured of the run's weights as they are now; None where nothing was. Raises Failure where the file is
    damaged or was written by a newer version."""
    file = metrics_file(folder)
    again = f"To measure anew type vae evaluate {folder.path} --overwrite"
    try:
        found = json.loads(read_text(file))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise Failure(f"{file} is damaged: {first_line(error)}. {again}") from error
    kinds = {"format": int, "profile": str, "seed": int, "weights": str, "weights_digest": str}
    kinds |= {"images": str, "budget": dict, "figures": dict, "left_out": dict}
    if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
        raise Failure(f"{file} has format {found['format']}, and this version of vae knows {FORMAT}. {again}")
    if (
        not isinstance(found, dict)
        or not all(isinstance(found.get(key), kind) for key, kind in kinds.items())
        or not _is_evaluation(found)
    ):
        raise Failure(f"{file} is damaged. {again}")
    current = folder.weights_file(found["weights"])
    if not current.exists():
        return None
    is_same = found.get("weights_stamp") == stamp(current) or digest(current) == found["weights_digest"]
    return found if is_same else None


def _is_evaluation(found: Mapping[str, Any]) -> bool:
    """Whether what was measured has the form of it."""
    if (
        found["profile"] not in PROFILES
        or not isinstance(found["budget"].get("samples"), int)
        or not is_printable(found)
    ):
        return False
    figures, left_out = found["figures"].values(), found["left_out"].values()
    entries = [*figures, *left_out]
    if not all(isinstance(entry, dict) for entry in entries):
        return False
    words = [entry.get(key, "") for entry in entries for key in ("unit", "note", "reason")]
    words += [entry.get(key) for entry in entries for key in ("metric", "claim")]
    words += [entry.get("reason") for entry in left_out]
    values = [entry.get("value") for entry in figures] + [entry.get("error", 0) for entry in entries]
    numbers = [number for value in values for number in (value if isinstance(value, list) else [value])]
    numbers += [entry.get("count", 0) for entry in entries]
    return {str}.issuperset(map(type, words)) and all(map(is_finite, numbers))


def stamp(file: Path) -> list[int]:
    """Size and time of writing: a file that has kept both need not be read to know that it is the same."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def digest(file: Path) -> str:
    """What tells the bytes of a file from others."""
    with file.open("rb") as weights:
        return hashlib.file_digest(weights, "blake2b").hexdigest()[:32]
