"""The help of the subcommands: examples and choices below the options, in panels on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Exit, echo
from typer.core import TyperCommand, TyperGroup

from vae_cli.core.errors import UserError, nearest

if TYPE_CHECKING:
    from vae_cli.config.catalog import Group

Rows = list[tuple[str, str]]

MIN_WIDTH = 40  # columns that descriptions need beside the longest command


class Subcommands(TyperGroup):
    """The subcommands of `vae`, in the order in which they are registered."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a subcommand by name; `help NAME` is `NAME --help`. If it does not exist, raises UserError, which
        suggests the closest name."""
        if args[0] == "help" and not ctx.resilient_parsing:
            if len(args) == 1:
                echo(ctx.get_help())
                raise Exit
            if len(args) > 2:
                raise UserError(f"'vae help' shows the help of one subcommand: type vae help {args[1]}")
            args = [args[1], "--help"]
        name = args[0]
        if self.get_command(ctx, name) is None and not ctx.resilient_parsing and not name.startswith("-"):
            names = self.list_commands(ctx)
            hint = nearest(name, names)
            if not hint and "=" in name:
                hint = f" Did you mean 'vae train {name}'?"
            raise UserError(f"There is no subcommand '{name}'.{hint} Subcommands: {', '.join(names)}.")
        return super().resolve_command(ctx, args)


class Command(TyperCommand):
    """A subcommand whose help ends with its examples.

    Its epilog has one example per line: the command, two spaces, and what the command does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.examples: str = kwargs.pop("epilog", None) or ""
        super().__init__(*args, **kwargs)

    def sections(self) -> Iterator[tuple[str, Rows]]:
        """Yield the title and the rows of each section below the options."""
        lines = [line.strip().partition("  ") for line in self.examples.splitlines()]
        yield "Examples", [(command, effect.strip()) for command, _, effect in lines if command]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the sections as plain text."""
        for title, rows in self.sections():
            with formatter.section(title):
                formatter.write_dl(rows, col_max=34)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, with a panel for each section on a terminal."""
        super().format_help(ctx, formatter)
        if self.rich_markup_mode is not None:
            _print_panels(self.sections())


class TrainCommand(Command):
    """`vae train`, whose help also lists the choices and settings in the configuration files."""

    def sections(self) -> Iterator[tuple[str, Rows]]:
        """Yield the examples, then the choices of each group, then the settings."""
        from vae_cli.config import catalog

        yield from super().sections()
        defaults = catalog.defaults()
        for group in [*catalog.groups(*_own_folders()).values(), catalog.launchers()]:
            default = defaults.get(group.name)
            yield (
                _group_title(group, default.comment if default else ""),
                [
                    (f"{name} (default)" if default and name == default.default else name, choice.description)
                    for name, choice in group.choices.items()
                ],
            )
        yield (
            "Settings (vae train KEY=VALUE)",
            [(f"{setting.key}={setting.default}", setting.comment) for setting in catalog.settings().values()],
        )


def _own_folders() -> list[Path]:
    """Return the folder of the user's own choices, if it is typed: the help is printed before options are parsed."""
    flag = "--config-dir"
    for word, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        folder = following if word == flag else word.removeprefix(f"{flag}=")
        if folder != word and Path(folder).is_dir():
            return [Path(folder)]
    return []


def _group_title(group: Group, comment: str) -> str:
    if group.name == "schedule":
        return "schedule (vae train +schedule@regularizer.beta=CHOICE)"
    if group.name == "hydra/launcher":
        return "hydra/launcher (how to run the jobs of a sweep: vae train -m ... hydra/launcher=CHOICE)"
    return f"{group.name} ({comment})" if comment else group.name


def _print_panels(sections: Iterator[tuple[str, Rows]]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for title, rows in sections:
        table = Table(box=None, show_header=False, padding=(0, 1), expand=True)
        table.add_column(style="bold cyan", overflow="fold", ratio=None)
        if max(len(left) for left, _ in rows) + MIN_WIDTH > console.width:  # one below the other
            for left, right in rows:
                table.add_row(Text(left))
                table.add_row(Padding(Text(right, style="not bold default"), (0, 0, 0, 4)))
        else:
            table.add_column(ratio=1)
            for left, right in rows:
                table.add_row(Text(left), Text(right))
        console.print(Panel(table, title=Text(title), title_align="left", border_style="dim"))
