"""The figures of one run as tables on the terminal, grouped by claim."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_claim(console: Console, title: str, found: dict[str, Any], claim: str) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, justify in (("figure", "left"), ("value", "right"), ("+-", "right"), ("unit", "left"), ("N", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("", style="dim", overflow="fold")
    for name, entry in found["figures"].items():
        if entry["claim"] == claim and not isinstance(entry["value"], list):
            error = f"{entry['error']:.2g}" if "error" in entry else ""
            count = f"{entry['count']:,}" if "count" in entry else ""
            table.add_row(name, show(entry["value"]), error, entry.get("unit", ""), count, entry.get("note", ""))
    if table.row_count:
        console.print(table)
    reasons: dict[str, list[str]] = {}
    for name, entry in found["left_out"].items():
        if entry["claim"] == claim:
            reasons.setdefault(entry["reason"], []).append(name)
    for reason, names in reasons.items():
        console.print(f"left out: {', '.join(names)}: {reason}", style="dim", highlight=False, markup=False)


def show(value: float) -> str:
    """A figure in as many digits as a reader needs."""
    if value == 0 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.3g}"
