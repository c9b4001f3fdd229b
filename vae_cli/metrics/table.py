"""The figures of one run as tables in the terminal, one table for each claim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vae_cli.config.claims import CLAIMS, Entry, entry

ARROWS = {"higher": "\N{UPWARDS ARROW}", "lower": "\N{DOWNWARDS ARROW}", "neither": ""}
WIDE = 110  # columns that a terminal needs to show notes next to the figures


def print_evaluation(console: Console, evaluation: Mapping[str, Any]) -> None:
    """Print the scalar figures of an evaluation by claim, and the reasons why other figures are not defined.

    Titles, and whether higher is better, come from config/figures.toml. A note is printed next to its figure, or below
    the table if the console is narrow.
    """
    names = [*evaluation["figures"].values(), *evaluation["left_out"].values()]
    others = dict.fromkeys(figure["claim"] for figure in names if figure["claim"] not in CLAIMS)
    titles = {name: f"{claim.number}. {claim.title}" for name, claim in CLAIMS.items()} | {one: one for one in others}
    for claim, title in titles.items():
        scalars = {
            name: figure
            for name, figure in evaluation["figures"].items()
            if figure["claim"] == claim and not isinstance(figure["value"], list)
        }
        if scalars:
            _print_table(console, title, scalars)
        for reason, left_out in _reasons(evaluation["left_out"], claim).items():
            console.print(f"Not defined: {'; '.join(left_out)}. Reason: {reason}.", style="dim", highlight=False,
                          markup=False)  # fmt: skip
    console.print(
        f"{ARROWS['higher']} higher is better, {ARROWS['lower']} lower is better; \N{PLUS-MINUS SIGN} standard error "
        "over a sample of N. For the definition and formula of a figure type vae explain FIGURE, for example: vae "
        "explain rate. Scripts can read the figures, by identifier, from metrics.json.",
        highlight=False, markup=False,
    )  # fmt: skip


def _print_table(console: Console, title: str, figures: Mapping[str, Mapping[str, Any]]) -> None:
    has_room = console.width >= WIDE
    notes = {name: figure["note"] for name, figure in figures.items() if figure.get("note")}
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("figure", overflow="fold")
    for heading in ("value", "\N{PLUS-MINUS SIGN}"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("unit", overflow="fold")
    table.add_column("N", justify="right", no_wrap=True)
    if has_room and notes:
        table.add_column("note", style="dim", overflow="fold")
    for name, figure in figures.items():
        error = f"{figure['error']:.2g}" if "error" in figure else ""
        count = f"{figure['count']:,}" if "count" in figure else ""
        cells = [_titled(entry(name)), show(figure["value"]), error, figure.get("unit", ""), count]
        table.add_row(*map(Text, [*cells, *([notes.get(name, "")] if has_room and notes else [])]))
    console.print(table)
    if not has_room:
        for name, note in notes.items():
            console.print(f"{entry(name).title}: {note}.", style="dim", highlight=False, markup=False)


def _titled(figure: Entry) -> str:
    return f"{figure.title} {ARROWS[figure.better]}".strip()


def _reasons(left_out: Mapping[str, Mapping[str, Any]], claim: str) -> dict[str, list[str]]:
    """Return the titles of a claim's undefined figures, grouped by reason."""
    reasons: dict[str, list[str]] = {}
    for name, figure in left_out.items():
        if figure["claim"] == claim:
            reasons.setdefault(figure["reason"], []).append(entry(name).title)
    return reasons


def show(value: float) -> str:
    """Return a number as text, with two decimals, or three significant digits if it is below 1.

    >>> [show(value) for value in (3.0, 12345.678, 0.012345)]
    ['3', '12,345.68', '0.0123']
    """
    if value == 0 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.3g}"
