"""`vae explain`: what a figure, a claim, a choice or a setting means."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vae_cli.config.glossary import Meaning

EXAMPLES = """
vae explain  list all figures by claim, and all choices by group
vae explain rate  a figure: definition, formula, unit, direction, source
vae explain iw_bound_k64  a figure as vae evaluate names it
vae explain sigma=fixed  a choice: what it does, its formula, its settings, its paper
vae explain free_bits  a choice without its group
vae explain network.width  a setting
vae explain bits  a claim, and the figures that speak to it
"""

WIDEST = 100  # columns of text; longer lines are hard to read


def _complete_word(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from vae_cli.config.glossary import words

    folder = ctx.params.get("config_dir")
    found = words(*([Path(folder)] if folder else []))
    return [(word, phrase) for word, phrase in found.items() if word.startswith(incomplete)]


Word = Annotated[
    str | None,
    typer.Argument(
        metavar="[WORD]",
        help="A figure, a claim, a choice, a group or a setting; without it, all of them.",
        autocompletion=_complete_word,
    ),
]
ConfigDir = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Folder with your own choices, as for vae train.")
]


def explain(word: Word = None, config_dir: ConfigDir = None) -> None:
    """Explain a figure, a choice or a setting: definition, formula, unit, paper."""
    from vae_cli.config.glossary import explain_word, overview
    from vae_cli.core.errors import UserError

    if config_dir is not None and not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir}: this folder does not exist.")
    folders = [config_dir] if config_dir is not None else []
    width = min(WIDEST, shutil.get_terminal_size().columns)
    meanings = overview(*folders) if word is None else explain_word(word, *folders)
    for number, meaning in enumerate(meanings):
        if number:
            typer.echo()
        _print(meaning, width)
    if word is None:
        typer.echo("\nType vae explain WORD for any of these words, for example: vae explain rate")


def _print(meaning: Meaning, width: int) -> None:
    """Print one meaning as paragraphs, facts and tables, with colors on a terminal."""
    typer.echo(f"{typer.style(meaning.name, bold=True)}  {typer.style(meaning.kind, dim=True)}")
    for paragraph in filter(None, meaning.text.split("\n\n")):
        is_laid_out = any(line.startswith(" ") for line in paragraph.splitlines()) or "\n    " in paragraph
        lines = paragraph.splitlines() if is_laid_out else textwrap.wrap(paragraph, width - 2)
        typer.echo("".join(f"  {line}\n" for line in lines))
    _print_rows(meaning.facts, width, "cyan")
    needs_blank = bool(meaning.facts)  # a paragraph has ended with a blank line
    for title, rows in meaning.tables:
        if rows:
            if needs_blank:
                typer.echo()
            if title:
                typer.echo(f"  {typer.style(title, bold=True)}")
            _print_rows(rows, width, "green")
            needs_blank = True


def _print_rows(rows: list[tuple[str, str]], width: int, color: str) -> None:
    """Print two columns; a long left cell has a line of its own."""
    if not rows:
        return
    column = min(max(len(left) for left, _ in rows), width // 3)
    for left, right in rows:
        lines = textwrap.wrap(right, max(20, width - column - 6)) or [""]
        if len(left) > column:
            typer.echo(f"  {typer.style(left, fg=color)}")
            lines = lines if right else []
        else:
            lines, first = lines[1:], lines[0]
            typer.echo(f"  {typer.style(left, fg=color)}{' ' * (column - len(left) + 2)}{first}".rstrip())
        typer.echo("".join(f"  {' ' * column}  {line}\n" for line in lines), nl=False)
