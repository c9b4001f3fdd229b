"""Line and scatter plots of a comparison, drawn from its figures (measured quantities) alone.

Each function returns None if no arm has the figures that it plots. Dot plots, with a row for each arm, are in
`dot_plots`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vae_cli.comparison.arms import Arm, Comparison, Family
from vae_cli.comparison.plot_layout import (
    axis_label,
    band,
    dotted_line,
    equal_elbo_lines,
    fit_to_points,
    height_with_legend,
    leave_out_far_curves,
    legend,
    log_ticks,
    name_outside,
    whole_ticks,
)
from vae_cli.comparison.plot_style import INK, WIDTH, Look, Looks, drawing, looks, save_png, text_color
from vae_cli.comparison.second_stage_plots import noise_level, predictor
from vae_cli.comparison.selection import SOURCES, source_title
from vae_cli.comparison.statistics import Statistic
from vae_cli.core.wording import capitalized

SIDES = ((5, 5), (-5, -11), (-5, 5))  # of a mark, in points: where the weights of neighboring families are written
Curves = dict[str, tuple[Any, list[Any]]]  # by the arm's label: x (points,), and y (points,) for each seed


def rate_distortion(comparison: Comparison) -> Figure | None:
    """Plot distortion against rate: a curve for each family of arms, bars of one standard deviation over seeds, and
    lines of equal ELBO."""
    families = [f for f in comparison.families if any(_point(arm) for arm in f.arms)]
    families.sort(key=lambda family: len(family.arms) == 1)  # the curves first, so that their weights alternate sides
    points = [(arm.label, *point) for family in families for arm in family.arms if (point := _point(arm))]
    if len(points) < 2:
        return None
    found = looks(comparison)
    with drawing(WIDTH, 5.2) as figure:
        axes = figure.add_subplot()
        main: list[tuple[Statistic, Statistic]] = []
        for number, family in enumerate(families):
            main += _draw_family(axes, comparison, family, found, SIDES[number % len(SIDES)])
        fit_to_points(axes, main)
        equal_elbo_lines(axes)
        axes.set_xlabel(axis_label(comparison, "rate"))
        axes.set_ylabel(axis_label(comparison, "distortion"))
        name_outside(axes, points)
        legend(figure, axes, len(families))
        return figure


def _point(arm: Arm) -> tuple[float, float] | None:
    rate, distortion = arm.stat("rate"), arm.stat("distortion")
    return None if rate is None or distortion is None else (rate.mean, distortion.mean)


def _draw_family(
    axes: Any, comparison: Comparison, family: Family, found: Looks, side: tuple[int, int]
) -> list[tuple[Statistic, Statistic]]:
    """Draw one family, with its weights at one side of its marks; return the points (rate, distortion) of its curve."""
    arms = [arm for arm in family.arms if _point(arm)]
    usual = next((arm for arm in arms if arm in comparison.usual and arm.beta != 0), arms[0])
    look = found[usual.label]
    ladder = [arm for arm in arms if arm.beta != 0] or arms
    points = []
    for arm in arms:
        rate, distortion = arm.stat("rate"), arm.stat("distortion")
        assert rate is not None
        assert distortion is not None
        filled = arm is usual or len(arms) == 1
        axes.errorbar(
            rate.mean, distortion.mean, xerr=rate.sd, yerr=distortion.sd, color=look.color, marker=look.marker,
            markersize=6.5, markerfacecolor=look.color if filled else "white", linestyle="none", elinewidth=1.2,
            zorder=4,
        )  # fmt: skip
        if arm in ladder:
            points.append((rate, distortion))
        if len(arms) > 1 and arm.beta is not None:
            axes.annotate(
                f"{arm.beta:g}", (rate.mean, distortion.mean), xytext=side, textcoords="offset points",
                ha="left" if side[0] > 0 else "right", fontsize=8, color=look.color, annotation_clip=True,
            )  # fmt: skip
    label = family.label + (" (numbers: beta)" if len(arms) > 1 else "")
    curve = sorted((x.mean, y.mean) for x, y in points)
    axes.plot(*zip(*curve, strict=True), color=look.color, linestyle=look.line, marker=look.marker, label=label)
    return points


def noise_and_bits(comparison: Comparison) -> Figure | None:
    """Plot the increase in distortion from noise (relative to decoding another image's code) and from quantization."""
    panels = [(draw, curves) for draw, curves in ((_noise, _noise_curves(comparison)), (_bits, _bit_curves(comparison)))
              if curves]  # fmt: skip
    if not panels:
        return None
    found = looks(comparison)
    with drawing(WIDTH, height_with_legend(comparison, 4.1)) as figure:
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (finish, curves) in zip(row, panels, strict=True):
            for arm in comparison.shown:
                if arm.label in curves:
                    x, values = curves[arm.label]
                    band(axes, arm, found[arm.label], x, np.array(values))
            if any((np.array(values) > 0).any() for _, values in curves.values()):  # else all codes are equal
                axes.set_yscale("log")
                log_ticks(axes.yaxis)
            finish(axes)
        legend(figure, row[0], len(comparison.shown))
        return figure


def _noise_curves(comparison: Comparison) -> Curves:
    found: Curves = {}
    for arm in comparison.shown:
        increases = []
        for member in arm.members:
            t, distortion = member.curve("noise_probe_t"), member.curve("noise_probe_distortion")
            other = member.scalar("noise_probe_stranger")
            if t and distortion and other is not None and other > distortion[0]:
                increases.append((np.array(distortion[1:]) - distortion[0]) / (other - distortion[0]))
                found[arm.label] = np.array(t[1:]), increases
    return found


def _bit_curves(comparison: Comparison) -> Curves:
    found: Curves = {}
    for arm in comparison.shown:
        costs = []
        for member in arm.members:
            bits, distortion = member.curve("quantization_bits"), member.curve("quantization_distortion")
            whole = member.scalar("quantization_unquantized")
            if bits and distortion and whole is not None:
                costs.append(np.array(distortion) - whole)
                found[arm.label] = np.array(bits), costs
    return found


def _noise(axes: Any) -> None:
    dotted_line(axes, 0.1, "a tenth")
    axes.set_xscale("log")
    axes.set_xlim(0.08, 3.3)  # at lower noise levels, the increase is quadratic for all arms
    axes.set_ylim(5e-3, 8)
    log_ticks(axes.xaxis)
    axes.set_title("Noise added to the code")
    axes.set_xlabel("noise level (aggregate standard deviations)")
    axes.set_ylabel("distortion increase,\nrelative to decoding another image's code")


def _bits(axes: Any) -> None:
    dotted_line(axes, 1.0, "1 nat")
    axes.set_ylim(2e-2, axes.get_ylim()[1])
    axes.set_title("Code quantized to a few bits")
    axes.set_xlabel("bits per active dimension")
    axes.set_ylabel("distortion increase (nats per image)")
    whole_ticks(axes.xaxis)


def rate_per_dimension(comparison: Comparison) -> Figure | None:
    """Draw the rate of each latent dimension, in descending order."""
    arms = [arm for arm in comparison.shown if arm.curves("rate_per_dimension")]
    if not arms:
        return None
    found = looks(comparison)
    with drawing(WIDTH, height_with_legend(comparison, 3.2)) as figure:
        axes = figure.add_subplot()
        for arm in arms:
            sizes = -np.sort(-np.array(arm.curves("rate_per_dimension")), axis=1)
            band(axes, arm, found[arm.label], np.arange(1, sizes.shape[1] + 1), sizes)
        axes.set_xlabel("latent dimension, by descending rate")
        axes.set_ylabel(axis_label(comparison, "rate"))
        axes.set_yscale("log")
        top = axes.get_ylim()[1]
        axes.set_ylim(max(axes.get_ylim()[0], top / 1e4), top)
        log_ticks(axes.yaxis)
        whole_ticks(axes.xaxis)
        legend(figure, axes, len(arms))
        return figure


def training(comparison: Comparison) -> Figure | None:
    """Plot the part of the rate due to the scales, and the mean sigma, against the epoch.

    Figures that are constant in all arms are left out.
    """
    curves = {"training_rate_scale": "rate_scale", "training_scale_mean": "scale_mean"}
    drawn = [
        name for name in curves if any(len({*curve}) > 1 for arm in comparison.shown for curve in arm.curves(name))
    ]
    if not drawn:
        return None
    with drawing(WIDTH, height_with_legend(comparison, 3.4)) as figure:
        panels = figure.subplots(1, len(drawn), squeeze=False)[0]
        for axes, name in zip(panels, drawn, strict=True):
            _draw_bands(axes, comparison, "training_epochs", name)
            axes.set_xlabel("epoch")
            whole_ticks(axes.xaxis)
            axes.set_ylabel(axis_label(comparison, curves[name]))
            if name == "training_scale_mean":
                dotted_line(axes, 1)
                axes.set_yscale("log")
                log_ticks(axes.yaxis)
            else:
                leave_out_far_curves(axes, comparison, name)
        legend(figure, panels[0], len(comparison.shown))
        return figure


def importance_weighted_bound(comparison: Comparison) -> Figure | None:
    """Plot the importance-weighted bound against the number of draws K."""
    if not any(arm.curves("iw_curve") for arm in comparison.shown):
        return None
    with drawing(WIDTH, height_with_legend(comparison, 3.4)) as figure:
        axes = figure.add_subplot()
        _draw_bands(axes, comparison, "iw_curve_k", "iw_curve")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("draws K")
        axes.set_ylabel("importance-weighted bound\n(nats per image)")
        leave_out_far_curves(axes, comparison, "iw_curve")
        legend(figure, axes, len(comparison.shown))
        return figure


def _draw_bands(axes: Any, comparison: Comparison, x_name: str, y_name: str) -> None:
    found = looks(comparison)
    for arm in comparison.shown:
        y, x = arm.curves(y_name), arm.curves(x_name)
        if y and x and len(x[0]) == len(y[0]):
            band(axes, arm, found[arm.label], np.array(x[0]), np.array(y))


def sigma_histograms(comparison: Comparison) -> Figure | None:
    """Draw a histogram of sigma over images and dimensions for each arm, split into active and idle dimensions."""
    arms = [arm for arm in comparison.shown if arm.curves("scale_histogram_edges")]
    if all(arm.has_constant_scale for arm in arms):  # also if there is no such arm
        return None
    found = looks(comparison)
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    with drawing(WIDTH, 0.75 + 1.35 * rows) as figure:
        panels = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
        for axes, arm in zip(panels, arms, strict=False):
            _draw_histogram(axes, arm, found[arm.label])
        for axes in panels[len(arms) :]:
            axes.set_visible(False)
        figure.supxlabel("sigma, on a logarithmic axis (filled: active dimensions, hatched: idle, dotted: sigma = 1)")
        figure.supylabel("share of all sigmas")
        return figure


def _draw_histogram(axes: Any, arm: Arm, look: Look) -> None:
    edges = np.array(arm.curves("scale_histogram_edges"))[0]
    parts = {}
    for kind in ("active", "idle"):
        counts = [c for c in arm.curves(f"scale_histogram_{kind}") if len(c) == len(edges) - 1]
        if counts:
            parts[kind] = np.array(counts).mean(0)
    total = sum(counts.sum() for counts in parts.values())
    bottom = np.zeros(len(edges) - 1)
    for kind, counts in parts.items():
        top = bottom + (counts / total if total else counts)
        filled = kind == "active"
        axes.stairs(
            top, edges, baseline=bottom, fill=True, linewidth=0.8, label=kind, hatch=None if filled else "/////",
            facecolor=look.color if filled else "white", edgecolor=look.color,
        )  # fmt: skip
        bottom = top
    axes.axvline(0, color=INK, linewidth=0.9, linestyle=":")
    axes.set_title(arm.label, color=text_color(look))
    axes.xaxis.set_major_formatter(lambda value, _: f"{10**value:.2g}")
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(2))
    axes.tick_params(labelbottom=True)


