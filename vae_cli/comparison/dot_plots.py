"""Dot plots: a row for each arm, a panel for one or more figures, and bars of one standard deviation over seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vae_cli.comparison.arms import Arm, Comparison
from vae_cli.comparison.plot_layout import Limits, arrows_outside, limits, log_ticks, unit_text
from vae_cli.comparison.plot_style import GRAY, INK, MARKERS, WIDTH, Looks, drawing, looks, text_color
from vae_cli.comparison.selection import SOURCES
from vae_cli.config.claims import entry

ACROSS = 105  # characters of bold text that fit across the page


class Panel(NamedTuple):
    """One panel of dots.

    names   the names of the figures, each with its label in the legend (empty if there is only one figure)
    title   the text above the panel; if empty, the title of the first figure
    unit    the text below the panel; if empty, the unit of the first figure
    log     whether a logarithmic axis may be used
    line    a number, or the name of a figure, such as chance level, that is drawn as a vertical line, with its label in
            the legend
    joined  the number of figures, counted from the first, whose dots are connected by a line
    """

    names: Sequence[tuple[str, str]]
    title: str = ""
    unit: str = ""
    log: bool = False
    line: tuple[str | float, str] | None = None
    joined: int = 9


def jacobian_ratio(comparison: Comparison) -> Figure | None:
    """Draw how fast the decoded image changes with the code, relative to a linear decoder."""
    return dots(comparison, [Panel([("jacobian_ratio", "")], unit="ratio", line=(1.0, "a linear decoder"))])


def generalization(comparison: Comparison) -> Figure | None:
    """Draw how much worse test images are reconstructed than training images."""
    return dots(comparison, [Panel([("distortion_gap", "")])])


def jacobians(comparison: Comparison) -> Figure | None:
    """Draw the norms of the decoder's Jacobian at codes, halfway between codes and at draws from the prior."""
    places = [("codes", "at codes"), ("halfway", "halfway between codes"), ("prior", "at draws from the prior")]
    unit = "pixel values per standard deviation"
    sizes = {"frobenius": "In all directions combined (Frobenius norm)", "norm": "In the direction of fastest change"}
    panels = [
        Panel([(f"jacobian_{size}_{place}", word) for place, word in places], title, unit, log=True)
        for size, title in sizes.items()
    ]
    return dots(comparison, panels)


def neighbours(comparison: Comparison) -> Figure | None:
    """Draw how images change between codes, how often noise changes the class, and how often neighbors have the same
    label."""
    panels = [
        Panel([("largest_step_over_mean", "")], unit="ratio"),
        Panel([("midpoint_distance_to_training", "")]),
        Panel([("class_change_by_noise", "")], unit="share"),
        Panel([("neighbour_label_agreement", "")], unit="share", line=("neighbour_label_chance", "chance")),
    ]
    return dots(comparison, panels)


def shortcuts(comparison: Comparison) -> Figure | None:
    """Draw the figures that show whether the network takes a shortcut (claim 3)."""
    panels = [
        Panel([("collapsed_share", "")], unit="share"),
        Panel([("reidentification", "")], unit="share", line=("reidentification_chance", "chance")),
        Panel([("distortion_gap", "")]),
        Panel(
            [("linear_probe_loc", "of the mean code"), ("linear_probe_z", "of a noisy one")],
            "Linear probe for the label",
            "accuracy",
        ),
    ]
    return dots(comparison, panels)


def elbos(comparison: Comparison) -> Figure | None:
    """Draw the ELBO under the model's own prior and under refitted priors, and the importance-weighted bound."""
    names = [
        ("elbo", "ELBO, own prior"),
        ("elbo_gaussian_prior", "refitted Gaussian"),
        ("elbo_mixture_prior", "refitted mixture"),
    ]
    if bound := comparison.tightest_bound:
        names.append((bound, entry(bound).title))
    return dots(comparison, [Panel(names, " ", "nats per image", joined=3)])


def frechet_distances(comparison: Comparison) -> Figure | None:
    """Draw the Fréchet distance of decoded images, with a panel for each source of codes."""
    line = ("frechet_floor", entry("frechet_floor").title)
    panels = [Panel([(f"frechet_{source}", "")], unit="squared distance", log=True, line=line) for source in SOURCES]
    return dots(comparison, panels, share_x=True)


