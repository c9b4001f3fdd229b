"""The content of the terminal table: the arms of a comparison and their main figures."""

from __future__ import annotations

from collections.abc import Sequence

from vae_cli.comparison.arms import Arm, Comparison
from vae_cli.comparison.findings import amount_in
from vae_cli.comparison.selection import TERMINAL
from vae_cli.comparison.table import SummaryTable
from vae_cli.config.claims import entry
from vae_cli.core.wording import digits_for


def summary_table(comparison: Comparison) -> SummaryTable:
    """Return the table of the arms and their main figures."""
    arms = comparison.shown
    columns = {entry(name).title: _column(arms, name) for name in TERMINAL if any(arm.stat(name) for arm in arms)}
    seeds, hidden = len(comparison.seeds), len(comparison.arms) - len(arms)
    return SummaryTable(
        f"{len(comparison.members)} runs, {seeds} seed{'s' if seeds != 1 else ''}: mean ± standard deviation over "
        "seeds; rate, distortion and ELBO in nats per image",
        [arm.label for arm in arms],
        [str(len(arm.members)) for arm in arms],
        columns,
        f"{hidden} more arm{'s' if hidden != 1 else ''} with other weights: see the report" if hidden else "",
    )


def _column(arms: Sequence[Arm], name: str) -> list[str]:
    stats = [arm.stat(name) for arm in arms]
    digits = digits_for([stat.mean for stat in stats if stat is not None])
    return ["" if stat is None else amount_in(arm, stat, digits) for stat, arm in zip(stats, arms, strict=True)]
