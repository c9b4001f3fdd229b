"""`vae evaluate`: measure a finished run on images that it has not seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from vae_cli.comparison.arms import Comparison
from vae_cli.comparison.members import read_member
from vae_cli.comparison.plots import draw_all, save_all
from vae_cli.core.errors import UserError
from vae_cli.metrics.base import CLAIMS
from vae_cli.metrics.evaluate import METRICS, evaluate_run, find_metrics
from vae_cli.metrics.record import Profile, metrics_file, rank, stored_evaluation
from vae_cli.metrics.table import print_claim
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
    before = None if overwrite else stored_evaluation(folder)
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
        found = evaluate_run(
            folder, profile, kinds=kinds, before=before, samples=samples, seed=seed, weights=weights, device=device,
            data_dir=data_dir, say=say,
        )  # fmt: skip
    figures = draw_all(Comparison([replace(read_member(folder), evaluation=found)]))
    pictures = save_all(figures, metrics_file(folder).parent)
    out = Console()
    if not out.is_terminal:
        out.width = 120
    for claim, title in CLAIMS.items():
        print_claim(out, title, found, claim)
    for path in (metrics_file(folder), *pictures):
        out.print(str(path), soft_wrap=True, highlight=False, markup=False)
    out.print(f"{found['seconds']:.1f} s ({found['profile']}, seed {found['seed']})", highlight=False)
