"""`vae runs`: the runs in a folder as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vae_cli.commands.options import expanded
from vae_cli.core.errors import UserError

EXAMPLES = """
vae runs  list all runs in runs/
vae runs runs/digits  list the runs on one dataset
vae runs --sort elbo  list the run with the best ELBO first
vae runs --where sigma=fixed --where latent=8  list only the runs with these settings
"""

Folder = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="Folder to search for runs, subfolders included.", callback=expanded),
]
Sort = Annotated[
    Literal["run", "status", "epochs", "distortion", "rate", "elbo", "seconds", "newest"],
    typer.Option(help="Sort by this: highest first for elbo, latest first for newest, ascending for all others."),
]
Reverse = Annotated[bool, typer.Option("--reverse", help="Reverse the order.")]
Where = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="List only runs with this setting, or with status=STATUS. Repeatable."),
]


def runs(folder: Folder = Path("runs"), sort: Sort = "run", reverse: Reverse = False, where: Where = None) -> None:
    """List runs with their status and test results."""
    from vae_cli.runs.find import find_runs, say_unreadable
    from vae_cli.runs.table import print_runs

    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Train a run first: vae train sigma=fixed")
    found = find_runs(folder, say_unreadable)
    if not found:
        raise UserError(f"There are no runs in {folder}. Train one first: vae train sigma=fixed")
    print_runs(found, folder, sort, reverse, where or ())
