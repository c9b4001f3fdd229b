"""The report of a comparison: one self-contained HTML file that opens offline and can be printed.

This module computes the values; the template `report.html.j2` lays out the page.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vae_cli.comparison import dot_plots, price_plot
from vae_cli.comparison.answers import DESCRIBED, Answer, answers
from vae_cli.comparison.arms import Arm, Comparison
from vae_cli.comparison.findings import amount_in, equal_rate, finding, unit_of
from vae_cli.comparison.members import Member
from vae_cli.comparison.plain import in_plain_english
from vae_cli.comparison.plot_style import Looks, as_svg, hex_color, looks
from vae_cli.comparison.plots import SAVED, precision_and_recall
from vae_cli.comparison.second_stage import second_stages
from vae_cli.comparison.second_stage_plots import family_looks
from vae_cli.comparison.second_stage_text import StageSection, stage_section
from vae_cli.comparison.selection import BESIDE_HEADLINES, OVER_WEIGHTS
from vae_cli.comparison.statistics import LEVEL
from vae_cli.comparison.tables import MISSING, Cell, Column, Footnotes, Row, Table, deciding, of_any_run
from vae_cli.comparison.verdicts import FEW_SEEDS, compared, verdicts
from vae_cli.config.claims import CLAIMS, FIGURES, TITLES, Claim, ClaimName, Entry, GroupName, entry, headlines
from vae_cli.config.naming import show
from vae_cli.core.wording import digits_for, quoted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "report.html.j2"
ACROSS = 6  # at most this many arms side by side in a table of the appendix
AT_EQUAL_RATE: tuple[ClaimName, ...] = ("bits", "price")  # sections that compare distortions at equal rate
# The plot at the top of each section. It shows the arms of the verdicts; if there are more, a second one shows all.
LEADS: Mapping[ClaimName, str] = {
    "bits": "noise_and_bits",
    "neighbours": "jacobian_ratio",
    "shortcuts": "generalization",
    "scale": "scales",
    "price": "bounds",
}
SPLITS = {"train": "training", "validation": "validation", "test": "testing"}
# The figure without which an arm is missing from a plot, and what it is called.
NEEDED: Mapping[str, tuple[str, str]] = {
    "rate_distortion": ("rate", "rate"),
    "rate_per_dimension": ("rate", "rate"),
    "scales": ("scale_mean", "sigma"),
    "training": ("scale_mean", "sigma"),
    "iw_bound": ("elbo", "bound on ln p(x)"),
}
# The plots that are in the report only, and not saved as PNG files.
ONLY_IN_REPORT: Mapping[str, Callable[[Comparison], Figure | None]] = {
    "jacobian_ratio": dot_plots.jacobian_ratio,
    "generalization": dot_plots.generalization,
    "bounds": price_plot.bounds,
    "price_by_latent": price_plot.price_by_latent,
    "jacobians": dot_plots.jacobians,
    "neighbours": dot_plots.neighbours,
    "shortcuts": dot_plots.shortcuts,
    "elbos": dot_plots.elbos,
    "frechet_distances": dot_plots.frechet_distances,
    "precision_and_recall": precision_and_recall,
}


@dataclass
class Pictures:
    """Pictures of the arms as PNG, and the seed of the run shown for each arm; if there are none, the reason."""

    overview: bytes | None = None
    samples: bytes | None = None
    mixtures: bytes | None = None
    reconstructions: bytes | None = None
    interpolations: list[bytes] = field(default_factory=list)
    scatter: bytes | None = None
    seeds: dict[str, int] = field(default_factory=dict)
    reason: str = ""


# More values that the template receives are in `tables`.


@dataclass(frozen=True)
class Headline:
    """A headline figure of a claim, with sentences on its extremes and its differences from the reference."""

    entry: Entry
    unit: str
    finding: str


@dataclass(frozen=True)
class Section:
    """The section on a claim: answer, a table of the figure that decides and a few that describe, and what is folded:
    headline figures, sentences on distortion at equal rate, and their table."""

    name: ClaimName
    claim: Claim
    answer: Answer
    deciding: Table | None
    headlines: list[Headline]
    at_equal_rate: list[str]
    table: Table | None


@dataclass(frozen=True)
class AppendixPart:
    """All figures of a claim, in tables of a few arms each."""

    title: str
    tables: list[Table]


def render(
    comparison: Comparison,
    figures: Mapping[str, Figure],
    pictures: Pictures,
    title: str,
    notes: Sequence[str] = (),
    folder: Path = Path(),
) -> str:
    """Return the report as HTML. `figures` are the plots drawn so far, by name; `notes` are printed at the top; links
    to the runs are relative to `folder`, in which the report is stored."""
    report = Report(comparison, folder)
    drawn = {**figures, **{name: draw(comparison) for name, draw in ONLY_IN_REPORT.items()}}
    leads, second_stage = report.leads(), report.second_stage()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=title,
        notes=notes,
        runs=len(comparison.members),
        arms=len(comparison.arms),
        seeds=len(comparison.seeds),
        has_single_seeds=any(len(arm.members) == 1 for arm in comparison.arms),
        reference=comparison.reference.label,
        level=f"{100 * LEVEL:.0f}",
        differences=comparison.comparisons,
        chance=1 - LEVEL,
        settings=report.settings(),
        equal_settings=report.equal_settings(),
        facts=report.facts(),
        sections={claim: report.section(claim) for claim in CLAIMS},
        plots={name: _plot(drawn.get(name)) for name in [*SAVED, *ONLY_IN_REPORT]},
        leads={claim: _plot(leads.get(claim)) for claim in CLAIMS},
        missing=report.missing(comparison.shown),
        missing_from_leads=report.missing(compared(comparison)),
        hidden=len(comparison.arms) - len(comparison.shown),
        pictures=_embedded(pictures),
        appendix=report.appendix(),
        weights=report.over_weights(),
        deciding=deciding(),
        plain=in_plain_english(comparison, report.verdicts),
        second_stage=second_stage,
        glossary=report.glossary(),
        few_seeds=FEW_SEEDS,
    )


class Report:
    """The tables, sections and facts of a report."""

    def __init__(self, comparison: Comparison, folder: Path) -> None:
        self.comparison = comparison
        self.folder = folder
        self.looks: Looks = looks(comparison)
        self.verdicts = verdicts(comparison)
        self.answers = answers(comparison, self.verdicts)

    def leads(self) -> dict[ClaimName, Figure | None]:
        """Return the plot of each claim with only the arms of the verdicts; empty if there are no more arms."""
        arms = compared(self.comparison)
        if len(arms) >= len(self.comparison.shown):
            return {}
        view, draw = self.comparison.only(arms), {**SAVED, **ONLY_IN_REPORT}
        return {claim: draw[name](view) for claim, name in LEADS.items()}

    def missing(self, arms: Sequence[Arm]) -> dict[str, str]:
        """Return, for each plot, a sentence on those of the arms that it cannot show; empty if it can show all."""
        found = dict.fromkeys([*SAVED, *ONLY_IN_REPORT], "")
        for plot, (figure, word) in NEEDED.items():
            labels = [arm.label for arm in arms if arm.stat(figure) is None]
            if labels:
                verb = "have" if len(labels) > 1 else "has"
                found[plot] = f" {quoted(labels)} {verb} no {word}."
        return found

    def settings(self) -> Table:
        """Return the arms with the settings that differ between them, and their seeds."""
        keys = self.comparison.differing or ["sigma"]
        rows = []
        for arm in self.comparison.arms:
            values = [arm.members[0].settings.get(key) for key in keys]
            links = [(str(member.seed), self._address(member.folder.path)) for member in arm.members]
            cells = [Cell(MISSING if v is None else show(v)) for v in values]
            rows.append(self._row(arm, [*cells, Cell("", links=links)]))
        return Table("arm", [Column(name) for name in [*keys, "seeds"]], rows)

    def _address(self, run: Path) -> str:
        """Return the address of a run's folder, relative to the report."""
        return quote(os.fsencode(os.path.relpath(run, self.folder).replace(os.sep, "/"))) + "/"

    def equal_settings(self) -> str:
        """Return the settings that all runs share, written as on the command line."""
        equal = sorted(self.comparison.equal.items())
        return ", ".join(f"{key}={show(value)}" for key, value in equal if value is not None)

    def facts(self) -> dict[str, str]:
        """Return, by name, facts about the evaluations and about the software and devices used for the runs."""
        members = self.comparison.members
        versions = [m.summary.get("versions", {}) for m in members]
        names = list(dict.fromkeys(name for version in versions for name in version))
        found = (str(m.summary.get("git_commit") or "") for m in members)  # None if vae was not run from a clone
        commits = list(dict.fromkeys(commit[:12] + "+" * commit.endswith("+") for commit in found if commit))
        facts = {
            "Images": "; ".join(dict.fromkeys(filter(None, map(_images, members)))),
            "Test images used": _distinct(m.figures.get("distortion", {}).get("count") for m in members),
            "Evaluation profile": _distinct(m.evaluation.get("profile") for m in members),
            "Weights": _distinct(m.evaluation.get("weights") for m in members),
            "Versions": ", ".join(f"{name} {_distinct(v.get(name) for v in versions)}" for name in names),
            "Git commit": f"{len(commits)} different ones" if len(commits) > 3 else ", ".join(commits),
            "Device": _distinct(m.summary.get("device") for m in members),
        }
        return {name: text for name, text in facts.items() if text}

    def section(self, claim: ClaimName) -> Section:
        """Return the section of a claim."""
        entries = [found for found in headlines(claim) if self._has(found.name)]
        shown = [
            Headline(found, unit_of(self.comparison, found.name), finding(self.comparison, found.name) or "")
            for found in entries
        ]
        beside = [self._bound if name == "iw_bound_k" else name for name in BESIDE_HEADLINES[claim]]
        names = [found.name for found in entries] + [name for name in beside if self._has(name)]
        said = self.answers[claim].sentences
        equal = self.comparison.at_equal_rate if claim in AT_EQUAL_RATE else []
        return Section(
            claim,
            CLAIMS[claim],
            self.answers[claim],
            self._deciding(claim),
            shown,
            [text for found in equal if (text := equal_rate(self.comparison, found)) not in said],
            self._table(names, self.comparison.shown) if names else None,
        )

    def second_stage(self) -> StageSection | None:
        """Return the section on second stages, which comes first if no claim was judged; None without such figures."""
        found = second_stages(self.comparison)
        colors = {label: hex_color(look) for label, look in family_looks(found.families if found else []).items()}
        return stage_section(found, all(verdict.level == 0 for verdict in self.verdicts.values()), colors)

    def _deciding(self, claim: ClaimName) -> Table | None:
        """Return a table of the figure that decides and a few that describe, in the arms of all verdicts."""
        contrast = self.verdicts[claim].contrast
        if contrast is None:
            return None
        names = [contrast.figure, *DESCRIBED[claim], *(("elbo", "elbo_gaussian_prior") if claim == "price" else ())]
        arms = [arm for arm in compared(self.comparison) if any(map(arm.stat, names))]
        return self._table([name for name in names if self._has(name)], arms, marks_differences=False)

    def glossary(self) -> list[Entry]:
        """Return the entries of all figures that the runs have, in the order of the register."""
        known = {found.name: found for found in map(entry, self.comparison.figures) if found.definition}
        places = {found.name: place for place, found in enumerate(FIGURES)}
        return sorted(known.values(), key=lambda found: places.get(found.name, len(places)))

    def appendix(self) -> list[AppendixPart]:
        """Return tables of all scalar figures by claim or group; figures without a known group come last."""
        figures = self.comparison.figures
        claims = list(dict.fromkeys([*TITLES, *(info.claim for info in figures.values())]))
        parts = []
        for claim in claims:
            title = TITLES.get(cast("GroupName", claim), claim or "Other figures")
            names = [name for name, info in figures.items() if info.claim == claim and not info.is_curve]
            if names:
                parts.append(AppendixPart(title, self._tall_tables(names)))
        return parts

    def over_weights(self) -> Table | None:
        """Return a table of the arms in families with several regularizer weights; None if there is no such family."""
        families = [family for family in self.comparison.families if len(family.arms) > 1]
        names = [name for name in OVER_WEIGHTS if self._has(name)]
        return self._table(names, [arm for family in families for arm in family.arms]) if families else None

    @property
    def _bound(self) -> str:
        return self.comparison.tightest_bound or ""

    def _has(self, name: str) -> bool:
        return any(arm.stat(name) for arm in self.comparison.arms)

    def _row(self, arm: Arm, cells: list[Cell]) -> Row:
        return Row(arm.label, cells, hex_color(self.looks[arm.label]), arm is self.comparison.reference)

    def _table(self, names: Sequence[str], arms: Sequence[Arm], marks_differences: bool = True) -> Table:
        """Return a table with arms as rows and figures as columns."""
        footnotes = Footnotes()
        digits = {name: _digits(name, arms) for name in names}
        cells = {
            arm.label: [self._cell(arm, n, digits[n], footnotes, marks_differences) for n in names] for arm in arms
        }
        rows = [self._row(arm, cells[arm.label]) for arm in arms]
        heads = [
            Column(found.title, unit_of(self.comparison, found.name), found.definition, found.better)
            for found in map(entry, names)
        ]
        return Table("arm", heads, rows, footnotes.marks)

    def _tall_tables(self, names: Sequence[str]) -> list[Table]:
        """Return tables with figures as rows and a few arms as columns; the last table has the footnotes of all."""
        arms, footnotes = self.comparison.shown, Footnotes()
        across = math.ceil(len(arms) / math.ceil(len(arms) / ACROSS))
        tables = []
        for start in range(0, len(arms), across):
            some = arms[start : start + across]
            rows = []
            for name in names:
                digits = _digits(name, arms)
                cells = [self._cell(arm, name, digits, footnotes) for arm in some]
                rows.append(Row(entry(name).title, cells, unit=unit_of(self.comparison, name), name=name))
            is_last = start + across >= len(arms)
            heads = [Column(arm.label) for arm in some]
            tables.append(Table("figure", heads, rows, footnotes.marks if is_last else {}))
        return tables

    def _cell(self, arm: Arm, name: str, digits: int, footnotes: Footnotes, is_marked: bool = True) -> Cell:
        stat, reason = arm.stat(name), arm.reason(name)
        if stat is None:
            return Cell(MISSING, [footnotes.mark(reason)] if reason else [])
        notes = dict.fromkeys(of_any_run(str(m.figures.get(name, {}).get("note", ""))) for m in arm.members)
        marks = [footnotes.mark(note) for note in notes if note]
        if stat.n < len(arm.members) and reason:
            marks.append(footnotes.mark(reason))
        found = None if arm is self.comparison.reference else self.comparison.difference(name, arm)
        return Cell(amount_in(arm, stat, digits), marks, is_marked and found is not None and bool(found.is_real))


