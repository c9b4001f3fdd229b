"""The tables of a report: columns, rows, cells and footnotes, as the template receives them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from vae_cli.config.claims import CLAIMS, entry

MISSING = "\N{EN DASH}"  # a figure that an arm does not have, or a setting


@dataclass(frozen=True)
class Column:
    """The heading of a column: a figure (its unit, its definition and which direction is better) or an arm."""

    title: str
    unit: str = ""
    definition: str = ""
    better: str = "neither"


@dataclass(frozen=True)
class Cell:
    """A cell: its text, the marks of its footnotes, and whether it differs from the reference."""

    text: str
    marks: list[str] = field(default_factory=list)
    differs: bool = False
    links: list[tuple[str, str]] = field(default_factory=list)  # texts and addresses, shown in place of the text


@dataclass(frozen=True)
class Row:
    """A row: an arm with its color, or a figure with its unit and identifier."""

    title: str
    cells: list[Cell]
    color: str = ""
    is_reference: bool = False
    unit: str = ""
    name: str = ""


@dataclass(frozen=True)
class Table:
    """A table; `footnotes` maps the text of each footnote to its mark."""

    head: str
    columns: list[Column]
    rows: list[Row]
    footnotes: Mapping[str, str] = field(default_factory=dict)


class Footnotes:
    """The distinct notes below a table, marked a, b, c ... z, aa, bb ...

    >>> footnotes = Footnotes()
    >>> [footnotes.mark(text) for text in ("one", "two", "one")]
    ['a', 'b', 'a']
    """

    def __init__(self) -> None:
        self.marks: dict[str, str] = {}

    def mark(self, text: str) -> str:
        """Return the mark of a note, and add the note if it is new."""
        place = len(self.marks)
        return self.marks.setdefault(text, chr(97 + place % 26) * (1 + place // 26))


def deciding() -> Table:
    """Return, for each claim, the figure that decides about it, what the claim predicts, and the margin."""
    rows = []
    for claim in CLAIMS.values():
        figure = entry(claim.primary)
        share = f"{100 * claim.margin:g} % of the reference arm's value"
        margin = share if claim.is_share else f"{claim.margin:g} {figure.unit}"
        direction = "higher" if claim.sign > 0 else "lower"
        cells = [Cell(figure.title.partition(", K")[0]), Cell(f"{direction} {claim.arms}"), Cell(margin.strip())]
        rows.append(Row(f"{claim.number}. {claim.title}", cells))
    return Table("claim", [Column(name) for name in ("figure that decides", "prediction", "margin")], rows)


def of_any_run(note: str) -> str:
    """Return the note of a figure without the number at its end, which differs from run to run.

    >>> of_any_run("the value lies between this and 9.22")
    'the value lies between this and a second estimate, which is in the evaluation of each run'
    """
    return re.sub(r" -?[0-9.]+$", " a second estimate, which is in the evaluation of each run", note)
