"""The figures of a comparison: each is drawn from its numbers alone, and left out where there are none."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from vae_cli.comparison.arms import Arm, Comparison, Family
from vae_cli.core.files import replace_file

# Paul Tol's "bright" and "muted" schemes, which color-blind people can tell apart, the strongest first.
HUES = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#b8a000", "#2299cc", "#882255", "#666666", "#999933", "#cc7722")
LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.4)), (0, (5, 1.5, 1.2, 1.5)))
MARKERS = "osD^vP"
WIDTH = 9.6  # inches: the width of the page
INK, FAINT = "#333333", "#cccccc"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "figure.labelsize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.hashsalt": "vae",  # the same numbers give the same file
    "figure.constrained_layout.use": True,
}


class Look(NamedTuple):
    """How an arm is drawn everywhere: nothing else has its color and line together."""

    color: Any
    line: Any
    marker: str


def looks(comparison: Comparison) -> dict[str, Look]:
    """A look for every arm, by label. Arms that begin with the same word have one hue, and those that go on with the
    same words one tint, line and marker; those of a ladder of weights look like the arm whose ladder it is."""
    found: dict[str, Look] = {}
    hues: dict[str, int] = {}
    shown = {arm.label for arm in comparison.shown}
    rests = Counter(arm.label.partition(",")[2] for arm in comparison.shown)
    tints = [rest for rest, _ in sorted(rests.items(), key=lambda item: (item[0] != "", -item[1]))]
    for arm in comparison.shown:
        word, _, rest = arm.label.partition(",")
        found[arm.label] = _look(hues.setdefault(word, len(hues)), tints.index(rest))
    for family in comparison.families:
        of_shown = [found[arm.label] for arm in family.arms if arm.label in shown and arm.beta]
        look = of_shown[0] if of_shown else _look(hues.setdefault(family.label, len(hues)), 0)
        for arm in family.arms:
            found.setdefault(arm.label, look)
    return found


def _look(hue: int, tint: int) -> Look:
    color = np.array(to_rgb(HUES[hue % len(HUES)]))
    round_ = hue // len(HUES) + tint
    amount = (0.0, -0.4, 0.4, 0.2)[round_ % 4]
    color = color + (1 - color) * amount if amount > 0 else color * (1 + amount)
    return Look(tuple(color.tolist()), LINES[round_ % len(LINES)], MARKERS[round_ % len(MARKERS)])


def ink(look: Look) -> Any:
    """The color of a look for words, which have to be darker than lines."""
    return tuple(0.8 * part for part in look.color) if sum(look.color) > 1.5 else look.color


def hex_color(look: Look) -> str:
    """The color of a look as HTML has it."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in look.color)


class Panel(NamedTuple):
    """One panel of dots: a figure or several of every arm, each with a word where they are several."""

    title: str
    unit: str
    names: Sequence[tuple[str, str]]
    log: bool = False
    line: tuple[str, str] | None = None  # a figure that all arms share, such as chance, and its word
    joined: int = 9  # how many of the figures, from the first, a line joins


