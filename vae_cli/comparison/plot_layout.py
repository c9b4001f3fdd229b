"""Elements that plots share: axis labels, limits and ticks, bands, legends, and marks for values outside of axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from vae_cli.comparison.arms import Arm, Comparison
from vae_cli.comparison.findings import unit_of
from vae_cli.comparison.plot_style import FAINT, GRAY, INK, Look
from vae_cli.comparison.statistics import Statistic
from vae_cli.config.claims import entry
from vae_cli.core.wording import MINUS

Limits = tuple[float, float]


def axis_label(comparison: Comparison, name: str) -> str:
    """Return a figure's title with its unit: 'Rate (nats per image)'."""
    unit = unit_text(comparison, name)
    return f"{entry(name).title} ({unit})" if unit else entry(name).title


def unit_text(comparison: Comparison, name: str) -> str:
    """Return a figure's unit for an axis label: nats are written as nats per image."""
    unit = unit_of(comparison, name)
    return "nats per image" if unit == "nats" else unit


def limits(values: Sequence[tuple[float, float]]) -> Limits | None:
    """Return axis limits around values (mean, sd) without the outliers that would squeeze the others together.

    Outliers are at most a quarter of the values, separated by a gap of more than 2.5 times the range of the other
    values. None if there are no values.
    """
    inside = sorted(values)
    if not inside:
        return None
    while True:
        parts = []
        for place in range(1, len(inside)):
            many = max(inside[:place], inside[place:], key=len)
            gap, span = inside[place][0] - inside[place - 1][0], many[-1][0] - many[0][0]
            if 0 < 2.5 * span < gap and 4 * (len(values) - len(many)) <= len(values):
                parts.append(many)
        if not parts:
            break
        inside = max(parts, key=len)
    low, high = min(mean - sd for mean, sd in inside), max(mean + sd for mean, sd in inside)
    if low == high == 0:  # a share or a distance, which cannot be negative
        return -0.05, 1.0
    margin = 0.08 * (high - low) or 0.05 * abs(low)
    return low - margin, high + margin


def log_ticks(axis: Any, subs: Sequence[int] = (1, 2, 5)) -> None:
    """Label a logarithmic axis at 1, 2, 5, 10, 20 ... without exponents."""
    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def whole_ticks(axis: Any) -> None:
    """Put ticks at whole numbers only."""
    axis.set_major_locator(MaxNLocator(integer=True))


def fit_to_points(axes: Any, points: Sequence[tuple[Statistic, Statistic]]) -> None:
    """Set the limits of axes so that the points (x, y) and their error bars fit, without regard to outliers."""
    x, y = (limits([(point[axis].mean, point[axis].sd or 0.0) for point in points]) for axis in (0, 1))
    if x and y:
        axes.set_xlim(*x)
        axes.set_ylim(*y)


def fit_to_curves(axes: Any, curves: Sequence[Sequence[float]]) -> None:
    """Set the y-limits of axes so that the curves fill them."""
    if curves:
        low, high = min(min(curve) for curve in curves), max(max(curve) for curve in curves)
        margin = 0.06 * (high - low) or 0.05 * abs(low) or 0.05
        axes.set_ylim(low - margin, high + margin)


