"""The stored evaluation of a run, read without importing torch, which would take seconds."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from vae_cli.config.trust import in_shell
from vae_cli.core.errors import Failure, first_line
from vae_cli.core.files import digest, is_printable, read_text
from vae_cli.core.values import is_finite
from vae_cli.runs.folder import RunDir

FORMAT = 3  # evaluations of format 1 lack the resampling over images, and of format 2 the properties of the noise
Profile = Literal["quick", "default", "full"]
RESAMPLINGS = 100  # deviations by which a figure's dependence on the sample of images is stored
PROFILES: tuple[Profile, ...] = ("quick", "default", "full")  # each is more thorough than the one before

# All metrics, by module. To add a metric, add its class to a module and its name here.
MODULES = {
    "information": ("Rate", "SignalToNoise", "MutualInformation", "AggregateDensity"),
    "tolerance": ("NoiseProbe", "Quantization"),
    "dither": ("Dither",),
    "neighbours": ("Jacobian", "Interpolation", "ClassChange", "NeighbourLabels"),
    "shortcuts": ("Collapse", "Reidentification", "Generalization", "Probes"),
    "scales": ("ScaleDistribution", "PullOverTraining"),
    "scale_factor": ("ScaleFactor",),
    "price": ("Bound", "AggregateFit", "RefittedPrior"),
    "quality": ("Quality",),
    "second_stage": ("VelocityVariance", "SecondStage"),
    "factors": ("Mig", "Dci", "Sap", "FactorVaeScore"),
}
ON_REQUEST = frozenset({"SecondStage"})  # metrics that train models, and are computed only if they are asked for


def rank(profile: str) -> int:
    """Return how thorough a profile is: 0, 1 or 2; -1 if unknown."""
    return PROFILES.index(profile) if profile in PROFILES else -1


def word_for(name: str) -> str:
    """Return the command-line name of a metric.

    >>> word_for("NoiseProbe")
    'noise_probe'
    """
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def metric_words() -> dict[str, str]:
    """Return the class name of every metric, by its command-line name."""
    return {word_for(name): name for names in MODULES.values() for name in names}


def usual_metrics() -> frozenset[str]:
    """Return the class names of the metrics that belong to every evaluation."""
    return frozenset(metric_words().values()) - ON_REQUEST


def present(found: Mapping[str, Any]) -> set[str]:
    """Return the class names of the metrics that an evaluation contains."""
    entries = [*found.get("figures", {}).values(), *found.get("left_out", {}).values()]
    return {str(entry.get("metric")) for entry in entries} if found.get("format") == FORMAT else set()


def missing(found: Mapping[str, Any], wanted: Collection[str] | None = None) -> list[str]:
    """Return the class names of the metrics that an evaluation does not contain, of the wanted ones; without any, of
    those that belong to every evaluation."""
    inside, chosen = present(found), usual_metrics() if wanted is None else wanted
    return [name for names in MODULES.values() for name in names if name in chosen and name not in inside]


def metrics_file(folder: RunDir) -> Path:
    """Return the path of a run's stored evaluation."""
    return folder.path / "evaluation" / "metrics.json"


def stored_evaluation(folder: RunDir, file: Path | None = None) -> dict[str, Any] | None:
    """Return the stored evaluation of a run; None if there is none, or if the weights have changed since.

    It is read from `file`, by default the one in the run's folder. Raises Failure if the file is damaged or was written
    by a newer version.
    """
    again = f"To evaluate the run again type vae evaluate {in_shell(folder.path)} --overwrite"
    if file is not None:
        again += f" --out {shlex.quote(str(file.parent))}"
    kinds = {"weights": str, "weights_digest": str}
    found = _read(file or metrics_file(folder), kinds, again)
    if found is None:
        return None
    current = folder.weights_file(found["weights"])
    if not current.exists():
        return None
    is_same = found.get("weights_stamp") == stamp(current) or digest(current) == found["weights_digest"]
    return found if is_same else None


def stored_evaluation_of_codes(file: Path, again: str) -> dict[str, Any] | None:
    """Return the evaluation of codes that is stored in a file, or None if the file does not exist.

    Raises Failure if the file is damaged or was written by a newer version; the message ends with `again`.
    """
    return _read(file, {"codes_digest": str}, again)


def _read(file: Path, kinds: Mapping[str, type], again: str) -> dict[str, Any] | None:
    """Return the content of metrics.json, which must have the keys in `kinds`; None if the file does not exist."""
    try:
        found = json.loads(read_text(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise Failure(f"{file} is damaged: {first_line(error)}. {again}") from error
    kinds = {"format": int, "profile": str, "seed": int, **kinds}
    kinds |= {"images": str, "budget": dict, "figures": dict, "left_out": dict}
    if isinstance(found, dict) and found.get("format") == FORMAT:
        kinds |= {"noise": list}
    if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
        raise Failure(
            f"{file} has format {found['format']}, but this version of vae reads formats up to {FORMAT}. {again}"
        )
    if (
        not isinstance(found, dict)
        or not all(isinstance(found.get(key), kind) for key, kind in kinds.items())
        or not _is_evaluation(found)
    ):
        raise Failure(f"{file} is damaged. {again}")
    return found


def _is_evaluation(found: Mapping[str, Any]) -> bool:
    """Return whether an evaluation has the expected structure."""
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
    for entry in figures:
        resampled = entry.get("resampled", [])
        if not isinstance(resampled, list) or len(resampled) not in (0, RESAMPLINGS):
            return False
        numbers += resampled
    return {str}.issuperset(map(type, words)) and all(map(is_finite, numbers))


def stamp(file: Path) -> list[int]:
    """Return the size, mtime and ctime of a file.

    If they are unchanged, so are the contents: programs cannot set the ctime (on Windows, it is the time of creation).
    """
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
