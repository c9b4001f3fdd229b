"""The table printed at the end of training: figures, files, and commands to type next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vae_cli.config.claims import entry
from vae_cli.config.objective import PARTS
from vae_cli.config.trust import in_shell
from vae_cli.core.files import expand_home
from vae_cli.runs.folder import RunDir

ROWS = (
    *("distortion", "rate", "rate_loc", "rate_scale", "rate_bits", "elbo", "penalty", *PARTS, "loss", "active_units"),
)
WIDE = 120  # from this terminal width in columns, the definitions are printed next to the figures


def print_summary(console: Console, folder: RunDir, summary: dict[str, Any]) -> None:
    """Print a table of a finished run's figures, the names of its files, and commands to type next."""
    kind = "best" if summary["validation"] else "last"
    splits = [split for split in ("train", "validation", "test") if summary[split]]
    table = Table(
        title=f"{escape(str(folder.path))}, {kind} weights: epoch {summary['weights_of_epoch']} of {summary['epoch']}",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("unit")
    for split in splits:
        table.add_column(split, justify="right")
    has_room = console.width >= WIDE
    if has_room:
        table.add_column("", style="dim")
    for name in ROWS:
        if any(name in summary[split] for split in splits):
            digits = 0 if name == "active_units" else 2
            cells = [f"{summary[s][name]:.{digits}f}" if name in summary[s] else "" for s in splits]
            about = entry(name)
            table.add_row(about.title, about.unit, *cells, *([escape(about.definition)] if has_room else []))
    console.print(table)
    console.print(
        f"{summary['seconds']:.1f} s, {summary['images_per_second']:,.0f} images/s on {summary['device']}",
        highlight=False,
    )
    best = [folder.best_file] if folder.best_file.exists() else []
    written = [folder.checkpoint_file, *best, folder.summary_file, folder.metrics_file]
    console.print(
        f"written: {folder.path}/ with {', '.join(p.name for p in written)}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    runs = expand_home(summary["config"]["runs_dir"], "runs_dir")
    above = runs if folder.path.absolute().is_relative_to(runs.absolute()) else folder.path
    run = in_shell(folder.path)
    commands = [f"vae sample {run}", f"vae interpolate {run}", f"vae evaluate {run} --quick"]
    commands.append(f"tensorboard --logdir {shlex.quote(str(above))}")
    console.print(
        "next:", *(f"  {command}" for command in commands), sep="\n", soft_wrap=True, highlight=False, markup=False
    )


def print_summary_line(console: Console, folder: RunDir, summary: dict[str, Any]) -> None:
    """Print the test figures of one of many runs on one line."""
    console.print(f"  {summary_line(folder.path, summary)}", soft_wrap=True, highlight=False, markup=False)


def summary_line(path: Path, summary: Mapping[str, Any]) -> str:
    """Return the test figures of a finished run on one line, in nats per image."""
    names = [name for name in ("distortion", "rate", "elbo", "loss") if name in summary["test"]]
    shown = "  ".join(f"{name} {summary['test'][name]:.2f}" for name in names)
    return f"{shown}  in {summary['seconds']:.1f} s: {path}"