def _digits(name: str, arms: Sequence[Arm]) -> int:
    return digits_for([stat.mean for arm in arms if (stat := arm.stat(name)) is not None])


def _plot(figure: Figure | None) -> str:
    # Embedded as an image, not as elements of the page: identifiers of different plots would collide.
    return "" if figure is None else _data_uri(as_svg(figure), "image/svg+xml")


def _embedded(pictures: Pictures) -> dict[str, Any]:
    """Return the pictures as data URIs for the template; the URI of a missing picture is empty."""
    single = {
        name: getattr(pictures, name) for name in ("overview", "samples", "mixtures", "reconstructions", "scatter")
    }
    return {
        **{name: _data_uri(data, "image/png") if data else "" for name, data in single.items()},
        "interpolations": [_data_uri(data, "image/png") for data in pictures.interpolations],
        "seeds": _distinct(pictures.seeds.values()),
        "reason": pictures.reason,
    }


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _images(member: Member) -> str | None:
    """Return how large a run's images are, and how many there are; None for a run of an earlier version."""
    images = member.summary.get("images")
    if not isinstance(images, dict) or not isinstance(images.get("shape"), list):
        return None
    counts = [f"{images.get(split)} for {word}" for split, word in SPLITS.items()]
    return f"{' x '.join(map(str, images['shape']))} (channels, height, width); {', '.join(counts)}"


def _distinct(values: Iterable[Any]) -> str:
    """Return the distinct values except None, separated by commas."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))
