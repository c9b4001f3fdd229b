"""The registry of subcommands, whose modules import nothing heavy until a command runs, to keep `vae --help` fast."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from vae_cli.commands import compare, evaluate, explain, export, interpolate, runs, sample, train
from vae_cli.core.garbage import collect_rarely
from vae_cli.machine.launch import refuse_several
from vae_cli.terminal.errors import exit_code, leave_pipe
from vae_cli.terminal.help import Command, Subcommands, TrainCommand

app = typer.Typer(
    name="vae",
    cls=Subcommands,
    epilog="Every subcommand has its own help: vae train --help",
    rich_markup_mode="rich" if sys.stdout is not None and sys.stdout.isatty() else None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=TrainCommand, epilog=train.EXAMPLES)(train.train)
app.command(cls=Command, epilog=sample.EXAMPLES)(sample.sample)
app.command(cls=Command, epilog=interpolate.EXAMPLES)(interpolate.interpolate)
app.command(cls=Command, epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(cls=Command, epilog=export.EXAMPLES)(export.export)
app.command(cls=Command, epilog=runs.EXAMPLES)(runs.runs)
app.command(cls=Command, epilog=compare.EXAMPLES)(compare.compare)
app.command(cls=Command, epilog=explain.EXAMPLES)(explain.explain)


def _show_version(is_given: bool) -> None:
    if is_given:
        from importlib.metadata import version

        typer.echo(f"vae {version('vae-cli')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _vae(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train variational autoencoders and measure what the encoder's noise does."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
    elif ctx.invoked_subcommand != "train":
        refuse_several(f"vae {ctx.invoked_subcommand}")


def run() -> int:
    """Run the command line, print the error that stops it, if any, and return the exit code."""
    return exit_code(lambda: app(prog_name="vae", standalone_mode=False))


def main() -> None:
    """Run the command line and exit.

    Exit codes: 0 success, 1 failure, 2 invalid input, 130 Ctrl-C, 141 broken pipe.
    """
    collect_rarely()
    if not os.environ.get("COLUMNS", "1").strip("0"):  # rich would print nothing on a terminal of no width
        del os.environ["COLUMNS"]
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell has closed it: vae runs >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (used until the process ends)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal without UTF-8 shows ? for a letter that it lacks
            stream.reconfigure(errors="replace")
    try:
        code = run()
    except BrokenPipeError:
        code = leave_pipe()
    except KeyboardInterrupt:  # a second Ctrl-C, while the first one was handled
        code = 130
    sys.exit(code)
