"""The style of plots: colors, lines and markers of arms, matplotlib's settings, and export as SVG and PNG."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from vae_cli.comparison.arms import Comparison
from vae_cli.core.files import replace_file

# Mostly from Paul Tol's "bright" and "muted" schemes, which color-blind people can tell apart, strongest first.
HUES = ("#4477aa", "#ee6677", "#228833", "#8855bb", "#b8a000", "#555555", "#2299cc", "#cc7722", "#882255", "#999933")
TINTS = (0.0, -0.4, 0.4, 0.2)  # below 0 darker, above 0 lighter
LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.4)), (0, (5, 1.5, 1.2, 1.5)))
MARKERS = "osD^vPX"  # as many as make 28 different looks of a hue, with the four tints
WIDTH = 9.6  # inches: the width of the page
DPI = 130
INK, GRAY, FAINT = "#333333", "#888888", "#cccccc"
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "figure.labelsize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GRAY,
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
    "text.parse_math": False,  # a dollar sign in a label does not start a formula
    "svg.hashsalt": "vae",  # reproducible identifiers: the same numbers give the same file
    "figure.constrained_layout.use": True,
}


class Look(NamedTuple):
    """The color, line and marker of an arm, the same in all plots."""

    color: tuple[float, float, float]
    line: Any
    marker: str


Looks = dict[str, Look]


def looks(comparison: Comparison) -> Looks:
    """Return the look of every arm, by label.

    Arms whose labels start with the same setting share a hue; arms whose labels agree after the first setting share a
    tint, line and marker. The arms that plots usually leave out come last, so that the others differ most.
    """
    usual = {arm.label for arm in comparison.usual}
    arms = sorted(comparison.arms, key=lambda arm: arm.label not in usual)
    rests = Counter(arm.label.partition(",")[2] for arm in comparison.usual)
    tints = [rest for rest, _ in sorted(rests.items(), key=lambda item: (item[0] != "", -item[1]))]
    hues: dict[str, int] = {}
    found: Looks = {}
    for arm in arms:
        word, _, rest = arm.label.partition(",")
        if rest not in tints:
            tints.append(rest)
        found[arm.label] = _look(hues.setdefault(word, len(hues)), tints.index(rest))
    return found


def _look(hue: int, tint: int) -> Look:
    red, green, blue = to_rgb(HUES[hue % len(HUES)])
    turn = hue // len(HUES) + tint
    lighter = TINTS[turn % len(TINTS)]

    def tinted(part: float) -> float:
        return part + (1 - part) * lighter if lighter > 0 else part * (1 + lighter)

    color = (tinted(red), tinted(green), tinted(blue))
    return Look(color, LINES[turn % len(LINES)], MARKERS[turn % len(MARKERS)])


def text_color(look: Look) -> tuple[float, float, float]:
    """Return a look's color for use in text; light colors are darkened, so that the text is readable."""
    red, green, blue = look.color
    return (0.8 * red, 0.8 * green, 0.8 * blue) if red + green + blue > 1.5 else look.color


def hex_color(look: Look) -> str:
    """Return the color of a look as a hexadecimal HTML color, such as #4477aa."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in look.color)


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """Yield a matplotlib figure in this style. Its layout is computed once, at the end of the `with` block."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI)
        FigureCanvasAgg(figure)
        yield figure
        layout = figure.get_layout_engine()
        assert layout is not None
        layout.execute(figure)
        figure.set_layout_engine("none")


def as_svg(figure: Figure) -> bytes:
    """Return a plot as SVG; the same numbers always give the same bytes."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def as_png(figure: Figure) -> bytes:
    """Return a plot as PNG."""
    buffer = io.BytesIO()
    _write_png(figure, buffer)
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """Write a plot as a PNG file, atomically. Raises OSError if it cannot be written."""
    replace_file(path, lambda file: _write_png(figure, file))


def _write_png(figure: Figure, file: IO[bytes]) -> None:
    with rc_context(STYLE):
        FigureCanvasAgg(figure).print_png(file)  # figure.savefig would draw the plot twice
