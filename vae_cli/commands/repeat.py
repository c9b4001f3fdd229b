"""`vae train --repeat RUN`: a finished run once more, and what differs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vae_cli.config.build import build_experiment
from vae_cli.config.naming import flatten
from vae_cli.core.errors import UserError, nearest
from vae_cli.machine.launch import refuse_several
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.find import find_run
from vae_cli.runs.folder import RunDir
from vae_cli.runs.plan import plan
from vae_cli.runs.run import redirect_data
from vae_cli.training.lifecycle import run_experiment

MAY_DIFFER = ("data_dir", "device", "threads", "overwrite")  # none of which makes another run
KEPT = ("versions", "git_commit", "device", "threads", "processes", "determinism")


def main(run: str, overrides: Sequence[str], **flags: Any) -> None:
    """Train a finished run again beside it, as <run>_repeat, and print where weights, figures or machines differ.

    Raises UserError or Failure where the run is not finished, or cannot be trained here.
    """
    refuse_several("vae train --repeat")
    for flag, value in flags.items():
        if value:
            raise UserError(f"--repeat trains the run as it was: leave out --{flag.replace('_', '-')}.")
    first = RunDir(find_run(run, Path("runs")))
    config, there = first.config(), first.summary()
    if first.status() != "finished":
        raise UserError(f"{first.path} is not finished. Type the command that started it again, and then repeat it.")
    second = RunDir(first.path.with_name(f"{first.path.name}_repeat"))
    settings = _settings(overrides)
    config |= {"run_name": second.path.name, "overwrite": False, **settings}
    if "data_dir" in settings and settings["data_dir"] is None:  # the usual place
        config["dataset"].pop("data_dir", None)
    place = redirect_data(config, settings.get("data_dir"))
    if plan(second, config) != "finished":
        with place():
            experiment = build_experiment(config)
        run_experiment(experiment, second, Console(stderr=True))
    print(f"{first.path} was repeated as {second.path}")
    report(first, second, there, second.summary())


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    import yaml

    settings = {}
    for word in overrides:
        key, is_setting, value = word.partition("=")
        if not is_setting or key not in MAY_DIFFER:
            raise UserError(
                f"--repeat trains the run as it was, and takes no {word!r}.{nearest(key, MAY_DIFFER)} "
                f"It takes {', '.join(f'{name}=' for name in MAY_DIFFER)}."
            )
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            settings[key] = value
    return settings


def report(first: RunDir, second: RunDir, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Print whether two runs have the same bits, and where not, by how much they differ and what else does."""
    apart = largest_difference(*(load_checkpoint(run.checkpoint_file)["model"] for run in (first, second)))
    figures = {
        f"{split}/{name}": (value, here[split].get(name))
        for split in ("train", "validation", "test", "posterior")
        for name, value in there[split].items()
    }
    moved = {name: pair for name, pair in figures.items() if pair[0] != pair[1]}
    machines = [{key: summary.get(key) for key in KEPT} for summary in (there, here)]
    before, after = (flatten(machine) for machine in machines)
    changed = {
        key: (before.get(key), after.get(key)) for key in {**before, **after} if before.get(key) != after.get(key)
    }
    if apart == 0 and not moved:
        print(f"the same: every weight and all {len(figures)} figures, to the last bit")
    else:
        print(f"not the same: weights differ by up to {apart:.3g}, and {len(moved)} of {len(figures)} figures differ")
        _show("figure", moved)
    if changed:
        _show("made with", changed)
    if apart or moved:
        why = "another version, device or number of threads adds up in another order" if changed else (
            "versions, device and threads are the same: the processor, or the data, may be others"
        )  # fmt: skip
        print(f"{why}\nnext:\n  vae compare {shlex.quote(str(first.path))} {shlex.quote(str(second.path))}")


def largest_difference(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """The greatest distance between two sets of weights; infinite where they are not the same weights."""
    if first.keys() != second.keys() or any(first[name].shape != second[name].shape for name in first):
        return float("inf")
    return max(
        (float((a.double() - second[name].double()).abs().max()) for name, a in first.items() if a.numel()), default=0.0
    )


def _show(title: str, pairs: Mapping[str, tuple[Any, Any]]) -> None:
    table = Table(title, "first", "repeated", box=None)
    for name, pair in pairs.items():
        table.add_row(name, *("" if value is None else str(value) for value in pair))
    Console(width=None if Console().is_terminal else 10_000).print(table, highlight=False)
