"""The options that several subcommands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from vae_cli.core.files import expand_home
from vae_cli.terminal.completion import complete_run


def _trust(modules: list[str] | None) -> None:
    if modules:
        os.environ["VAE_TRUST"] = " ".join(modules)  # the worker processes of a sweep inherit it


def expanded(path: Path | None) -> Path | None:
    """Replace a leading ~, which the shell leaves as it is in --out=~/pictures. Raises UserError."""
    return None if path is None else expand_home(path, "FOLDER")


Run = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run's folder, a part of its name, or latest.", autocompletion=complete_run),
]
OptionalRun = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN", help="A run's folder, a part of its name, or latest.", autocompletion=complete_run,
        show_default=False,
    ),
]  # fmt: skip
Weights = Annotated[
    Literal["best", "last"],
    typer.Option(help="Weights with the lowest validation loss (best) or of the latest checkpoint (last)."),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Device to use: auto, cpu, cuda, cuda:1, mps ...")]
Seed = Annotated[int, typer.Option(metavar="N", help="Random seed.", min=0, max=2**32 - 1)]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Folder or file to write to.",
        show_default="inside the run's folder",
        callback=expanded,
    ),
]
RunsDir = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder that holds the runs.", callback=expanded)]
DataDir = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Folder that holds the datasets.", show_default="the one used in training"),
]
# Its callback does the work, so the functions ignore its value.
Trust = Annotated[
    list[str] | None,
    typer.Option(
        envvar="VAE_TRUST",
        metavar="MODULE",
        callback=_trust,
        help="Module of your own whose classes and functions may be used. Repeatable.",
    ),
]
