"""`vae train`: train the run, or the sweep of runs, that Hydra overrides specify."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer

from vae_cli.commands.options import Trust
from vae_cli.core.errors import UserError
from vae_cli.terminal.completion import complete_override, complete_run

EXAMPLES = """
vae train  train with the defaults
vae train sigma=fixed  fix sigma at 1 instead of learning it
vae train sigma=fixed sigma.value=0.5 latent=8  change settings, too
vae train -m sigma=learned,fixed,deterministic latent=2,8,32  sweep over nine runs
vae train -m sigma=learned,fixed hydra/launcher=joblib  train the runs in parallel
vae train -m sigma=learned,fixed latent=2,8 --dry-run  list the runs of a sweep without training
vae train +schedule@regularizer.beta=linear  replace a number with a schedule
vae train experiment=cv_vae_loss  train with the loss of a published model
vae train sigma=fixed --cfg job  show the configuration without training
vae train sigma=fixed --cfg job -p sigma  show the settings of one component
"""

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings that differ from the defaults.", autocompletion=complete_override
    ),
]
Multirun = Annotated[
    bool, typer.Option("--multirun", "-m", help="Sweep: train a run for each combination of comma-separated values.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check and list the runs without training. With -m, --cfg job does the same.")
]
Cfg = Annotated[
    Literal["job", "hydra", "all"] | None,
    typer.Option("--cfg", "-c", help="Show the composed configuration instead of training; with -m, list the runs."),
]
Package = Annotated[
    str | None, typer.Option("--package", "-p", metavar="PART", help="With --cfg: show only this part, e.g. sigma.")
]
Resolve = Annotated[
    bool, typer.Option("--resolve", help="With --cfg: replace references such as ${latent} with their values.")
]
Info = Annotated[
    Literal["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"] | None,
    typer.Option("--info", "-i", help="Show how Hydra composes the configuration."),
]
ConfigName = Annotated[
    str | None, typer.Option(metavar="NAME", help="Start from this file in --config-dir instead of train.yaml.")
]
ConfigDir = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Folder with choices of your own: sigma/mine.yaml adds sigma=mine."),
]
HydraHelp = Annotated[bool, typer.Option("--hydra-help", help="Show Hydra's own help.")]
Repeat = Annotated[
    str | None,
    typer.Option(
        metavar="RUN",
        help="Train a finished run again, in a folder next to it, and report what differs.",
        autocompletion=complete_run,
    ),
]


def train(
    overrides: Overrides = None,
    multirun: Multirun = False,
    dry_run: DryRun = False,
    cfg: Cfg = None,
    package: Package = None,
    resolve: Resolve = False,
    info: Info = None,
    config_name: ConfigName = None,
    config_dir: ConfigDir = None,
    hydra_help: HydraHelp = False,
    repeat: Repeat = None,
    trust: Trust = None,
) -> None:
    """Train one run, or sweep over many.

    Running the same command again resumes interrupted runs and skips finished ones.
    """
    overrides = overrides or []
    if multirun and cfg == "job":
        if package or resolve:
            raise UserError("--package and --resolve show the configuration of a single run: leave out -m.")
        dry_run, cfg = True, None
    flags = {
        "multirun": multirun,
        "cfg": cfg,
        "package": package,
        "resolve": resolve,
        "info": info,
        "config_name": config_name,
        "config_dir": config_dir,
        "hydra_help": hydra_help,
    }
    if repeat is not None:
        _repeat(repeat, overrides, {**flags, "dry_run": dry_run})
        return
    _train(overrides, flags, dry_run)


def _train(overrides: list[str], flags: dict[str, Any], lists_only: bool) -> None:
    """Train the runs that the overrides specify, or only list them."""
    for word in overrides:
        if word.strip().lstrip("+~").startswith(("hydra.run.dir", "hydra.sweep.subdir")):
            raise UserError(
                f"'{word}' would put the run where other commands cannot find it. Set run_name=... or runs_dir=... "
                "instead."
            )
    from vae_cli.config import hydra
    from vae_cli.core.listing import listing_once
    from vae_cli.sweeps.job import all_processes, task
    from vae_cli.sweeps.launcher import check_sweeps
    from vae_cli.sweeps.reporter import ConsoleReporter
    from vae_cli.sweeps.search import Search

    reporter, search = ConsoleReporter(lists_only), Search(lists_only=lists_only)
    if lists_only:
        for flag in ("cfg", "info", "hydra_help"):
            if flags[flag]:
                raise UserError(f"--dry-run and --{flag.replace('_', '-')} cannot be given together.")
        # A single run is checked as a sweep of one job: otherwise, its images would be loaded.
        reporter.is_single = not flags["multirun"]
        flags["multirun"] = True
    checks = check_sweeps(reporter.check, reporter, search.around, lists_only)
    with TemporaryDirectory() if lists_only else nullcontext() as unused, ExitStack() as stack:
        if unused is not None:  # Hydra writes into the folder of a sweep before it checks the jobs
            overrides = [*overrides, f"hydra.sweep.dir='{unused}/sweeps/now'"]
        for context in (listing_once(), search, checks):
            stack.enter_context(context)
        more = stack.enter_context(all_processes(flags))
        hydra.run(task, [*overrides, *more], **flags)


def _repeat(run: str, overrides: list[str], flags: Mapping[str, object]) -> None:
    """Train a run again, and print what differs. Raises UserError if flags are given too."""
    from vae_cli.training.repeat import repeat_run

    for flag, value in flags.items():
        if value:
            raise UserError(
                f"--repeat trains the run again with its original settings: leave out --{flag.replace('_', '-')}."
            )
    repeat_run(run, overrides)