def dots(comparison: Comparison, panels: Sequence[Panel], share_x: bool = False) -> Figure | None:
    """Draw, side by side, the panels for which at least one arm has values; return None if there are no such panels."""
    arms, found = comparison.shown, looks(comparison)
    drawn = [p for p in panels if any(arm.stat(name) for arm in arms for name, _ in p.names)]
    if not drawn:
        return None
    across = ACROSS - round(0.9 * max(len(arm.label) for arm in arms))  # the labels are not bold, so they are narrower
    with drawing(WIDTH, 1.5 + 0.29 * len(arms)) as figure:
        figure.set_layout_engine("constrained", w_pad=0.09)
        row = figure.subplots(1, len(drawn), sharey=True, sharex=share_x, squeeze=False)[0]
        for axes, panel in zip(row, drawn, strict=True):
            inside = _limits_of(drawn if share_x else [panel], arms)
            _draw_panel(axes, panel, arms, found, inside)
            _draw_line(axes, panel, arms, inside, panel.unit or unit_text(comparison, panel.names[0][0]))
            _place_ticks(axes, inside, ticks=5 if len(drawn) < 3 else 4 if len(drawn) < 5 else 3)
            title = panel.title or entry(panel.names[0][0]).title
            axes.set_title(textwrap.fill(title, across // len(drawn)) if title.strip() else "")
        row[0].set_yticks(range(len(arms)), [arm.label for arm in arms])
        for label, arm in zip(row[0].get_yticklabels(), arms, strict=True):
            label.set_color(text_color(found[arm.label]))
        row[0].set_ylim(len(arms) - 0.4, -0.6)
        words = {word: handle for axes in row for handle, word in zip(*axes.get_legend_handles_labels(), strict=True)}
        if words:
            figure.legend(words.values(), words.keys(), loc="outside lower center", ncols=len(words))
        return figure


def _draw_panel(axes: Any, panel: Panel, arms: Sequence[Arm], found: Looks, inside: Limits | None) -> None:
    """Draw the marks of one panel, and arrows for values outside of its limits, if there are limits."""
    count = len(panel.names)
    for row, arm in enumerate(arms):
        color = found[arm.label].color
        stats = {place: stat for place, (name, _) in enumerate(panel.names) if (stat := arm.stat(name)) is not None}
        seen, beyond = [], []
        for place, stat in stats.items():
            height = row + (0 if count == 1 else (place / (count - 1) - 0.5) * 0.4)
            if inside and not inside[0] <= stat.mean <= inside[1]:
                beyond.append(stat.mean)
                continue
            if place < panel.joined:
                seen.append((stat.mean, height))
            axes.errorbar(
                stat.mean, height, xerr=stat.sd, color=color, marker=MARKERS[place], markersize=5.5,
                markerfacecolor=color if place == 0 else "white", elinewidth=1.3, capsize=2, zorder=3,
            )  # fmt: skip
        if inside:
            arrows_outside(axes, beyond, inside, row, text_color(found[arm.label]))
        if len(seen) > 1:
            axes.plot(*zip(*seen, strict=True), color=color, linewidth=0.8, zorder=2)
        if not stats:
            axes.annotate("not defined", (0.03, row), xycoords=("axes fraction", "data"), fontsize=8, va="center",
                          color=GRAY, style="italic")  # fmt: skip
    if count > 1:
        for place, (_, word) in enumerate(panel.names):
            fill = INK if place == 0 else "white"
            axes.plot([], [], MARKERS[place], color=INK, markerfacecolor=fill, markersize=5.5, label=word)
    axes.grid(visible=True, axis="y", color="#f0f0f0")
    axes.tick_params(axis="y", length=0)


def _draw_line(axes: Any, panel: Panel, arms: Sequence[Arm], inside: Limits | None, unit: str) -> None:
    """Label a panel's axis and draw its vertical line; if it is out of range, write its value below the axis."""
    place = _line_of(panel, arms)
    if place is not None and panel.line is not None:
        if inside and not inside[0] <= place <= inside[1]:
            unit = f"{unit}\n({panel.line[1]}: {place:.2g})"
        else:
            axes.axvline(place, color=INK, linewidth=1, linestyle=":", label=panel.line[1])
    axes.set_xlabel(unit)


def _place_ticks(axes: Any, inside: Limits | None, ticks: int) -> None:
    """Set the limits and ticks of a panel; if there are no limits, make the axis logarithmic."""
    if inside is None:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        log_ticks(axes.xaxis, (1, 2, 5) if ticks > 3 else (1, 3) if high < 100 * low else (1,))
        return
    axes.set_xlim(*inside)
    # If the ticks differ only in their last digits, their labels are long.
    is_long = inside[1] - inside[0] < 0.05 * max(abs(inside[0]), abs(inside[1]))
    axes.xaxis.set_major_locator(MaxNLocator(1 if is_long and ticks < 5 else ticks))


def _line_of(panel: Panel, arms: Sequence[Arm]) -> float | None:
    """Return the position of a panel's vertical line (of a figure, its mean over arms); None without a line."""
    if panel.line is None:
        return None
    place = panel.line[0]
    if not isinstance(place, str):
        return place
    found = [stat.mean for arm in arms if (stat := arm.stat(place)) is not None]
    return float(np.mean(found)) if found else None


def _limits_of(panels: Sequence[Panel], arms: Sequence[Arm]) -> Limits | None:
    """Return the limits of panels that share an axis; None if the axis is logarithmic."""
    names = [name for panel in panels for name, _ in panel.names]
    spans = [(stat.mean, stat.sd or 0.0) for arm in arms for name in names if (stat := arm.stat(name)) is not None]
    spans += [(line, 0.0) for panel in panels if (line := _line_of(panel, arms)) is not None]
    least, most = min(mean for mean, _ in spans), max(mean for mean, _ in spans)
    return None if panels[0].log and most > 3 * least > 0 else limits(spans)
