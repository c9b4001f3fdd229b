"""`vae evaluate`: measure a finished run on images that it has not seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from vae_cli.comparison.arms import Comparison
from vae_cli.comparison.members import read_member
from vae_cli.comparison.plots import Plots, save_all
from vae_cli.core.errors import UserError
from vae_cli.metrics.base import CLAIMS
from vae_cli.metrics.evaluate import METRICS, assess, find_metrics
from vae_cli.metrics.record import Profile, assessment, metrics_file, rank
from vae_cli.runs.find import find_run
from vae_cli.runs.folder import RunDir


def main(
    run: str,
    *,
    quick: bool,
    full: bool,
    metrics: str | None,
    samples: int | None,
    seed: int,
    weights: Literal["best", "last"],
    device: str,
    overwrite: bool,
    runs_dir: Path,
    data_dir: str | None,
) -> None:
    """Print what was measured, grouped by claim, and write it. Raises UserError or Failure."""
    if quick and full:
        raise UserError("--quick and --full do not go together; type one of them.")
    profile: Profile = "quick" if quick else "full" if full else "default"
    kinds = find_metrics([name.strip() for name in metrics.split(",")]) if metrics is not None else METRICS
    folder = RunDir(find_run(run, runs_dir))
    before = None if overwrite else assessment(folder)
    if before is not None and rank(before["profile"]) > rank(profile):
        asked = "" if profile == "default" else f" --{profile}"
        raise UserError(
            f"{folder.path} has a more thorough evaluation ({before['profile']}), whose place this one would take: "
            f"type vae evaluate {folder.path}{asked} --overwrite"
        )
    asked_for = {"profile": profile, "seed": seed, "weights": weights}
    if before is not None and metrics is not None and any(before[key] != value for key, value in asked_for.items()):
        there = ", ".join(f"{key} {before[key]}" for key in asked_for)
        raise UserError(
            f"{folder.path} has an evaluation with {there}, and these figures would take its place alone. Ask for the "
            "same, for all metrics, or add --overwrite."
        )
    console = Console(stderr=True)

    def say(name: str) -> None:
        if console.is_terminal:
            console.print(f"measuring {name}", style="dim")

    with console.status("this takes seconds with --quick, minutes without"):
        found = assess(
            folder, profile, kinds=kinds, before=before, samples=samples, seed=seed, weights=weights, device=device,
            data_dir=data_dir, say=say,
        )  # fmt: skip
    plots = Plots(Comparison([replace(read_member(folder), evaluation=found)]))
    pictures = save_all(plots, metrics_file(folder).parent)
    out = Console()
    if not out.is_terminal:
        out.width = 120
    for claim, title in CLAIMS.items():
        _print_claim(out, title, found, claim)
    for path in (metrics_file(folder), *pictures):
        out.print(str(path), soft_wrap=True, highlight=False, markup=False)
    out.print(f"{found['seconds']:.1f} s ({found['profile']}, seed {found['seed']})", highlight=False)


def _print_claim(console: Console, title: str, found: dict[str, Any], claim: str) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, justify in (("figure", "left"), ("value", "right"), ("+-", "right"), ("unit", "left"), ("N", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("", style="dim", overflow="fold")
    for name, entry in found["figures"].items():
        if entry["claim"] == claim and not isinstance(entry["value"], list):
            error = f"{entry['error']:.2g}" if "error" in entry else ""
            count = f"{entry['count']:,}" if "count" in entry else ""
            table.add_row(name, show(entry["value"]), error, entry.get("unit", ""), count, entry.get("note", ""))
    if table.row_count:
        console.print(table)
    reasons: dict[str, list[str]] = {}
    for name, entry in found["left_out"].items():
        if entry["claim"] == claim:
            reasons.setdefault(entry["reason"], []).append(name)
    for reason, names in reasons.items():
        console.print(f"left out: {', '.join(names)}: {reason}", style="dim", highlight=False, markup=False)


def show(value: float) -> str:
    """A figure in as many digits as a reader needs."""
    if value == 0 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.3g}"