def precision_and_recall(comparison: Comparison) -> Figure | None:
    """Plot precision against recall, with a panel for each source of codes."""
    sources = [s for s in SOURCES if any(arm.stat(f"precision_{s}") for arm in comparison.shown)]
    if not sources:
        return None
    found = looks(comparison)
    with drawing(WIDTH, 3.5) as figure:
        panels = figure.subplots(1, len(sources), sharex=True, sharey=True, squeeze=False)[0]
        for axes, source in zip(panels, sources, strict=True):
            for arm in comparison.shown:
                x, y = arm.stat(f"recall_{source}"), arm.stat(f"precision_{source}")
                if x is None or y is None:
                    continue
                look = found[arm.label]
                axes.errorbar(
                    x.mean, y.mean, xerr=x.sd, yerr=y.sd, color=look.color, marker=look.marker, markersize=6,
                    linestyle="none", elinewidth=1, label=arm.label,
                )  # fmt: skip
            axes.set_title(capitalized(source_title(source)))
            axes.set_xlabel("recall")
        panels[0].set_ylabel("precision")
        legend(figure, panels[0], len(comparison.shown), below=True)
        return figure


# The plots that are saved as PNG files, by file name.
SAVED: Mapping[str, Callable[[Comparison], Figure | None]] = {
    "rate_distortion": rate_distortion,
    "noise_and_bits": noise_and_bits,
    "rate_per_dimension": rate_per_dimension,
    "scales": sigma_histograms,
    "training": training,
    "iw_bound": importance_weighted_bound,
    "noise_level": noise_level,
    "predictor": predictor,
}


def draw_all(comparison: Comparison) -> dict[str, Figure]:
    """Return the plots in SAVED by name, except plots for which no arm has the figures."""
    return {name: figure for name, draw in SAVED.items() if (figure := draw(comparison)) is not None}


def save_all(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write plots into a folder as PNG, and return their paths. Raises OSError if one cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SAVED.keys() - figures.keys():
        (folder / f"{name}.png").unlink(missing_ok=True)  # left from an earlier comparison
    paths = {name: folder / f"{name}.png" for name in figures}
    for name, path in paths.items():
        save_png(figures[name], path)
    return list(paths.values())
