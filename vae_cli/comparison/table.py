"""The table that `vae compare` prints: arms as rows, and as many of the main figures as fit.

It can be printed from the cache, so this module must be fast to import.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

NARROW = 14  # characters in a line of a heading, on a terminal
LEAST = 3  # columns that are shown even if they do not fit


@dataclass(frozen=True)
class SummaryTable:
    """The arms and their numbers of runs, the columns by heading (most important first), and a remark below it."""

    title: str
    arms: list[str]
    counts: list[str]
    columns: dict[str, list[str]]
    below: str


def print_table(console: Console, table: SummaryTable) -> None:
    """Print a table: on a terminal, as many columns as fit; in a pipe, all columns, with one line per arm."""
    heads = {title: title for title in table.columns}
    if console.is_terminal:
        heads = {title: textwrap.fill(title, NARROW) for title in table.columns}
        cells = {title: max(map(len, [*heads[title].split("\n"), *table.columns[title]])) + 3 for title in heads}
        room = console.width - max(map(len, table.arms)) - 12
        while len(heads) > LEAST and sum(cells[title] for title in heads) > room:
            heads.popitem()
        if sum(cells[title] for title in heads) > room:
            _print_lists(console, table, list(heads))
            return
    else:
        console.width = 10_000  # a pipe has no width, so lines are never broken
    printed = Table(box=Table().box if console.is_terminal else None, title=escape(table.title), title_justify="left")
    printed.add_column("arm")
    printed.add_column("runs", justify="right")
    for head in heads.values():
        printed.add_column(escape(head), justify="right")
    for row, (arm, count) in enumerate(zip(table.arms, table.counts, strict=True)):
        printed.add_row(escape(arm), count, *(escape(table.columns[title][row]) for title in heads))
    console.print(printed)
    _print_below(console, table)


def _print_lists(console: Console, table: SummaryTable, titles: Sequence[str]) -> None:
    """Print each arm and its figures below each other, for a terminal that is too narrow for a table."""
    console.print(table.title, style="italic", highlight=False, markup=False)
    for row, (arm, count) in enumerate(zip(table.arms, table.counts, strict=True)):
        console.print(arm, style="bold", highlight=False, markup=False)
        for title, value in [("runs", count), *((title, table.columns[title][row]) for title in titles)]:
            if value:
                console.print(f"  {title}: {value}", highlight=False, markup=False)
    _print_below(console, table)


def _print_below(console: Console, table: SummaryTable) -> None:
    if table.below:
        console.print(table.below, soft_wrap=True, highlight=False, markup=False)
