"""Plots of second stages: reconstruction and generation against the level of the noise, and how well viv predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vae_cli.comparison.arms import Comparison
from vae_cli.comparison.noise_families import LEVELS, RECONSTRUCTION, STAGES, NoiseFamily, generation
from vae_cli.comparison.plot_layout import axis_label, log_ticks
from vae_cli.comparison.plot_style import HUES, INK, LINES, MARKERS, WIDTH, Look, drawing
from vae_cli.comparison.second_stage import PREDICTED, PREDICTOR, SecondStages, second_stages
from vae_cli.comparison.statistics import Statistic
from vae_cli.config.claims import entry
from vae_cli.core.wording import MINUS, capitalized

APART = 0.035  # of an axis: the distance between the marks of two families at the same level
FAR = 3.0  # ratio of two values from which on an axis is logarithmic

FamilyLooks = Mapping[str, Look]


def family_looks(families: Sequence[NoiseFamily]) -> FamilyLooks:
    """Return the look of each family, by label: in these plots, a color stands for a family instead of an arm."""
    hues = [hue for hue in HUES if len(set(to_rgb(hue))) > 1]  # gray is for the arm without noise
    return {
        family.label: Look(
            to_rgb(hues[place % len(hues)]), LINES[place // len(hues) % len(LINES)], MARKERS[place % len(MARKERS)]
        )
        for place, family in enumerate(families)
    }


def noise_level(comparison: Comparison) -> Figure | None:
    """Plot reconstruction, and generation by each second stage, against the level of the noise: a column for each, and
    a row for each setting that is a level."""
    found = second_stages(comparison)
    if found is None:
        return None
    names = [RECONSTRUCTION] if any(arm.stat(RECONSTRUCTION) for arm in comparison.arms) else []
    names += [generation(stage) for stage in found.stages[::-1]]
    keys = [key for key in LEVELS if any(family.key == key for family in found.families)]
    known = family_looks(found.families)
    with drawing(WIDTH, 0.7 + 2.3 * len(keys)) as figure:
        grid = figure.subplots(len(keys), len(names), sharex="row", squeeze=False)
        for row, key in zip(grid, keys, strict=True):
            families = [family for family in found.families if family.key == key]
            for axes, name in zip(row, names, strict=True):
                _draw_column(axes, found, families, name, known)
                axes.set_xlabel(LEVELS[key])
            _place_levels(row[0], [family.level(arm) for family in families for arm in family.arms])
        for column, name in zip(grid.T, names, strict=True):
            _place_heights(found, column, name)
            column[0].set_title(_title(name))
        for row in grid:
            row[0].set_ylabel("Fréchet distance")
        _legend(figure, grid)
        return figure


def _title(name: str) -> str:
    stage = name.removeprefix("frechet_")
    return capitalized(STAGES.get(stage, "reconstruction").removeprefix("a "))


def _draw_column(
    axes: Any, found: SecondStages, families: Sequence[NoiseFamily], name: str, known: FamilyLooks
) -> None:
    """Draw one figure of some families: filled marks for levels that could be the best, a ring around the one with the
    lowest mean."""
    if found.silent is not None and (stat := found.silent.stat(name)) is not None:
        axes.axhline(stat.mean, color=INK, linewidth=1, linestyle=":", label=found.silent.label)
        if stat.interval is not None:
            axes.axhspan(*stat.interval, color=INK, alpha=0.07, linewidth=0)
    for family in families:
        arms, look = family.at(name), known[family.label]
        if not arms:
            continue
        x = [_beside_others(families, family, family.level(arm)) for arm in arms]
        stats = [stat for arm in arms if (stat := arm.stat(name)) is not None]
        y = [stat.mean for stat in stats]
        axes.plot(x, y, color=look.color, linestyle=look.line, linewidth=1.3, zorder=3)
        axes.errorbar(x, y, yerr=_ends(stats), color=look.color, linestyle="none", elinewidth=1, zorder=2)
        best = found.best(family, name.removeprefix("frechet_")) if name != RECONSTRUCTION else None
        could = [best is None or not best.is_judged or arm in best.candidates for arm in arms]
        for is_filled in (True, False):
            marks = [(a, b) for a, b, is_kept in zip(x, y, could, strict=True) if is_kept == is_filled]
            if marks:
                axes.plot(
                    *zip(*marks, strict=True), look.marker, color=look.color, markersize=4.5, zorder=4,
                    markerfacecolor=look.color if is_filled else "white",
                )  # fmt: skip
        if best is not None and len(arms) > 1:
            at = arms.index(best.arm)
            axes.plot(x[at], y[at], "o", color=look.color, markersize=9.5, markerfacecolor="none", zorder=5)
        axes.plot([], [], look.marker, color=look.color, linestyle=look.line, markersize=4.5, label=family.label)


def _ends(stats: Sequence[Statistic]) -> list[list[float]]:
    """Return how far the 95 % intervals reach below and above the means; 0 without an interval."""
    pairs = [(0.0, 0.0) if s.interval is None else (s.mean - s.interval[0], s.interval[1] - s.mean) for s in stats]
    return [[low for low, _ in pairs], [high for _, high in pairs]]


def _beside_others(families: Sequence[NoiseFamily], family: NoiseFamily, level: float) -> float:
    """Return where the mark of a family's level is drawn, so that families with the same level are apart."""
    low, high = _ends_of_axis([one.level(arm) for one in families for arm in one.arms])
    same = [one.label for one in families if level in map(one.level, one.arms)]
    return level * (high / low) ** (APART * (same.index(family.label) - (len(same) - 1) / 2))


