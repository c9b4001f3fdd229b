"""Evaluate a finished run on its test images, and store the figures in its folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from vae_cli.axes.dataset.split import fingerprint
from vae_cli.config.claims import is_primary
from vae_cli.config.instantiate import find_class
from vae_cli.config.trust import in_shell
from vae_cli.core.compatibility import provided
from vae_cli.core.errors import Failure, UserError, nearest
from vae_cli.core.files import digest, refuse_unwritable, write_json
from vae_cli.machine.device import find_threads
from vae_cli.metrics.base import (
    BUDGETS,
    Figure,
    MeasuredRun,
    Metric,
    as_plain,
    compute_metrics,
    resample,
    undefined,
)
from vae_cli.metrics.record import FORMAT, MODULES, ON_REQUEST, Profile, metrics_file, stamp, word_for
from vae_cli.metrics.table import as_page, shown_first
from vae_cli.runs.folder import RunDir, refuse_link
from vae_cli.runs.run import Run
from vae_cli.training.tensorboard import add_scalars

GROUP = "vae evaluate"  # of the tags in TensorBoard; it comes after the curves of training
REUSED_IF_EQUAL = ("format", "profile", "seed", "weights", "weights_digest", "images")

METRICS: tuple[type[Metric], ...] = tuple(
    getattr(import_module(f"vae_cli.metrics.{module}"), name) for module, names in MODULES.items() for name in names
)
USUAL = tuple(kind for kind in METRICS if kind.__name__ not in ON_REQUEST)


def word(kind: type[Metric]) -> str:
    """Return the command-line name of a metric, such as noise_probe for NoiseProbe."""
    return word_for(kind.__name__)


def find_metrics(words: Sequence[str]) -> list[type[Metric]]:
    """Return the metrics with these names. A name with a dot, such as mine.Loudness, is a class in a user's own module.

    Raises UserError if there is no such metric or class, or if the module is not trusted (see --trust).
    """
    known = {word(kind): kind for kind in METRICS}
    found: list[type[Metric]] = []
    for name in words:
        if name in known:
            found.append(known[name])
        elif "." in name:
            found.append(find_class(name, "--metrics", Metric))
        else:
            raise UserError(
                f"--metrics {name}: there is no metric with this name.{nearest(name, known)} Metrics: "
                f"{', '.join(known)}."
            )
    return found


def evaluate_run(
    folder: RunDir,
    profile: Profile = "default",
    *,
    kinds: Sequence[type[Metric]] = USUAL,
    before: Mapping[str, Any] | None = None,
    samples: int | None = None,
    seed: int = 0,
    weights: Literal["best", "last"] = "best",
    device: str = "auto",
    data_dir: str | Path | None = None,
    out: Path | None = None,
    say: Callable[[str], object] = lambda name: None,
) -> dict[str, Any]:
    """Evaluate a run, write evaluation/metrics.json and TensorBoard scalars, and return the contents of metrics.json.

    If `out` is given, metrics.json is written there, and nothing is written into the run's folder. `before` is an
    earlier evaluation. If it used the same profile, seed, weights and images, its figures are kept,
    except those that are computed again. `say` is called with the name of each metric before it is computed. Raises
    UserError if the run is not finished, and UserError or Failure if it cannot be loaded or the folder cannot be
    written to.
    """
    target = metrics_file(folder) if out is None else out / metrics_file(folder).name
    _refuse_impossible(folder, target)
    begun = time.perf_counter()
    run = Run(folder.path, weights, device, data_dir)
    torch.set_num_threads(find_threads(run.config, run.model))
    if samples is None and before is not None and (before["profile"], before["format"]) == (profile, FORMAT):
        samples = before["budget"]["samples"]  # as many draws as before
    budget = BUDGETS[profile] if samples is None else replace(BUDGETS[profile], samples=samples)
    about = {"format": FORMAT, "run": folder.path.name, "profile": profile, "budget": asdict(budget), "seed": seed}
    about |= {"weights": weights, **_identity(run), "noise": sorted(provided(run.model.sigma))}
    kept = reusable(before, about, kinds)
    figures, left_out = measure(MeasuredRun(run, budget, seed), kinds, kept, say)
    if stamp(run.weights_file) != about["weights_stamp"]:
        raise Failure(f"{folder.path} was trained further or replaced during its evaluation. Evaluate it again.")
    found = {**about, "seconds": round(time.perf_counter() - begun, 1), "figures": figures, "left_out": left_out}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, found)
    if out is None:
        names = [name for name in shown_first(found) if name in figures]
        values = {f"{GROUP}/{name}": figures[name]["value"] for name in names}
        numbers = {tag: value for tag, value in values.items() if not isinstance(value, list)}
        add_scalars(folder.path, "evaluation", numbers, run.step, {f"{GROUP}/figures": as_page(found)})
    return found


def measure(
    subject: MeasuredRun, kinds: Sequence[type[Metric]], kept: Sequence[dict[str, Any]], say: Callable[[str], object]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute metrics, and return the `figures` and `left_out` entries of metrics.json, including the `kept` ones."""
    figures, left_out = kept
    for kind in kinds:
        say(word(kind))
        for name, figure in compute_metrics(subject, [kind])[kind.__name__].items():
            for entries in (figures, left_out):
                entries.pop(name, None)
            entry = _entry(figure, kind, subject.stream("resampling") if is_primary(name) else None)
            (left_out if entry["value"] is None else figures)[name] = entry
    return _in_order(figures), _in_order(left_out)