class Plots:
    """Draws the figures of one comparison, each once. What has no numbers in any arm is None."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.looks = looks(comparison)

    @cached_property
    def plane(self) -> Figure | None:
        """Distortion over rate: one curve per family of weights, points with bars over seeds, and lines of equal
        ELBO."""
        families = [f for f in self.comparison.families if any(_rate_and_distortion(arm) for arm in f.arms)]
        if sum(_rate_and_distortion(arm) for family in families for arm in family.arms) < 2:
            return None
        with drawing(WIDTH, 5.2) as figure:
            axes = figure.add_subplot()
            main: list[tuple[float, float]] = []
            for family in families:
                main += self._curve_of(axes, family)
            _frame(axes, main)
            _diagonals(axes)
            axes.set_xlabel("rate (nats per image)")
            axes.set_ylabel("distortion (nats per image)")
            _say_outside(axes, [(arm.label, *p) for f in families for arm in f.arms if (p := _point(arm))])
            _legend(figure, axes, len(families))
            return figure

    def _curve_of(self, axes: Any, family: Family) -> list[tuple[float, float]]:
        arms = [arm for arm in family.arms if _rate_and_distortion(arm)]
        usual = next((arm for arm in arms if arm in self.comparison.shown and arm.beta != 0), arms[0])
        look = self.looks[usual.label]
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
                points.append((rate.mean, distortion.mean))
            if len(arms) > 1 and arm.beta is not None:
                axes.annotate(
                    f"{arm.beta:g}", (rate.mean, distortion.mean), xytext=(5, 5), textcoords="offset points",
                    fontsize=8, color=look.color, annotation_clip=True,
                )  # fmt: skip
        drawn = sorted(points)
        label = family.label + (" (numbers: beta)" if len(arms) > 1 else "")
        axes.plot(*zip(*drawn, strict=True), color=look.color, linestyle=look.line, marker=look.marker, label=label)
        return points

    @cached_property
    def probes(self) -> Figure | None:
        """What a code tolerates: how much of the way to a stranger's distortion noise on it costs, and what it costs to
        keep it to a few bits."""
        noise: dict[str, tuple[Any, Any]] = {}
        bits: dict[str, tuple[Any, Any]] = {}
        for arm in self.comparison.shown:
            ways = []
            for member in arm.members:
                t, distortion = member.curve("noise_probe_t"), member.curve("noise_probe_distortion")
                stranger = member.scalar("noise_probe_stranger")
                if t and distortion and stranger is not None and stranger > distortion[0]:
                    ways.append((np.array(distortion[1:]) - distortion[0]) / (stranger - distortion[0]))
                    noise[arm.label] = np.array(t[1:]), ways
            costs = []
            for member in arm.members:
                b, distortion = member.curve("quantization_bits"), member.curve("quantization_distortion")
                whole = member.scalar("quantization_unquantized")
                if b and distortion and whole is not None:
                    costs.append(np.array(distortion) - whole)
                    bits[arm.label] = np.array(b), costs
        if not noise and not bits:
            return None
        with drawing(WIDTH, self._height(4.1)) as figure:
            panels = figure.subplots(1, 2 if noise and bits else 1, squeeze=False)[0]
            for axes, curves in zip(panels, [kind for kind in (noise, bits) if kind], strict=True):
                for arm in self.comparison.shown:
                    if arm.label in curves:
                        x, values = curves[arm.label]
                        self._band(axes, arm, x, np.array(values))
                if any((np.array(values) > 0).any() for _, values in curves.values()):  # else all codes were equal
                    axes.set_yscale("log")
                    _log_ticks(axes.yaxis)
                line, word = (0.1, "a tenth") if curves is noise else (1.0, "1 nat")
                axes.axhline(line, color=INK, linewidth=0.9, linestyle=":")
                axes.annotate(word, (1, line), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
                if curves is noise:
                    axes.set_xscale("log")
                    axes.set_xlim(0.08, 3.3)  # below, all that is seen is a square
                    axes.set_ylim(5e-3, 8)
                    _log_ticks(axes.xaxis)
                    axes.set_title("noise added to the code")
                    axes.set_xlabel("noise t, in standard deviations of all codes")
                    axes.set_ylabel("share of the way to a stranger's distortion")
                else:
                    axes.set_ylim(2e-2, axes.get_ylim()[1])
                    axes.set_title("code kept to a few bits")
                    axes.set_xlabel("bits per active dimension")
                    axes.set_ylabel("distortion above that of the whole code (nats)")
                    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _legend(figure, panels[0], len(self.comparison.shown))
            return figure

    @cached_property
    def spectrum(self) -> Figure | None:
        """The rate of each dimension, the costliest first."""
        arms = [arm for arm in self.comparison.shown if arm.curves("rate_per_dimension")]
        if not arms:
            return None
        with drawing(WIDTH, self._height(3.2)) as figure:
            axes = figure.add_subplot()
            for arm in arms:
                sizes = -np.sort(-np.array(arm.curves("rate_per_dimension")), axis=1)
                self._band(axes, arm, np.arange(1, sizes.shape[1] + 1), sizes)
            axes.set_xlabel("latent dimension, the costliest first")
            axes.set_ylabel("rate (nats per image)")
            axes.set_yscale("log")
            top = axes.get_ylim()[1]
            axes.set_ylim(max(axes.get_ylim()[0], top / 1e4), top)
            _log_ticks(axes.yaxis)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _legend(figure, axes, len(arms))
            return figure

    @cached_property
    def training(self) -> Figure | None:
        """rate_scale and the mean scale over the epochs."""
        names = {"training_rate_scale": "rate_scale (nats per image)", "training_scale_mean": "mean scale"}
        drawn = [name for name in names if any(arm.curves(name) for arm in self.comparison.shown)]
        if not drawn:
            return None
        with drawing(WIDTH, self._height(3.4)) as figure:
            panels = figure.subplots(1, len(drawn), squeeze=False)[0]
            for axes, name in zip(panels, drawn, strict=True):
                self._bands(axes, "training_epochs", name)
                axes.set_xlabel("epoch")
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.set_ylabel(names[name])
                if name == "training_scale_mean":
                    axes.axhline(1, color=INK, linewidth=0.9, linestyle=":")
                    axes.set_yscale("log")
                    _log_ticks(axes.yaxis)
                else:
                    self._leave_out(axes, name)
            _legend(figure, panels[0], len(self.comparison.shown))
            return figure

    @cached_property
    def importance(self) -> Figure | None:
        """The importance-weighted bound over the number of samples K."""
        if not any(arm.curves("iw_curve") for arm in self.comparison.shown):
            return None
        with drawing(WIDTH, self._height(3.4)) as figure:
            axes = figure.add_subplot()
            self._bands(axes, "iw_curve_k", "iw_curve")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xlabel("samples K")
            axes.set_ylabel("importance-weighted bound\n(nats per image)")
            self._leave_out(axes, "iw_curve")
            _legend(figure, axes, len(self.comparison.shown))
            return figure

    @cached_property
    def histograms(self) -> Figure | None:
        """Over images and dimensions, how often a scale occurs, in active and in idle dimensions."""
        arms = [arm for arm in self.comparison.shown if arm.curves("scale_histogram_edges")]
        if not arms:
            return None
        columns = min(3, len(arms))
        rows = -(-len(arms) // columns)
        with drawing(WIDTH, 0.75 + 1.35 * rows) as figure:
            panels = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
            for axes, arm in zip(panels, arms, strict=False):
                edges = np.array(arm.curves("scale_histogram_edges"))[0]
                color, total = self.looks[arm.label].color, 0.0
                parts = {}
                for kind in ("active", "idle"):
                    counts = [c for c in arm.curves(f"scale_histogram_{kind}") if len(c) == len(edges) - 1]
                    if counts:
                        parts[kind] = np.array(counts).mean(0)
                        total += parts[kind].sum()
                bottom = np.zeros(len(edges) - 1)
                for kind, counts in parts.items():
                    share = counts / total if total else counts
                    filled = kind == "active"
                    axes.stairs(
                        bottom + share, edges, baseline=bottom, fill=True, linewidth=0.8, label=kind,
                        hatch=None if filled else "/////", facecolor=color if filled else "white", edgecolor=color,
                    )  # fmt: skip
                    bottom = bottom + share
                axes.axvline(0, color=INK, linewidth=0.9, linestyle=":")
                axes.set_title(arm.label, color=ink(self.looks[arm.label]))
                axes.xaxis.set_major_formatter(lambda value, _: f"{10**value:.2g}")
                axes.set_yticks([])
                axes.spines["left"].set_visible(False)
                axes.tick_params(labelbottom=True)
            for axes in panels[len(arms) :]:
                axes.set_visible(False)
            figure.supxlabel("scale, on a logarithmic axis (filled: active dimensions, hatched: idle ones, dots: 1)")
            figure.supylabel("share of all scales")
            return figure

    def dots(self, panels: Sequence[Panel], share_x: bool = False) -> Figure | None:
        """Arms from top to bottom, and in each panel a figure or several with bars over seeds."""
        arms = self.comparison.shown
        drawn = [p for p in panels if any(arm.stat(name) for arm in arms for name, _ in p.names)]
        if not drawn:
            return None
        with drawing(WIDTH, 1.3 + 0.29 * len(arms)) as figure:
            figure.set_layout_engine("constrained", w_pad=0.09)
            row = figure.subplots(1, len(drawn), sharey=True, sharex=share_x, squeeze=False)[0]
            for axes, panel in zip(row, drawn, strict=True):
                limits = _axis(drawn if share_x else [panel], arms)
                self._dots(axes, panel, arms, limits, ticks=5 if len(drawn) < 3 else 4 if len(drawn) < 5 else 3)
            row[0].set_yticks(range(len(arms)), [arm.label for arm in arms])
            for label, arm in zip(row[0].get_yticklabels(), arms, strict=True):
                label.set_color(ink(self.looks[arm.label]))
            row[0].set_ylim(len(arms) - 0.4, -0.6)
            shown = {
                word: handle for axes in row for handle, word in zip(*axes.get_legend_handles_labels(), strict=True)
            }
            if shown:
                figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown))
            return figure

    def _dots(
        self, axes: Any, panel: Panel, arms: Sequence[Arm], limits: tuple[float, float] | None, ticks: int
    ) -> None:
        """Draw one panel, on a logarithmic axis where there are no limits."""
        stats = {(a.label, n): s for a in arms for n, _ in panel.names if (s := a.stat(n)) is not None}
        line = _line(panel, arms)
        count = len(panel.names)
        for row, arm in enumerate(arms):
            color = self.looks[arm.label].color
            heights = [row + (0 if count == 1 else (place / (count - 1) - 0.5) * 0.4) for place in range(count)]
            seen, beyond = [], []
            for place, (name, _) in enumerate(panel.names):
                stat = stats.get((arm.label, name))
                if stat is None:
                    continue
                if limits and not limits[0] <= stat.mean <= limits[1]:
                    beyond.append(stat.mean)
                    continue
                if place < panel.joined:
                    seen.append((stat.mean, heights[place]))
                axes.errorbar(
                    stat.mean, heights[place], xerr=stat.sd, color=color, marker=MARKERS[place], markersize=5.5,
                    markerfacecolor=color if place == 0 else "white", elinewidth=1.3, capsize=2, zorder=3,
                )  # fmt: skip
            if limits:
                _beyond(axes, beyond, limits, row, ink(self.looks[arm.label]))
            if len(seen) > 1:
                axes.plot(*zip(*seen, strict=True), color=color, linewidth=0.8, zorder=2)
            if not any((arm.label, name) in stats for name, _ in panel.names):
                axes.annotate(
                    "not defined", (0.03, row), xycoords=("axes fraction", "data"), fontsize=8, va="center",
                    color="#888888", style="italic",
                )  # fmt: skip
        if limits:
            axes.set_xlim(*limits)
        unit = panel.unit
        if line is not None and panel.line is not None:
            if limits and not limits[0] <= line <= limits[1]:
                unit = f"{unit}\n({panel.line[1]}: {line:.2g})"
            else:
                axes.axvline(line, color=INK, linewidth=1, linestyle=":", label=panel.line[1])
        if count > 1:
            for place, (_, word) in enumerate(panel.names):
                fill = INK if place == 0 else "white"
                axes.plot([], [], MARKERS[place], color=INK, markerfacecolor=fill, markersize=5.5, label=word)
        if limits is None:
            axes.set_xscale("log")
            _log_ticks(axes.xaxis, (1, 2, 5) if ticks > 3 else (1,))
        else:
            # Numbers that differ in their last digits only are long.
            is_long = limits[1] - limits[0] < 0.05 * max(abs(limits[0]), abs(limits[1]))
            axes.xaxis.set_major_locator(MaxNLocator(1 if is_long and ticks < 5 else ticks))
        axes.set_title(panel.title)
        axes.set_xlabel(unit)
        axes.grid(visible=True, axis="y", color="#f0f0f0")
        axes.tick_params(axis="y", length=0)

    def precision_and_recall(self) -> Figure | None:
        """How many samples look like images, and how many images look like samples, for each source of codes."""
        sources = [s for s in SOURCES if any(arm.stat(f"precision_{s}") for arm in self.comparison.shown)]
        if not sources:
            return None
        with drawing(WIDTH, 3.5) as figure:
            panels = figure.subplots(1, len(sources), sharex=True, sharey=True, squeeze=False)[0]
            for axes, source in zip(panels, sources, strict=True):
                for arm in self.comparison.shown:
                    x, y = arm.stat(f"recall_{source}"), arm.stat(f"precision_{source}")
                    if x is None or y is None:
                        continue
                    look = self.looks[arm.label]
                    axes.errorbar(
                        x.mean, y.mean, xerr=x.sd, yerr=y.sd, color=look.color, marker=look.marker, markersize=6,
                        linestyle="none", elinewidth=1, label=arm.label,
                    )  # fmt: skip
                axes.set_title(SOURCES[source])
                axes.set_xlabel("recall")
            panels[0].set_ylabel("precision")
            _legend(figure, panels[0], len(self.comparison.shown), below=True)
            return figure

    def _height(self, least: float) -> float:
        """Of a plot with a legend of all arms at its side."""
        return max(least, 0.5 + 0.22 * len(self.comparison.shown))

    def _bands(self, axes: Any, x_name: str, y_name: str) -> None:
        for arm in self.comparison.shown:
            y, x = arm.curves(y_name), arm.curves(x_name)
            if y and x and len(x[0]) == len(y[0]):
                self._band(axes, arm, np.array(x[0]), np.array(y))

    def _leave_out(self, axes: Any, name: str) -> None:
        """Fit the axes to the curves that end near each other, and name the others."""
        shown = self.comparison.shown
        ends = {arm.label: float(np.mean(curves, 0)[-1]) for arm in shown if (curves := arm.curves(name))}
        limits = _limits([(end, 0.0) for end in ends.values()])
        outside = {label: end for label, end in ends.items() if limits and not limits[0] <= end <= limits[1]}
        if outside:
            inside = [arm for arm in shown if arm.label in ends and arm.label not in outside]
            _fit(axes, [curve for arm in inside for curve in arm.curves(name)])
            named = "\n".join(f"far outside: {label}, ends at {end:.3g}" for label, end in outside.items())
            axes.set_title(named, loc="right", fontsize=8.5, fontweight="normal")

    def _band(self, axes: Any, arm: Arm, x: Any, values: Any) -> None:
        """The mean of curves (seeds, points), and a band of one standard deviation to either side."""
        look, mean = self.looks[arm.label], values.mean(0)
        marker = look.marker if len(x) <= 40 else None
        axes.plot(x, mean, color=look.color, linestyle=look.line, marker=marker, markersize=3.2, label=arm.label)
        if len(values) > 1:
            sd = values.std(0, ddof=1)
            axes.fill_between(x, mean - sd, mean + sd, color=look.color, alpha=0.18, linewidth=0)


def save_all(plots: Plots, folder: Path) -> list[Path]:
    """Write every plot that has numbers as PNG into a folder, and give their paths. Raises OSError."""
    figures = {
        "rate_distortion": plots.plane,
        "noise_and_bits": plots.probes,
        "rate_per_dimension": plots.spectrum,
        "scales": plots.histograms,
        "training": plots.training,
        "iw_bound": plots.importance,
    }
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # of other figures than there are now
        else:
            save_png(figure, path)
            paths.append(path)
    return paths


SOURCES = {
    "prior": "prior",
    "aggregate": "one Gaussian",
    "mixture": "mixture",
    "reconstructions": "reconstructions",
    "midpoints": "midpoints",
}


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure in this report's style, laid out when it is done: once, however many files show it."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        yield figure
        layout = figure.get_layout_engine()
        assert layout is not None
        layout.execute(figure)
        figure.set_layout_engine("none")


def as_svg(figure: Figure) -> bytes:
    """A figure as SVG, the same bytes for the same numbers."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG: the file is there whole or not at all. Raises OSError where it cannot be."""
    with rc_context(STYLE):
        replace_file(path, lambda file: figure.savefig(file, format="png", dpi=130))


