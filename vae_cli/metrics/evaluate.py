"""Measure a finished run on images that it has not seen, and keep what was found beside it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from vae_cli.axes.dataset.split import fingerprint
from vae_cli.config.instantiate import find_class
from vae_cli.core.errors import UserError, nearest
from vae_cli.core.files import write_json
from vae_cli.machine.device import find_threads
from vae_cli.metrics.base import BUDGETS, Figure, MeasuredRun, Metric, as_plain, compute_metrics, undefined
from vae_cli.metrics.record import FORMAT, MODULES, Profile, digest, metrics_file, stamp
from vae_cli.runs.folder import RunDir, refuse_link
from vae_cli.runs.run import Run
from vae_cli.training.tensorboard import add_scalars

KEPT_IF_SAME = ("profile", "seed", "weights", "weights_digest", "images")

METRICS: tuple[type[Metric], ...] = tuple(
    getattr(import_module(f"vae_cli.metrics.{module}"), name) for module, names in MODULES.items() for name in names
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


def evaluate_run(
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
        "weights_stamp": stamp(run.weights_file),  # before the digest: a file replaced in between is read again
        "weights_digest": digest(run.weights_file),
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
    subject = MeasuredRun(run, budget, seed)
    for kind in kinds:
        say(word(kind))
        for name, figure in compute_metrics(subject, [kind])[kind.__name__].items():
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
