"""The figures of one run as tables in the terminal: the headline figures with their meaning, or all figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vae_cli.config.claims import CLAIMS, FIGURES, GROUPS, TITLES, Entry, GroupName, entry, headlines
from vae_cli.core.wording import capitalized

ARROWS = {"higher": "\N{UPWARDS ARROW}", "lower": "\N{DOWNWARDS ARROW}", "neither": ""}
WIDE = 110  # columns that a terminal needs to show notes next to the figures
LISTED = 16  # values of a curve that are printed


def print_headlines(console: Console, evaluation: Mapping[str, Any]) -> None:
    """Print the headline figures of an evaluation and the figures that decide about claims, with their meaning, or the
    reason why they are not defined, by claim."""
    figures, left_out = evaluation["figures"], evaluation["left_out"]
    no_decoder, together = evaluation.get("no_decoder", ""), []
    count = 0
    for claim, title in TITLES.items():
        # Of a group that belongs to no claim, such as the factors that few datasets have, only what is defined.
        names = _headlines(claim, [*figures, *([] if claim in GROUPS else left_out)])
        # Codes without a decoder lack many figures for the same reason, which is given once.
        together += [name for name in names if name not in figures and left_out[name]["reason"] == no_decoder]
        names = [name for name in names if name not in together]
        if names:
            console.print(Text(title, style="bold"))
        for name in names:
            found = entry(name)
            if name in figures:
                _print_line(console, f"{_titled(found)}: {_amount(figures[name])}", found.definition)
            else:
                _print_line(console, f"{_titled(found)}: not defined", f"{capitalized(left_out[name]['reason'])}.")
        count += len(names)
    if together:
        titles = "; ".join(entry(name).title for name in together)
        console.print(f"Not defined: {titles}. Reason: {no_decoder}.", style="dim", highlight=False, markup=False)
    console.print(
        f"{ARROWS['higher']} higher is better, {ARROWS['lower']} lower is better; \N{PLUS-MINUS SIGN} standard error "
        f"over images. These are {count} of {len(figures) + len(left_out)} figures: --all prints the others, too.",
        highlight=False, markup=False,
    )  # fmt: skip


def shown_first(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the names of the headline figures of an evaluation and of the figures that decide about claims."""
    return [name for claim in TITLES for name in _headlines(claim, [*evaluation["figures"], *evaluation["left_out"]])]


def as_page(evaluation: Mapping[str, Any]) -> str:
    """Return a Markdown table of all figures of an evaluation that are numbers."""
    lines = ["| figure | value | ± | unit | meaning |", "|---|---:|---:|---|---|"]
    for name, figure in evaluation["figures"].items():
        if not isinstance(figure["value"], list):
            found, error = entry(name), f"{figure['error']:.2g}" if "error" in figure else ""
            cells = [_titled(found), show(figure["value"]), error, figure.get("unit", ""), found.definition]
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _print_line(console: Console, text: str, meaning: str) -> None:
    """Print a figure, and its meaning indented below it."""
    console.print(Padding(Text(text), (0, 0, 0, 3), expand=False))
    console.print(Padding(Text(meaning, style="dim"), (0, 0, 0, 6), expand=False))


def _amount(figure: Mapping[str, Any]) -> str:
    if isinstance(figure["value"], list):
        values, more = figure["value"][:LISTED], len(figure["value"]) - LISTED
        left = f" ... (and {more:,} more in metrics.json)" if more > 0 else ""
        return f"{', '.join(map(show, values))}{left} {figure.get('unit', '')}".rstrip()
    error = f" \N{PLUS-MINUS SIGN} {figure['error']:.2g}" if "error" in figure else ""
    return f"{show(figure['value'])}{error} {figure.get('unit', '')}".rstrip()


def _headlines(claim: GroupName, names: Iterable[str]) -> list[str]:
    """Return the names of the headline figures of a claim or group, and of the figure that decides, in register order.

    Of several importance-weighted bounds, the one with the most draws is returned."""
    wanted = {found.name for found in headlines(claim)}
    bounds = [name for name in names if name.startswith("iw_bound_k")]
    wanted |= {max(bounds, key=lambda name: int(name.removeprefix("iw_bound_k")))} if bounds else set()
    wanted |= {about.primary for name, about in CLAIMS.items() if name == claim}
    order = [found.name for found in FIGURES if found.claim == claim]
    known = [name for name in names if name in wanted and entry(name).claim == claim]
    places = {name: order.index("iw_bound_k{k}" if name in bounds else name) for name in known}
    return sorted(places, key=lambda name: places[name])


def print_evaluation(console: Console, evaluation: Mapping[str, Any]) -> None:
    """Print the scalar figures of an evaluation by claim, then the headline figures that are lists, and the reasons why
    other figures are not defined.

    Titles, and whether higher is better, come from config/figures.toml. A note is printed next to its figure, or below
    the table if the console is narrow.
    """
    names = [*evaluation["figures"].values(), *evaluation["left_out"].values()]
    others = dict.fromkeys(figure["claim"] for figure in names if figure["claim"] not in TITLES)
    titles = {str(name): title for name, title in TITLES.items()} | {one: one for one in others}
    for claim, title in titles.items():
        scalars = {
            name: figure
            for name, figure in evaluation["figures"].items()
            if figure["claim"] == claim and not isinstance(figure["value"], list)
        }
        if scalars:
            _print_table(console, title, scalars)
        for name, figure in evaluation["figures"].items():
            if figure["claim"] == claim and isinstance(figure["value"], list) and entry(name).headline:
                console.print(f"{_titled(entry(name))}: {_amount(figure)}", highlight=False, markup=False)
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