def _line(panel: Panel, arms: Sequence[Arm]) -> float | None:
    """Where the line of a panel stands."""
    if panel.line is None:
        return None
    found = [stat.mean for arm in arms if (stat := arm.stat(panel.line[0])) is not None]
    return float(np.mean(found)) if found else None


def _axis(panels: Sequence[Panel], arms: Sequence[Arm]) -> tuple[float, float] | None:
    """The limits of panels of one axis, or None for a logarithmic one."""
    names = [name for panel in panels for name, _ in panel.names]
    spans = [(stat.mean, stat.sd or 0.0) for arm in arms for name in names if (stat := arm.stat(name)) is not None]
    spans += [(line, 0.0) for panel in panels if (line := _line(panel, arms)) is not None]
    least, most = min(mean for mean, _ in spans), max(mean for mean, _ in spans)
    return None if panels[0].log and most > 3 * least > 0 else _limits(spans)


def _legend(figure: Figure, axes: Any, count: int, below: bool = False) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if below:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, count)))
    elif handles:
        figure.legend(handles, labels, loc="outside right upper")


def _rate_and_distortion(arm: Arm) -> bool:
    return arm.stat("rate") is not None and arm.stat("distortion") is not None


def _point(arm: Arm) -> tuple[float, float] | None:
    rate, distortion = arm.stat("rate"), arm.stat("distortion")
    return None if rate is None or distortion is None else (rate.mean, distortion.mean)