def name_outside(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """List points (label, x, y) that are outside of the axes, with their coordinates, in a note above the axes."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    outside = [(label, x, y) for label, x, y in points if not (left <= x <= right and low <= y <= high)]
    if outside:
        named = "; ".join(f"{label} ({x:.3g}, {y:.3g})" for label, x, y in outside[:3]).replace("-", MINUS)
        more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
        note_above(axes, f"outside the axes: {named}{more}")


def note_above(axes: Any, text: str) -> None:
    """Write a note above axes, on the right."""
    axes.set_title(text, loc="right", fontsize=8.5, fontweight="normal")


def arrows_outside(axes: Any, values: Sequence[float], inside: Limits, height: float, color: Any) -> None:
    """Draw arrows at the edges of axes for values outside of the limits, with the values next to them."""
    for is_right in (False, True):
        outside = sorted(value for value in values if (value > inside[1]) == is_right)
        if outside:
            ends = " to ".join(dict.fromkeys(f"{value:.3g}" for value in (outside[0], outside[-1])))
            ends = ends.replace("-", MINUS)
            axes.annotate(
                f"{ends} \N{RIGHTWARDS ARROW}" if is_right else f"\N{LEFTWARDS ARROW} {ends}",
                (0.99 if is_right else 0.01, height), xycoords=("axes fraction", "data"), fontsize=8, color=color,
                ha="right" if is_right else "left", va="center",
            )  # fmt: skip


def legend(figure: Figure, axes: Any, count: int, below: bool = False) -> None:
    """Put the legend of `count` arms to the right of a plot or, if `below` is true, below it."""
    handles, labels = axes.get_legend_handles_labels()
    if below:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, count)))
    elif handles:
        figure.legend(handles, labels, loc="outside right upper")


def height_with_legend(comparison: Comparison, least: float) -> float:
    """Return a plot height in inches, at least `least`, that leaves room for a legend of all arms next to the plot."""
    return max(least, 0.5 + 0.22 * len(comparison.shown))


def equal_elbo_lines(axes: Any) -> None:
    """Draw lines along which distortion + rate (= -ELBO) is constant, each labeled with its value."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    levels = MaxNLocator(7).tick_values(left + low, right + high)
    for level in levels:
        axes.plot([left, right], [level - left, level - right], color=FAINT, linewidth=0.8, zorder=0, scalex=False,
                  scaley=False)  # fmt: skip
        x = min(right, level - low)  # the line leaves the axes at their right or lower edge
        y = level - x
        if left < x and low <= y <= high and x - left > 0.06 * (right - left):
            axes.annotate(f"{level:g}".replace("-", MINUS), (x, y), xytext=(-3, 3), textcoords="offset points",
                          ha="right", fontsize=7.5, color=GRAY)  # fmt: skip
    on_white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.annotate("gray lines: equal distortion + rate (= minus ELBO)", (0.995, 0.985), xycoords="axes fraction",
                  ha="right", va="top", fontsize=8, color=GRAY, bbox=on_white, zorder=3)  # fmt: skip


def dotted_line(axes: Any, height: float, text: str = "") -> None:
    """Draw a dotted horizontal line, with `text` above its right end."""
    axes.axhline(height, color=INK, linewidth=0.9, linestyle=":")
    if text:
        axes.annotate(text, (1, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)


def band(axes: Any, arm: Arm, look: Look, x: Any, values: Any) -> None:
    """Draw the mean of an arm's curves (seeds, points), with a band of one standard deviation on either side."""
    mean = values.mean(0)
    marker = look.marker if len(x) <= 40 else None
    axes.plot(x, mean, color=look.color, linestyle=look.line, marker=marker, markersize=3.2, label=arm.label)
    if len(values) > 1:
        sd = values.std(0, ddof=1)
        axes.fill_between(x, mean - sd, mean + sd, color=look.color, alpha=0.18, linewidth=0)


def leave_out_far_curves(axes: Any, comparison: Comparison, name: str) -> None:
    """Set y-limits that ignore curves ending far from the others, and list the arms of these curves above the axes."""
    shown = comparison.shown
    ends = {arm.label: float(np.mean(curves, 0)[-1]) for arm in shown if (curves := arm.curves(name))}
    inside = limits([(end, 0.0) for end in ends.values()])
    outside = {label: end for label, end in ends.items() if inside and not inside[0] <= end <= inside[1]}
    if outside:
        near = [arm for arm in shown if arm.label in ends and arm.label not in outside]
        fit_to_curves(axes, [curve for arm in near for curve in arm.curves(name)])
        note_above(axes, "\n".join(f"outside the axes: {label}, ends at {end:.3g}" for label, end in outside.items()))
