"""`vae train --repeat RUN`: train a finished run again and report what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vae_cli.axes.dataset.split import is_fingerprint_of
from vae_cli.config.build import build_experiment
from vae_cli.config.naming import flatten
from vae_cli.core.errors import UserError, nearest
from vae_cli.machine.launch import refuse_several
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.find import find_run
from vae_cli.runs.folder import RunDir
from vae_cli.runs.plan import Finished, plan
from vae_cli.runs.run import redirect_data
from vae_cli.training.lifecycle import run_experiment

MAY_DIFFER = ("data_dir", "device", "threads", "overwrite")  # settings that do not define a different run
COMPARED = ("versions", "git_commit", "device", "threads", "processes", "determinism")


def repeat_run(name: str, overrides: Sequence[str]) -> None:
    """Train a finished run again, in the folder <run>_repeat, and print how weights, figures and setups differ.

    Raises UserError or Failure if the run is not finished or cannot be trained here.
    """
    refuse_several("vae train --repeat")
    first = RunDir(find_run(name, Path("runs")))
    config, there = first.config(), first.summary()
    if first.status() != "finished":
        raise UserError(
            f"{first.path} is not finished. Finish it with the command that started it, then type --repeat again."
        )
    second = RunDir(first.path.with_name(f"{first.path.name}_repeat"))
    settings = _settings(overrides)
    config |= {"run_name": second.path.name, "overwrite": False, **settings}
    if "data_dir" in settings and settings["data_dir"] is None:  # the default folder
        config["dataset"].pop("data_dir", None)
    load = redirect_data(config, settings.get("data_dir"))
    if plan(second, config) != "finished":
        with load():
            experiment = build_experiment(config)
        images = load_checkpoint(first.checkpoint_file).get("images")
        if images is not None and not is_fingerprint_of(images, experiment.splits):
            raise UserError(f"The images of {first.path} have changed since it was trained, so it cannot be repeated.")
        with suppress(Finished):  # a finished repetition was put back, whose replacement had been killed
            run_experiment(experiment, second, Console(stderr=True))
    print(f"{first.path} was trained again as {second.path}")
    print_differences(first, second, there, second.summary())


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    import yaml

    settings = {}
    for word in overrides:
        key, is_setting, value = word.partition("=")
        if not is_setting or key not in MAY_DIFFER:
            raise UserError(
                f"--repeat trains the run with its own settings and does not accept {word!r}."
                f"{nearest(key, MAY_DIFFER)} It accepts only {', '.join(f'{name}=' for name in MAY_DIFFER)}."
            )
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            settings[key] = value
    return settings


def print_differences(first: RunDir, second: RunDir, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Print whether two runs are bit-identical, and how their figures and setups (versions, device ...) differ.

    `there` and `here` are the summaries of the first and the second run.
    """
    distance = largest_difference(*(load_checkpoint(run.checkpoint_file)["model"] for run in (first, second)))
    figures = {
        f"{split}/{name}": (value, here[split].get(name))
        for split in ("train", "validation", "test", "posterior")
        for name, value in there[split].items()
    }
    changed_figures = {name: pair for name, pair in figures.items() if pair[0] != pair[1]}
    before, after = (flatten({key: summary.get(key) for key in COMPARED}) for summary in (there, here))
    changed_setup = {
        key: (before.get(key), after.get(key)) for key in {**before, **after} if before.get(key) != after.get(key)
    }
    is_same = distance == 0 and not changed_figures
    if is_same:
        print(f"bit-identical: all weights and all {len(figures)} figures")
    else:
        print(
            f"not identical: weights differ by up to {distance:.3g}, and {len(changed_figures)} of {len(figures)} "
            "figures differ"
        )
        _print_pairs("figure", changed_figures)
    if changed_setup:
        _print_pairs("setup", changed_setup)
    if not is_same:
        print(
            "differences in the setup can change the order in which sums are computed, and so their rounding"
            if changed_setup
            else "versions, device and threads are the same, but the processor or the data may differ"
        )


def largest_difference(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """Return the largest absolute difference between two sets of weights; infinity if their names or shapes differ."""
    if first.keys() != second.keys() or any(first[name].shape != second[name].shape for name in first):
        return float("inf")
    return max(
        (float((a.double() - second[name].double()).abs().max()) for name, a in first.items() if a.numel()), default=0.0
    )


def _print_pairs(title: str, pairs: Mapping[str, tuple[Any, Any]]) -> None:
    table = Table(title, "first", "repeated", box=None)
    for name, pair in pairs.items():
        table.add_row(name, *("" if value is None else str(value) for value in pair))
    Console(width=None if Console().is_terminal else 10_000).print(table, highlight=False)