def _frame(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Fit the axes to the points that lie together."""
    x, y = (_limits([(point[axis], 0.0) for point in points]) for axis in (0, 1))
    if x and y:
        axes.set_xlim(*x)
        axes.set_ylim(*y)


def _say_outside(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Name above the axes what lies outside of them, with its place."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    outside = [(label, x, y) for label, x, y in points if not (left <= x <= right and low <= y <= high)]
    if outside:
        named = "; ".join(f"{label} ({x:.3g}, {y:.3g})" for label, x, y in outside[:3])
        more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
        axes.set_title(f"far outside: {named}{more}", loc="right", fontsize=8.5, fontweight="normal")


def _diagonals(axes: Any) -> None:
    """Lines of equal -ELBO = distortion + rate."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    levels = MaxNLocator(7).tick_values(left + low, right + high)
    for level in levels:
        axes.plot([left, right], [level - left, level - right], color=FAINT, linewidth=0.8, zorder=0, scalex=False,
                  scaley=False)  # fmt: skip
        x = min(right, level - low)  # where it leaves at the right or below
        y = level - x
        if left < x and low <= y <= high and x - left > 0.06 * (right - left):
            axes.annotate(f"{level:g}", (x, y), xytext=(-3, 3), textcoords="offset points", ha="right", fontsize=7.5,
                          color="#888888")  # fmt: skip
    axes.annotate(
        "grey: distortion + rate",
        (0.995, 0.985),
        xycoords="axes fraction",
        ha="right",
        va="top",
        fontsize=8,
        color="#888888",
    )


def _limits(values: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Limits that hold all values, each with its spread, but those few so far off that the others could not be told
    apart: a quarter of them at most, beyond a gap of more than 2.5 times the range of the others."""
    kept = sorted(values)
    if not kept:
        return None
    while True:
        parts = []
        for place in range(1, len(kept)):
            many = max(kept[:place], kept[place:], key=len)
            gap, span = kept[place][0] - kept[place - 1][0], many[-1][0] - many[0][0]
            if 0 < 2.5 * span < gap and 4 * (len(values) - len(many)) <= len(values):
                parts.append(many)
        if not parts:
            break
        kept = max(parts, key=len)
    low, high = min(mean - sd for mean, sd in kept), max(mean + sd for mean, sd in kept)
    margin = 0.08 * (high - low) or 0.05 * abs(low) or 0.5
    return low - margin, high + margin


def _log_ticks(axis: Any, subs: Sequence[int] = (1, 2, 5)) -> None:
    """1, 2, 5, 10, 20 ... in plain figures."""
    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _fit(axes: Any, curves: Sequence[Sequence[float]]) -> None:
    """Fit the height of axes to curves."""
    if curves:
        low, high = min(min(curve) for curve in curves), max(max(curve) for curve in curves)
        margin = 0.06 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)


def _beyond(axes: Any, values: Sequence[float], limits: tuple[float, float], height: float, color: Any) -> None:
    """Arrows at the edges for values that lie far outside, with the values."""
    for is_right in (False, True):
        outside = sorted(value for value in values if (value > limits[1]) == is_right)
        if outside:
            ends = " to ".join(dict.fromkeys(f"{value:.3g}" for value in (outside[0], outside[-1])))
            axes.annotate(
                f"{ends} \N{RIGHTWARDS ARROW}" if is_right else f"\N{LEFTWARDS ARROW} {ends}",
                (0.99 if is_right else 0.01, height), xycoords=("axes fraction", "data"), fontsize=8, color=color,
                ha="right" if is_right else "left", va="center",
            )  # fmt: skip
