"""`vae explain`: what a figure (a measured number), a claim, a choice or a setting means."""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vae_cli.commands.options import expanded
from vae_cli.terminal.completion import complete_word

if TYPE_CHECKING:
    from vae_cli.config.glossary import Meaning

EXAMPLES = """
vae explain  list all figures by claim, and all choices by group
vae explain rate  a figure: definition, formula, unit, direction, source
vae explain iw_bound_k64  a figure, under the name that vae evaluate prints
vae explain sigma=fixed  a choice: what it does, its formula, its settings, its paper
vae explain free_bits  a choice without its group
vae explain network.width  a setting
vae explain bits  a claim, and the figures that test it
vae explain velocity_variance  a metric of vae evaluate
"""

WIDEST = 100  # columns of text; longer lines are hard to read


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="WORD",
        help="A figure, a claim, a choice, a group, a setting or a metric; without WORD, list all figures and choices.",
        autocompletion=complete_word,
    ),
]
ConfigDir = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder with your own choices, as for vae train.", callback=expanded),
]


def explain(words: Words = None, config_dir: ConfigDir = None) -> None:
    """Explain a figure (a reported quantity), a claim, a choice or a setting.

    Prints its definition, formula, unit and paper."""
    from vae_cli.config.glossary import overview
    from vae_cli.core.errors import UserError

    if config_dir is not None and not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir}: this folder does not exist.")
    folders = [config_dir] if config_dir is not None else []
    width = min(WIDEST, shutil.get_terminal_size().columns)
    meanings = _meanings(" ".join(words), folders) if words else overview(*folders)
    for number, meaning in enumerate(meanings):
        if number:
            typer.echo()
        _print(meaning, width)
    if not words:
        typer.echo("\nType vae explain WORD for any of these words, for example: vae explain rate")


def _meanings(word: str, folders: list[Path]) -> list[Meaning]:
    """Return all meanings of a word; that of a metric only if it has no other, since many are named like a figure."""
    from vae_cli.config.glossary import Meaning, documentation, explain_word
    from vae_cli.core.errors import UserError
    from vae_cli.metrics.record import MODULES, metric_words

    try:
        return explain_word(word, *folders)
    except UserError:
        if (name := metric_words().get(word)) is None:
            raise
    module = next(module for module, names in MODULES.items() if name in names)
    text = documentation(f"vae_cli.metrics.{module}.{name}")
    return [Meaning(word, "metric", text, [("usage", f"vae evaluate RUN --metrics {word}")])]


def _print(meaning: Meaning, width: int) -> None:
    """Print one meaning as paragraphs, facts and tables, with colors on a terminal."""
    heading = textwrap.fill(f"{meaning.name}  {meaning.kind}", width, subsequent_indent="  ")
    if heading.startswith(f"{meaning.name}  "):
        kind = heading.removeprefix(meaning.name)
        typer.echo(typer.style(meaning.name, bold=True) + typer.style(kind, dim=True))
    else:  # a name longer than a line
        typer.echo(typer.style(heading, bold=True))
    for paragraph in filter(None, meaning.text.split("\n\n")):
        is_laid_out = any(line.startswith(" ") or "   " in line for line in paragraph.splitlines())
        for line in _rows(paragraph) if is_laid_out else [paragraph]:
            hanging = " " * _second_column(line)
            for part in textwrap.wrap(line, width - 2, subsequent_indent=hanging, replace_whitespace=not is_laid_out):
                typer.echo(f"  {part}")
        typer.echo()
    _print_rows(meaning.facts, width, "cyan")
    is_after_blank = bool(meaning.text) and not meaning.facts
    for title, rows in meaning.tables:
        if not rows:
            continue
        if title:
            if not is_after_blank:
                typer.echo()
            typer.echo(f"  {typer.style(title, bold=True)}")
        _print_rows(rows, width, "green")
        is_after_blank = False


def _rows(paragraph: str) -> list[str]:
    """Return the lines of a paragraph, where a line that continues the second column of a row is joined to the row.

    >>> _rows("crop    side of the\\n        square\\nrange   white")
    ['crop    side of the square', 'range   white']
    """
    rows: list[str] = []
    for line in paragraph.splitlines():
        indent = len(line) - len(line.lstrip())
        if rows and indent == _second_column(rows[-1]) > len(rows[-1]) - len(rows[-1].lstrip()):
            rows[-1] += f" {line.strip()}"
        else:
            rows.append(line)
    return rows


def _second_column(line: str) -> int:
    """Return the column where a line's text begins: after its indentation, or after a name and two or more spaces.

    >>> _second_column("crop         side of the square"), _second_column("  indented"), _second_column("plain text")
    (13, 2, 0)
    """
    match = re.match(r" *(?:\S+(?: \S+)*  +)?", line)
    return min(match.end(), 40) if match else 0


def _print_rows(rows: list[tuple[str, str]], width: int, color: str) -> None:
    """Print two columns; a long left cell gets its own line."""
    if not rows:
        return
    column = min(max(len(left) for left, _ in rows), 2 * width // 5)
    for left, right in rows:
        lines = textwrap.wrap(right, max(20, width - column - 6))
        if len(left) <= column and lines:
            typer.echo(f"  {typer.style(left.ljust(column), fg=color)}  {lines.pop(0)}")
        else:
            typer.echo(f"  {typer.style(left, fg=color)}".rstrip())
        for line in lines:
            typer.echo(f"  {' ' * column}  {line}")
