"""The plot for claim 5: bounds on ln p(x) of each arm, and the price of a constant sigma by latent size."""

from __future__ import annotations

from matplotlib.figure import Figure

from vae_cli.comparison.arms import Arm, Comparison
from vae_cli.comparison.dot_plots import Panel, dots
from vae_cli.comparison.plot_layout import dotted_line
from vae_cli.comparison.plot_style import WIDTH, drawing, looks
from vae_cli.comparison.statistics import Contrast
from vae_cli.config.claims import entry

LATENT = "latent"


def bounds(comparison: Comparison) -> Figure | None:
    """Draw the tightest importance-weighted bound and the ELBO of each arm."""
    bound = comparison.tightest_bound
    names = [(bound, entry(bound).title)] if bound else []
    return dots(comparison, [Panel([*names, ("elbo", "ELBO, own prior")], " ", "nats per image")])


def price_by_latent(comparison: Comparison) -> Figure | None:
    """Draw how much lower the importance-weighted bound is with a constant sigma than with a learned one, against the
    number of latent dimensions: a line for each constant, prior and number of positions. None with a single latent
    size."""
    bound = comparison.tightest_bound
    if bound is None or LATENT not in comparison.differing:
        return None
    curves = _curves(comparison, bound)
    curves = {label: points for label, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    found = looks(comparison)
    with drawing(WIDTH, 3.6) as figure:
        axes = figure.add_subplot()
        for label, points in curves.items():
            sizes = sorted(points)
            values = [-points[size][1].value for size in sizes]
            ends = [_end(points[size][1]) for size in sizes]
            usual = comparison.reference.latent if comparison.reference.latent in points else sizes[-1]
            look = found[points[usual][0].label]
            axes.errorbar(sizes, values, yerr=ends, color=look.color, marker=look.marker, capsize=3, label=label)
        dotted_line(axes, 0)
        axes.set_xscale("log", base=2)
        sizes = sorted({size for points in curves.values() for size in points})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("latent dimensions")
        axes.set_ylabel("price (nats per image)")
        axes.legend()
        return figure


def _curves(comparison: Comparison, bound: str) -> dict[str, dict[int, tuple[Arm, Contrast]]]:
    """Return, for each setting of a constant sigma, prior and positions of the code, its arm and its contrast with the
    arm that has a learned sigma under N(0, I), by latent size."""
    curves: dict[str, dict[int, tuple[Arm, Contrast]]] = {}
    for arm in comparison.arms:
        if not arm.has_constant_scale or not arm.has_noise or arm.stat(bound) is None:
            continue
        if not arm.differs_only_in(["sigma", "prior", LATENT], comparison.reference):
            continue
        contrasts = (comparison.contrast(bound, arm, other) for other in comparison.arms if is_counterpart(other, arm))
        contrast = next(contrasts, None)
        if contrast is not None:
            curves.setdefault(_label(arm), {})[arm.latent] = arm, contrast
    return curves


def is_counterpart(other: Arm, arm: Arm) -> bool:
    """Whether an arm has a learned sigma and the prior N(0, I), and is otherwise set like `arm`."""
    return other.learns_sigma and other.has_standard_prior and other.differs_only_in(["sigma", "prior"], arm)


def _label(arm: Arm) -> str:
    settings = arm.members[0].settings
    choice, value = settings.get("sigma"), settings.get("sigma.value")
    sigma = choice if value is None else f"{choice} {value}"
    prior = " under N(0, I)" if arm.has_standard_prior else f", prior {settings.get('prior')}"
    return f"{sigma}{prior}" + (f", {arm.positions} positions" if arm.positions else "")


def _end(contrast: Contrast) -> float:
    """Return half of the 95 % interval; 0 if there is none."""
    interval = contrast.interval()
    return 0.0 if interval is None else (interval[1] - interval[0]) / 2