def _ends_of_axis(levels: Sequence[float]) -> tuple[float, float]:
    return min(levels) / 1.5, max(levels) * 1.5


def _place_levels(axes: Any, levels: Sequence[float]) -> None:
    """Make the horizontal axis logarithmic, with a few ticks at round levels."""
    low, high = min(levels), max(levels)
    axes.set_xscale("log")
    axes.set_xlim(*_ends_of_axis(levels))
    log_ticks(axes.xaxis, (1,) if high >= 30 * low else (1, 3) if high >= 8 * low else (1, 2, 5))


def _place_heights(found: SecondStages, column: Sequence[Any], name: str) -> None:
    """Give the panels of a column the same vertical axis, which fits the means of the families: a wide interval, or an
    arm without noise that is far from them, must not flatten the curves."""
    means = [stat.mean for family in found.families for arm in family.arms if (stat := arm.stat(name)) is not None]
    if not means:
        return
    low, high = min(means), max(means)
    silent = found.silent.stat(name) if found.silent is not None else None
    is_log = high > FAR * low > 0
    near = (low / 2, high * 2) if low > 0 else (2 * low - high, 2 * high - low)
    if silent is not None and near[0] <= silent.mean <= near[1]:
        low, high = min(low, silent.mean), max(high, silent.mean)
    margin = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
    for axes in column:
        if is_log:
            axes.set_yscale("log")
            axes.set_ylim(low / 1.25, high * 1.25)
            log_ticks(axes.yaxis, (1, 2, 5) if high < 30 * low else (1,))
        else:
            axes.set_ylim(low - margin, high + margin)
            axes.yaxis.set_major_locator(MaxNLocator(4))
        if silent is not None and found.silent is not None and not low <= silent.mean <= high:
            arrow = "\N{UPWARDS ARROW}" if silent.mean > high else "\N{DOWNWARDS ARROW}"
            axes.annotate(
                f"{arrow} {found.silent.label} {silent.mean:.3g}", (0.98, 0.98 if silent.mean > high else 0.02),
                xycoords="axes fraction", ha="right", va="top" if silent.mean > high else "bottom", fontsize=7.5,
                color=INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5}, zorder=6,
            )  # fmt: skip


def _legend(figure: Figure, grid: Any) -> None:
    """Put one legend of all panels below the plot."""
    words = {
        word: handle
        for row in grid
        for axes in row
        for handle, word in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    rows = -(-len(words) // 7)
    figure.legend(words.values(), words.keys(), loc="outside lower center", ncols=-(-len(words) // rows))


def predictor(comparison: Comparison) -> Figure | None:
    """Plot the figure of flow matching against the velocity's irreducible variance: a point for each arm."""
    found = second_stages(comparison)
    if found is None or found.prediction is None:
        return None
    known = family_looks(found.families)
    owner = {arm.label: family.label for family in found.families for arm in family.arms}
    with drawing(WIDTH, 3.6) as figure:
        axes = figure.add_subplot()
        labels = set[str]()
        for arm, x, y in found.predicted:
            label = owner.get(arm.label, arm.label)
            look = known.get(label, Look((0.2, 0.2, 0.2), "-", "*"))
            xerr, yerr = (stat.sd if (stat := arm.stat(name)) else None for name in (PREDICTOR, PREDICTED))
            axes.errorbar(
                x, y, xerr=xerr, yerr=yerr, color=look.color, marker=look.marker, markersize=5.5, linestyle="none",
                elinewidth=1, label=None if label in labels else label,
            )  # fmt: skip
            labels.add(label)
        points = [(x, y) for _, x, y in found.predicted]
        for axis, values in zip("xy", zip(*points, strict=True), strict=True):
            if max(values) > FAR * min(values) > 0:
                getattr(axes, f"set_{axis}scale")("log")
                log_ticks(getattr(axes, f"{axis}axis"))
        axes.set_xlabel(axis_label(comparison, PREDICTOR))
        axes.set_ylabel(entry(PREDICTED).title)
        found_text = f"rank correlation {found.prediction.value:.2f}"
        if found.prediction.interval is not None:
            found_text += " [{:.2f}, {:.2f}]".format(*found.prediction.interval)
        axes.set_title(f"{found_text}, {found.prediction.n} arms".replace("-", MINUS), fontweight="normal")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
        return figure
