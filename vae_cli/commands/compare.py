"""`vae compare`: a report on finished runs, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vae_cli.commands.options import DataDir, Device, RunsDir, Trust, expanded
from vae_cli.terminal.completion import complete_metrics, complete_run

EXAMPLES = """
vae compare  compare all finished runs in runs/
vae compare runs/digits  compare the runs on one dataset
vae compare runs/digits/default runs/digits/sigma-fixed  compare two runs
vae compare runs/digits --reference "fixed 1.0"  choose the reference arm
vae compare runs/digits --metrics rate,quality  measure only these metrics if they are missing
vae compare runs/digits --profile default --jobs 4  evaluate more thoroughly, four runs at a time
"""

Runs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN", help="Runs, or folders of runs.", autocompletion=complete_run, show_default="all runs"
    ),
]
Profile = Annotated[
    Literal["quick", "default", "full"] | None,
    typer.Option(
        help="First evaluate the runs whose evaluation is missing or less thorough than this.",
        show_default="the most common profile among the runs' evaluations; quick if there are none",
    ),
]
Metrics = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Metrics to measure if they are missing, such as rate,quality, or all.",
        show_default="those that the setting metrics of the runs names; without any, all except second_stage",
        autocompletion=complete_metrics,
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(metavar="N", help="Runs to evaluate in parallel.", min=1, show_default="one per core, at most 8"),
]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="ARM",
        help="Arm to compare all other arms with, named as in the table.",
    ),
]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Also write TensorBoard curves of each arm's mean and SD over seeds.")
]
OutFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Folder to write to.",
        show_default="compare/ next to the runs",
        callback=expanded,
    ),
]


def compare(
    runs: Runs = None,
    profile: Profile = None,
    metrics: Metrics = None,
    jobs: Jobs = None,
    reference: Reference = None,
    tensorboard: TensorBoard = False,
    device: Device = "auto",
    out: OutFolder = None,
    runs_dir: RunsDir = Path("runs"),
    data_dir: DataDir = None,
    trust: Trust = None,
) -> None:
    """Compare finished runs and write a report.

    Runs that differ only in their seed form an arm."""
    from vae_cli.comparison import compare as comparison

    comparison.compare(
        runs or [],
        profile=profile,
        metrics=None if metrics is None else [name.strip() for name in metrics.split(",")],
        jobs=jobs,
        reference=reference,
        tensorboard=tensorboard,
        device=device,
        out=out,
        runs_dir=runs_dir,
        data_dir=data_dir,
    )