def _refuse_impossible(folder: RunDir, target: Path) -> None:
    """Raise UserError unless the run is finished, and UserError or Failure if `target` cannot be written."""
    status = folder.status()
    if status != "finished":
        raise UserError(
            f"{folder.path} is {status}, and only a finished run can be evaluated. To finish it, repeat its vae train "
            "command."
        )
    refuse_link(folder.path, "evaluation")
    elsewhere = f"Write the evaluation elsewhere: vae evaluate {in_shell(folder.path)} --out FOLDER"
    refuse_unwritable(target.parent, elsewhere)


def _identity(run: Run) -> dict[str, Any]:
    """Return the fields that identify the weights and images of a run."""
    return {
        "weights_stamp": stamp(run.weights_file),  # before the digest, so that a file replaced in between is noticed
        "weights_digest": digest(run.weights_file),
        "step": run.step,
        "images": fingerprint(run.splits),
    }


def reusable(
    before: Mapping[str, Any] | None,
    about: Mapping[str, Any],
    kinds: Sequence[type[Metric]],
    keys: Sequence[str] = REUSED_IF_EQUAL,
) -> list[dict[str, Any]]:
    """Return the `figures` and `left_out` entries of an earlier evaluation, except those of the metrics in `kinds`.

    Both are empty if the earlier evaluation differs in one of the keys: profile, seed, weights, images ...
    """
    computed = {kind.__name__ for kind in kinds}
    if before is None or any(before.get(key) != about[key] for key in keys):
        return [{}, {}]
    return [
        {name: entry for name, entry in before[part].items() if entry["metric"] not in computed}
        for part in ("figures", "left_out")
    ]


def _in_order(entries: dict[str, Any]) -> dict[str, Any]:
    """Return entries in the order of METRICS, whichever were computed again; those of the user's own metrics last."""
    places = {kind.__name__: place for place, kind in enumerate(METRICS)}
    return dict(sorted(entries.items(), key=lambda pair: places.get(pair[1]["metric"], len(places))))


def _entry(figure: Figure, kind: type[Metric], resampled: int | None) -> dict[str, Any]:
    """Return a figure as metrics.json stores it; `resampled` is the seed for resampling images, or None."""
    if resampled is not None and figure.parts is not None:
        figure = replace(figure, resampled=resample(figure.parts, resampled))
    try:
        plain = as_plain(figure)
    except ValueError:  # the model has diverged to extreme values
        plain = as_plain(undefined("the computed value is not finite"))
    return {**plain, "metric": kind.__name__, "claim": kind.claim}
