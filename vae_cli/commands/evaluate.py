"""`vae evaluate`: what the noise does in a trained run, measured on held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vae_cli.commands.options import DataDir, Device, Run, RunsDir, Seed, Trust, Weights, expanded
from vae_cli.core.errors import UserError

if TYPE_CHECKING:
    from vae_cli.metrics.record import Profile
    from vae_cli.runs.folder import RunDir

EXAMPLES = """
vae evaluate latest  compute all metrics that are defined for the run: takes minutes
vae evaluate latest --quick  use fewer images and draws: takes seconds
vae evaluate latest --full  use all test images, and 5000 draws for the importance-weighted bound
vae evaluate latest --metrics noise_probe,jacobian  compute only these metrics
vae evaluate latest --metrics bound --samples 1000  compute iw_bound_k1000
vae evaluate latest --metrics second_stage  train models of the codes, and measure the images that they generate
vae evaluate /shared/runs/a --quick --out a  evaluate a run in a folder that you cannot write to
"""

Quick = Annotated[bool, typer.Option("--quick", help="Use fewer images and draws.")]
Full = Annotated[bool, typer.Option("--full", help="Use all test images, also for the importance-weighted bound.")]
Metrics = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Metrics to compute, such as noise_probe, or a class of your own (with --trust), such as mine.Loudness.",
        show_default="all that are defined for the run, except second_stage, which takes minutes",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        help="Draws for the importance-weighted bound.",
        min=1,
        max=1_000_000,
        show_default="5000, or 64 with --quick; as before if metrics are added to an evaluation",
    ),
]
All = Annotated[bool, typer.Option("--all", help="Print all figures, by claim, instead of only the headline figures.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an evaluation that is damaged or more thorough than this one.")
]

Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder to write to. vae compare reads only evaluations inside a run's folder.",
        show_default="inside the run's folder",
        callback=expanded,
    ),
]


def evaluate(
    run: Run,
    quick: Quick = False,
    full: Full = False,
    metrics: Metrics = None,
    samples: Samples = None,
    seed: Seed = 0,
    weights: Weights = "best",
    device: Device = "auto",
    overwrite: Overwrite = False,
    out: Out = None,
    print_all: All = False,
    runs_dir: RunsDir = Path("runs"),
    data_dir: DataDir = None,
    trust: Trust = None,
) -> None:
    """Measure what the encoder's noise does in a trained run.

    The measurements use images that the run was not trained on.
    """
    from rich.console import Console

    from vae_cli.metrics.evaluate import USUAL, evaluate_run, find_metrics
    from vae_cli.metrics.record import metrics_file
    from vae_cli.runs.find import find_run
    from vae_cli.runs.folder import RunDir

    if quick and full:
        raise UserError("--quick and --full cannot be combined; use only one of them.")
    profile: Profile = "quick" if quick else "full" if full else "default"
    kinds = USUAL if metrics is None else find_metrics([name.strip() for name in metrics.split(",")])
    folder = RunDir(find_run(run, runs_dir))
    written = metrics_file(folder) if out is None else out / metrics_file(folder).name
    stored = None if overwrite else _stored_evaluation(folder, written, out is not None)
    if stored is not None:
        _refuse_to_replace(folder, stored, metrics is None, profile=profile, seed=seed, weights=weights)
    console = Console(stderr=True)

    def say(name: str) -> None:
        if console.is_terminal:
            console.print(f"measuring {name}", style="dim")

    with console.status("this takes seconds with --quick, otherwise minutes"):
        found = evaluate_run(
            folder, profile, kinds=kinds, before=stored, samples=samples, seed=seed, weights=weights, device=device,
            data_dir=data_dir, out=out, say=say,
        )  # fmt: skip
    _print(folder, found, written, print_all or metrics is not None, device, data_dir)


def _stored_evaluation(folder: RunDir, file: Path, is_elsewhere: bool) -> dict[str, Any] | None:
    """Return the evaluation in a file, or None if there is none.

    Raises Failure if it is damaged, and UserError if the file is outside the run's folder and belongs to another run.
    """
    from vae_cli.metrics.record import stored_evaluation

    if not is_elsewhere:
        return stored_evaluation(folder)
    stored = stored_evaluation(folder, file)
    if stored is None and file.exists():
        raise UserError(
            f"{file} is the evaluation of another run, or of other weights. Choose a different --out, or add "
            "--overwrite to replace it."
        )
    return stored


def _refuse_to_replace(folder: RunDir, stored: Mapping[str, Any], is_complete: bool, **asked: Any) -> None:
    """Raise UserError if this would replace a more thorough evaluation, or, with --metrics, one with other settings."""
    from vae_cli.metrics.record import rank

    if rank(stored["profile"]) > rank(asked["profile"]):
        raise UserError(
            f"There is a more thorough evaluation ({stored['profile']}) of {folder.path}, which this one would "
            "replace. To replace it, add --overwrite."
        )
    if not is_complete and any(stored[key] != value for key, value in asked.items()):
        there = ", ".join(f"{key} {stored[key]}" for key in asked)
        raise UserError(
            f"There is an evaluation of {folder.path} with {there}, which would be replaced by one with only the "
            "metrics you chose. Use the same settings, leave out --metrics, or add --overwrite."
        )


def _print(
    folder: RunDir, found: dict[str, Any], written: Path, prints_all: bool, device: str, data_dir: str | None
) -> None:
    """Print the headline figures or all of them, plot them, and print the paths of the files written."""
    from dataclasses import replace

    from rich.console import Console

    from vae_cli.comparison.arms import Comparison
    from vae_cli.comparison.members import read_member
    from vae_cli.comparison.plots import draw_all, save_all
    from vae_cli.comparison.run_plots import draw_run
    from vae_cli.metrics.table import print_evaluation, print_headlines

    figures = draw_run(folder, device, data_dir)
    figures |= draw_all(Comparison([replace(read_member(folder), evaluation=found)]))
    pictures = save_all(figures, written.parent)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    (print_evaluation if prints_all else print_headlines)(console, found)
    for path in (written, *pictures):
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)
    console.print(f"{found['seconds']:.1f} s (profile {found['profile']}, seed {found['seed']})", highlight=False)
