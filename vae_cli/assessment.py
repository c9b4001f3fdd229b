"""Measure a finished run on images that it has not seen, and keep what was found beside it."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vae_cli.build import fingerprint
from vae_cli.check import is_finite
from vae_cli.device import find_threads
from vae_cli.errors import Failure, UserError, first_line, nearest
from vae_cli.events import add_scalars
from vae_cli.files import plain, read_text, write_json
from vae_cli.folder import RunDir
from vae_cli.metric.base import BUDGETS, Figure, Metric, Subject, as_plain, measure, undefined
from vae_cli.metric.bits import MutualInformation, NoiseProbe, Quantization, Rate, SignalToNoise
from vae_cli.metric.neighbours import ClassChange, Interpolation, Jacobian, NeighbourLabels
from vae_cli.metric.price import AggregateFit, Bound, RefittedPrior
from vae_cli.metric.quality import Quality
from vae_cli.metric.scales import PullOverTraining, ScaleDistribution
from vae_cli.metric.shortcuts import Collapse, Generalization, Probes, Reidentification
from vae_cli.output import refuse_link
from vae_cli.run import Run
from vae_cli.target import find_class

FORMAT = 1
KEPT_IF_SAME = ("profile", "seed", "weights", "weights_digest", "images")
Profile = Literal["quick", "default", "full"]
PROFILES: tuple[Profile, ...] = ("quick", "default", "full")  # each looks at more than the one before

# To add a metric: its class, and its name here.
METRICS: tuple[type[Metric], ...] = (
    *(Rate, SignalToNoise, MutualInformation, NoiseProbe, Quantization),
    *(Jacobian, Interpolation, ClassChange, NeighbourLabels),
    *(Collapse, Reidentification, Generalization, Probes),
    *(ScaleDistribution, PullOverTraining),
    *(Bound, AggregateFit, RefittedPrior, Quality),
)


def word(kind: type[Metric]) -> str:
    """A metric's name as it is typed: noise_probe."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def find_metrics(words: Sequence[str]) -> list[type[Metric]]:
    """The metrics of these names, or of these classes such as mine.Loudness, which have to be trusted. UserError."""
    known = {word(kind): kind for kind in METRICS}
    found: list[type[Metric]] = []
    for name in words:
        if name in known:
            found.append(known[name])
        elif "." in name:
            found.append(find_class(name, "--metrics", Metric))
        else:
            raise UserError(
                f"--metrics {name}: there is no such metric.{nearest(name, known)} Metrics: {', '.join(known)}."
            )
    return found


def metrics_file(folder: RunDir) -> Path:
    return folder.path / "evaluation" / "metrics.json"


def assessment(folder: RunDir) -> dict[str, Any] | None:
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
    is_same = found.get("weights_stamp") == _stamp(current) or _digest(current) == found["weights_digest"]
    return found if is_same else None


def _is_evaluation(found: Mapping[str, Any]) -> bool:
    """Whether what was measured has the form of it."""
    if found["profile"] not in PROFILES or not isinstance(found["budget"].get("samples"), int) or not plain(found):
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
    return all(isinstance(word, str) for word in words) and all(map(is_finite, numbers))


def assess(
    folder: RunDir,
    profile: Profile = "default",
    *,
    kinds: Sequence[type[Metric]] = METRICS,
    before: Mapping[str, Any] | None = None,
    samples: int | None = None,
    seed: int = 0,
    weights: Literal["best", "last"] = "best",
    device: str = "auto",
    data_dir: str | Path | None = None,
    say: Callable[[str], object] = lambda name: None,
) -> dict[str, Any]:
    """Measure a run, write evaluation/metrics.json and the scalars for TensorBoard, and return what was written.

    What was measured `before`, under the same settings, is kept beside it. `say` is told the name of each metric
    before it is computed. Raises UserError or Failure.
    """
    status = folder.status()
    if status != "finished":
        raise UserError(f"{folder.path} is {status}, and only a finished run is measured. Type its command again.")
    refuse_link(folder.path, "evaluation")
    begun = time.perf_counter()
    run = Run(folder.path, weights, device, data_dir)
    torch.set_num_threads(find_threads(run.config, run.model))
    if samples is None and before is not None:  # the draws of what is kept, and so of what is added
        samples = before["budget"]["samples"]
    budget = BUDGETS[profile] if samples is None else replace(BUDGETS[profile], samples=samples)
    about = {
        "format": FORMAT,
        "run": folder.path.name,
        "profile": profile,
        "budget": asdict(budget),
        "seed": seed,
        "weights": weights,
        "weights_stamp": _stamp(run.weights_file),  # before the digest: a file replaced in between is read again
        "weights_digest": _digest(run.weights_file),
        "step": run.step,
        "images": fingerprint(run.splits),
    }
    if before is not None and any(before.get(key) != about[key] for key in KEPT_IF_SAME):
        before = None
    names = {kind.__name__ for kind in kinds}
    figures, left_out = (
        {name: entry for name, entry in (before or {}).get(part, {}).items() if entry["metric"] not in names}
        for part in ("figures", "left_out")
    )
    subject = Subject(run, budget, seed)
    for kind in kinds:
        say(word(kind))
        for name, figure in measure(subject, [kind])[kind.__name__].items():
            for entries in (figures, left_out):
                entries.pop(name, None)
            entry = _entry(figure, kind)
            (left_out if entry["value"] is None else figures)[name] = entry
    found = {**about, "seconds": round(time.perf_counter() - begun, 1), "figures": figures, "left_out": left_out}
    metrics_file(folder).parent.mkdir(exist_ok=True)
    write_json(metrics_file(folder), found)
    scalars = {f"evaluation/{name}": entry["value"] for name, entry in figures.items() if _is_number(entry["value"])}
    add_scalars(folder.path, "evaluation", scalars, run.step)
    return found


def _entry(figure: Figure, kind: type[Metric]) -> dict[str, Any]:
    try:
        plain = as_plain(figure)
    except ValueError:  # of a model that has gone to extremes
        plain = as_plain(undefined("it came out as no finite number"))
    return {**plain, "metric": kind.__name__, "claim": kind.claim}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _stamp(file: Path) -> list[int]:
    """Size and time of writing: a file that has kept both need not be read to know that it is the same."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _digest(file: Path) -> str:
    with file.open("rb") as weights:
        return hashlib.file_digest(weights, "blake2b").hexdigest()[:32]
