"""The report of a comparison: one HTML file that needs no other, opens offline and prints."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from vae_cli.comparison import findings
from vae_cli.comparison.answers import Answer, answers
from vae_cli.comparison.arms import Arm, Comparison, partly
from vae_cli.comparison.findings import amount
from vae_cli.comparison.plots import SOURCES, Panel, Plots, as_svg, hex_color
from vae_cli.comparison.statistics import LEVEL, statistic
from vae_cli.config.naming import show
from vae_cli.core.wording import digits_for
from vae_cli.metrics.base import CLAIMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The figures that a claim is answered with; the appendix has all.
MAIN: dict[str, list[str]] = {
    "bits": [
        "rate", "rate_bits", "mutual_information_bits", "active_units", "noise_probe_tolerance",
        "quantization_bits_within_1_nat",
    ],
    "neighbours": [
        "jacobian_frobenius_codes", "jacobian_frobenius_halfway", "jacobian_frobenius_prior", "largest_step_over_mean",
        "midpoint_distance_to_training", "class_change_by_noise", "neighbour_label_agreement",
    ],
    "shortcuts": [
        "collapsed_share", "loc_std_growth", "reidentification", "distortion_gap", "linear_probe_loc", "linear_probe_z",
        "nearest_neighbour_z",
    ],
    "scale": ["scale_mean", "scale_median", "scale_min", "scale_max", "rate_scale"],
    "price": [
        "distortion", "elbo", "elbo_gaussian_prior", "elbo_mixture_prior", "iw_bound", "frechet_prior",
        "frechet_mixture",
    ],
}  # fmt: skip
FINDINGS: dict[str, list[str]] = {
    "bits": ["rate", "noise_probe_tolerance", "quantization_bits_within_1_nat"],
    "neighbours": ["jacobian_frobenius_halfway", "largest_step_over_mean", "class_change_by_noise"],
    "shortcuts": ["collapsed_share", "reidentification", "distortion_gap"],
    "scale": ["scale_mean", "rate_scale"],
    "price": ["elbo", "distortion", "frechet_prior", "frechet_mixture"],
}
LADDER = ["rate", "distortion", "elbo", "elbo_gaussian_prior", "scale_mean", "active_units"]
ACROSS = 6  # arms beside each other in a table of the appendix
SIZES = {"svg": "image/svg+xml", "png": "image/png"}

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 70rem; background: #fff; color: #222;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.35rem; margin: 2.8rem 0 .6rem; padding-top: .8rem; border-top: 2px solid #222; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p, ul, ol { max-width: 46rem; margin: .5rem 0; }
li { margin: .25rem 0; }
.lead { color: #555; margin-bottom: 1.2rem; }
.summary { border: 1px solid #ddd; border-radius: 6px; padding: .4rem 1.2rem 1rem; background: #fafafa; }
.summary p { max-width: none; }
.summary h3 { margin: 1rem 0 .1rem; }
.verdict { color: #0b5394; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption, .note, .foot { font-size: .86rem; color: #555; max-width: 52rem; }
figcaption { margin-top: .2rem; }
.scroll { overflow-x: auto; margin: .8rem 0 .2rem; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: right; vertical-align: bottom; white-space: nowrap; }
thead th { border-bottom: 1.5px solid #222; font-weight: 600; white-space: normal; min-width: 4rem; }
thead th small { display: block; font-weight: 400; color: #666; }
tbody tr:nth-child(even) { background: #f6f6f6; }
tbody th, td.text, thead th.text { text-align: left; font-weight: 500; }
td.text { white-space: normal; }
tr.reference th::after { content: " (reference)"; color: #666; font-weight: 400; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
.differs { font-weight: 700; }
sup { line-height: 0; }
code { font-size: .92em; overflow-wrap: anywhere; }
@media print {
  body { font-size: 10.5pt; max-width: none; padding: 0; }
  h2 { break-after: avoid; } h3 { break-after: avoid; }
  figure, tr, .summary > div { break-inside: avoid; }
  .scroll { overflow: visible; } table { font-size: 6.5pt; } th, td { padding: .15rem .25rem; }
  th { white-space: normal; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


@dataclass
class Pictures:
    """Pictures that are no plots of numbers, as PNG, and what to say where there are none."""

    samples: bytes | None = None
    mixtures: bytes | None = None
    reconstructions: bytes | None = None
    interpolations: list[bytes] = field(default_factory=list)
    scatter: bytes | None = None
    seeds: dict[str, int] = field(default_factory=dict)
    reason: str = ""


def render(plots: Plots, pictures: Pictures, title: str, notes: Sequence[str] = ()) -> str:
    """The whole report. `notes` are sentences about what was left out of the comparison."""
    page = _Page(plots, pictures)
    body = [
        page.head(title, notes),
        page.summary(),
        page.what_was_run(),
        *(page.section(claim) for claim in CLAIMS),
        page.methods(),
        page.appendix(),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


class _Page:
    def __init__(self, plots: Plots, pictures: Pictures) -> None:
        self.comparison = plots.comparison
        self.pictures = pictures
        self.plots = plots
        self.answers = answers(self.comparison)

    # The parts of the page, from top to bottom.

    def head(self, title: str, notes: Sequence[str]) -> str:
        c = self.comparison
        seeds = len(c.seeds)
        lead = (
            f"{len(c.members)} runs in {len(c.arms)} arms, {seeds} seed{'s' if seeds != 1 else ''}. "
            f"Quantities are nats per image unless they say bits; ± is one standard deviation over seeds, "
            f"[ , ] a {100 * LEVEL:.0f} % interval. Arms are compared with '{c.reference.label}', and in "
            "tables what differs from it is bold."
        )
        said = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
        return f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>{said}'

    def summary(self) -> str:
        parts = []
        for place, claim in enumerate(CLAIMS, start=1):
            answer = self.answers[claim]
            sentences = " ".join(escape(sentence) for sentence in answer.sentences)
            parts.append(
                f'<div><h3>{place}. {escape(answer.question)} <span class="verdict">{escape(answer.verdict)}.</span>'
                f"</h3><p>{sentences}</p></div>"
            )
        return f'<div class="summary">{"".join(parts)}</div>'

    def what_was_run(self) -> str:
        c = self.comparison
        columns = c.differing or ["sigma"]
        head = ["arm", *columns, "seeds"]
        rows = []
        for arm in c.arms:
            values = [arm.members[0].settings.get(key) for key in columns]
            cells = ["-" if value is None else show(value) for value in values]
            seeds = ", ".join(str(seed) for seed in arm.seeds)
            rows.append(self._row(arm, [f'<td class="text">{escape(cell)}</td>' for cell in [*cells, seeds]]))
        table = _table([f'<th class="text">{escape(name)}</th>' for name in head], rows)
        equal = ", ".join(f"{key}={show(value)}" for key, value in sorted(c.equal.items()) if value is not None)
        facts = "".join(f"<li>{escape(fact)}</li>" for fact in self._facts())
        return (
            f"<h2>What was run</h2>\n<p>An arm is a set of runs that differ in nothing but the seed. Settings that "
            f"differ between arms:</p>{table}\n<p>Settings that are equal: <code>{escape(equal)}</code></p>"
            f"<ul>{facts}</ul>"
        )

    def _facts(self) -> list[str]:
        members = self.comparison.members
        profiles = _distinct(m.evaluation.get("profile") for m in members)
        counts = [m.figures.get("distortion", {}).get("count") for m in members]
        versions = [m.summary.get("versions", {}) for m in members]
        names = list(dict.fromkeys(name for version in versions for name in version))
        facts = []
        if images := _distinct(counts):
            facts.append(f"Test images looked at: {images}")
        if profiles:
            facts.append(f"Evaluated with the profile: {profiles}")
        if weights := _distinct(m.evaluation.get("weights") for m in members):
            facts.append(f"Weights: {weights}")
        if names:
            said = ", ".join(f"{name} {_distinct(version.get(name) for version in versions)}" for name in names)
            facts.append(f"Versions: {said}")
        if commit := _distinct(m.summary.get("git_commit") for m in members):
            facts.append(f"Commit: {commit}")
        if device := _distinct(m.summary.get("device") for m in members):
            facts.append(f"Device: {device}")
        return facts

    def section(self, claim: str) -> str:
        drawn = {
            "bits": self._bits,
            "neighbours": self._neighbours,
            "shortcuts": self._shortcuts,
            "scale": self._scale,
            "price": self._price,
        }[claim]()
        answer: Answer = self.answers[claim]
        names = self._present(MAIN[claim])
        found = [
            f"<strong>{escape(name)}</strong>: {escape(text)}"
            for name, text in findings.findings(self.comparison, self._present(FINDINGS[claim]))
        ]
        if claim in ("bits", "price"):
            found += [escape(findings.equal_rate(self.comparison, equal)) for equal in self.comparison.at_equal_rate]
        heading = f"<h2>{escape(dict(CLAIMS.items())[claim])}</h2>"  # type: ignore[index]
        verdict = (
            f'<p><strong>{escape(answer.question)} <span class="verdict">{escape(answer.verdict)}.</span></strong></p>'
        )
        sentences = "<ul>" + "".join(f"<li>{text}</li>" for text in dict.fromkeys(found)) + "</ul>" if found else ""
        table = self.table(names, self.comparison.shown) if names else ""
        nothing = "" if names or any(drawn) else "<p>No run has a figure of this claim.</p>"
        return "\n".join([heading, verdict, sentences, table, *(part for part in drawn if part), nothing])

    def _bits(self) -> list[str]:
        return [
            self.figure(
                self.plots.plane,
                "The rate-distortion plane: one curve per family of weights, the usual weight filled, bars ± one "
                "standard deviation over seeds. Nearer to the lower left is better; on a grey line all "
                "ELBOs are equal.",
            ),
            self.figure(
                self.plots.probes,
                "Two measurements that are defined with and without noise. Left: what is lost when noise is added to "
                "the mean code, where 0 is the image's own distortion and 1 that at the code of another image; right: "
                "when each active dimension is kept to a few bits. Bands: ± one standard deviation over seeds.",
            ),
            self.figure(self.plots.spectrum, "The rate of each latent dimension, sorted in each run."),
        ]

    def _neighbours(self) -> list[str]:
        places = [("codes", "at codes"), ("halfway", "half-way"), ("prior", "at prior draws")]
        jacobians = [
            Panel("Frobenius norm", "change of the image", [(f"jacobian_frobenius_{p}", w) for p, w in places], True),
            Panel(
                "largest singular value", "change of the image", [(f"jacobian_norm_{p}", w) for p, w in places], True
            ),
        ]
        steps = [
            Panel("largest step / mean step", "ratio", [("largest_step_over_mean", "")]),
            Panel("midpoint to training", "distance", [("midpoint_distance_to_training", "")]),
            Panel("class changed by noise", "share of draws", [("class_change_by_noise", "")]),
            Panel("neighbours of one label", "share", [("neighbour_label_agreement", "")],
                  line=("neighbour_label_chance", "chance")),
        ]  # fmt: skip
        parts = [
            self.figure(
                self.plots.dots(jacobians),
                "How fast the decoded image changes with the code, for a step of one standard deviation of all codes "
                "in a dimension: at codes of test images, half-way between two of them, and at draws from the prior.",
            ),
            self.figure(self.plots.dots(steps), "What lies between codes, and what the noise does to the class."),
        ]
        for picture in self.pictures.interpolations:
            caption = "The straight path between the mean codes of the same two test images, which stand at the ends."
            parts.append(self.picture(picture, caption))
        return parts

    def _shortcuts(self) -> list[str]:
        panels = [
            Panel("collapsed dimensions", "share", [("collapsed_share", "")]),
            Panel("found again from z", "share of test images", [("reidentification", "")],
                  line=("reidentification_chance", "chance")),
            Panel("test less train", "distortion (nats)", [("distortion_gap", "")]),
            Panel("linear probe", "accuracy", [("linear_probe_loc", "on loc"), ("linear_probe_z", "on z")]),
        ]  # fmt: skip
        caption = (
            "Posteriors of the same test images in the two dimensions of the largest variance: points are means, "
            "ellipses one standard deviation (none for a point mass), colors are labels; the dashed ellipse is one "
            "standard deviation of the prior."
        )
        return [
            self.figure(self.plots.dots(panels), "Signs of a shortcut: bars ± one standard deviation over seeds."),
            self.picture(self.pictures.scatter, caption),
        ]

    def _scale(self) -> list[str]:
        return [
            self.figure(self.plots.histograms, "How often a scale occurs, over test images, dimensions and seeds."),
            self.figure(
                self.plots.training,
                "The part of the rate that the scale costs, and the mean scale, while the models trained. Dots: a "
                "scale of 1.",
            ),
        ]  # fmt: skip

    def _price(self) -> list[str]:
        bound = self._bound()
        elbos = [
            ("elbo", "own prior"),
            ("elbo_gaussian_prior", "Gaussian refitted"),
            ("elbo_mixture_prior", "mixture refitted"),
        ]
        if bound:
            elbos.append((bound, findings.title(bound).replace("iw bound k", "bound, K = ")))
        names = {f"frechet_{source}": word for source, word in SOURCES.items()}
        sources = [
            Panel(word, "Fréchet distance", [(name, "")], True, ("frechet_floor", "distance of train to test"))
            for name, word in names.items()
        ]
        parts = [
            self.figure(
                self.plots.dots([Panel("", "nats per image", elbos, joined=3)]),
                "The ELBO under the model's own prior and under priors refitted to its codes. How far the marks move "
                "to the right is what another prior alone would gain for the trained model.",
            ),
            self.figure(
                self.plots.importance,
                "The importance-weighted bound over the number of samples K: it rises from the ELBO towards log p(x).",
            ),
            self.figure(
                self.plots.dots(sources, share_x=True),
                "Fréchet distance to test images in the features of a small classifier, by where the codes are from. "
                "The dotted line is the distance between training and test images, below which nothing can be told.",
            ),
            self.figure(
                self.plots.precision_and_recall(),
                "Precision: how many samples look like test images. Recall: how many test images look like samples.",
            ),
        ]
        p = self.pictures
        parts += [
            self.picture(p.samples, "Draws from the prior; one seed for all arms."),
            self.picture(p.mixtures, "Draws from a mixture of 10 Gaussians fitted to the training codes."),
            self.picture(
                p.reconstructions, "The same test images, and what each arm makes of one draw of their codes."
            ),
        ]
        if p.reason:
            parts.append(f'<p class="note">{escape(p.reason)}</p>')
        elif p.seeds:
            seeds = _distinct(p.seeds.values())
            parts.append(f'<p class="note">Pictures are of the runs of seed {escape(seeds)}.</p>')
        return parts

    def methods(self) -> str:
        c = self.comparison
        chance = round(c.comparisons * (1 - LEVEL))
        items = [
            f"Intervals are Student's over seeds, at {100 * LEVEL:.0f} %. A difference between two arms is taken "
            "within seeds where both have two or more seeds in common, else by Welch's test. It is called a difference "
            "only where its interval excludes 0.",
            f"{c.comparisons} differences were compared with 0 in this report and its appendix, without a correction "
            f"for their number: were there none at all, about {chance} of them would look like one by chance alone.",
            "Arms of equal weight need not have equal rates, and a lower distortion may have been bought with rate. At "
            "equal rate, a family's distortion is read from the straight lines between its weights above 0, which lie "
            "above a convex curve, so that it is a little too high rather than too low.",
            "An answer is yes where every comparison that bears on it points this way, mostly where more than half do "
            "and none the other way, in part where fewer do, and mixed where some point the other way.",
            "What a mode does not define is left out (-), and its reason is given below the table.",
        ]
        if any(len(arm.members) == 1 for arm in c.arms):
            items.insert(1, "Arms with one seed have no interval: nothing is claimed of their differences.")
        return "<h2>How to read this</h2>\n<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"

    def appendix(self) -> str:
        c = self.comparison
        parts = ["<h2>Appendix: all figures</h2>"]
        claims = [*CLAIMS, *dict.fromkeys(i.claim for i in c.figures.values() if i.claim not in CLAIMS)]
        for claim in claims:
            names = [name for name, info in c.figures.items() if info.claim == claim and not info.is_curve]
            if names:
                parts.append(f"<h3>{escape(CLAIMS.get(claim, claim or 'other'))}</h3>")  # type: ignore[call-overload]
                parts.append(self.tall_table(names))
        ladder = [family for family in c.families if len(family.arms) > 1]
        if ladder:
            names = self._present(LADDER)
            arms = [arm for family in ladder for arm in family.arms]
            parts.append("<h3>Over the weight</h3>" + self.table(names, arms))
        return "\n".join(parts)

    # Pieces.

    def figure(self, drawn: Figure | None, caption: str) -> str:
        if drawn is None:
            return ""
        # As an image of its own, so that the names inside one figure do not meet those of another.
        return _image(as_svg(drawn), "svg", caption, 'style="width:100%"')

    def picture(self, data: bytes | None, caption: str) -> str:
        return "" if data is None else _image(data, "png", caption)

    def _bound(self) -> str | None:
        """The importance-weighted bound of the largest K that any run has."""
        found = [name for name in self.comparison.figures if name.startswith("iw_bound_k")]
        return max(found, key=lambda name: int(name.removeprefix("iw_bound_k") or 0), default=None)

    def _present(self, names: Iterable[str]) -> list[str]:
        bound = self._bound()
        given = [(bound or name) if name == "iw_bound" else name for name in names]
        return [name for name in given if any(arm.stat(name) for arm in self.comparison.arms)]

    def _row(self, arm: Arm, cells: Sequence[str]) -> str:
        color = hex_color(self.plots.looks[arm.label])
        mark = ' class="reference"' if arm is self.comparison.reference else ""
        dot = f'<span class="dot" style="background:{color}"></span>'
        return f'<tr{mark}><th class="text" scope="row">{dot}{escape(arm.label)}</th>{"".join(cells)}</tr>'

    def table(self, names: Sequence[str], arms: Sequence[Arm]) -> str:
        """Arms as rows, figures as columns, and the reasons for what is not there."""
        notes = _Footnotes()
        digits = {name: self._digits(name, arms) for name in names}
        rows = [self._row(arm, [self._cell(arm, name, digits[name], notes) for name in names]) for arm in arms]
        head = ['<th class="text">arm</th>', *(self._heading(name) for name in names)]
        return _table(head, rows) + notes.html()

    def tall_table(self, names: Sequence[str]) -> str:
        """Figures as rows and arms as columns, a few arms at a time."""
        notes, tables = _Footnotes(), []
        arms = self.comparison.shown
        across = math.ceil(len(arms) / math.ceil(len(arms) / ACROSS))
        for start in range(0, len(arms), across):
            some = arms[start : start + across]
            head = ['<th class="text">figure</th>', *(f"<th>{_unbroken(arm.label)}</th>" for arm in some)]
            rows = []
            for name in names:
                unit = self.comparison.figures[name].unit
                digits = self._digits(name, arms)
                cells = "".join(self._cell(arm, name, digits, notes) for arm in some)
                tail = f" <small>({escape(unit)})</small>" if unit else ""
                rows.append(f'<tr><th class="text" scope="row">{escape(name)}{tail}</th>{cells}</tr>')
            tables.append(_table(head, rows))
        return "".join(tables) + notes.html()

    def _digits(self, name: str, arms: Sequence[Arm]) -> int:
        return digits_for([stat.mean for arm in arms if (stat := arm.stat(name)) is not None])

    def _heading(self, name: str) -> str:
        unit = self.comparison.figures[name].unit
        return f"<th>{escape(name.replace('_', ' '))}<small>{escape(unit)}</small></th>"

    def _cell(self, arm: Arm, name: str, digits: int, notes: _Footnotes) -> str:
        stat = arm.stat(name)
        if stat is None:
            reason = arm.reason(name)
            return f"<td>-{notes.mark(reason) if reason else ''}</td>"
        said = dict.fromkeys(str(m.figures.get(name, {}).get("note", "")) for m in arm.members)
        marks = "".join(notes.mark(note) for note in said if note)
        if stat.n < len(arm.members) and (reason := arm.reason(name)):
            marks += notes.mark(reason)
        found = None if arm is self.comparison.reference else self.comparison.difference(name, arm)
        style = ' class="differs"' if found is not None and found.is_real else ""
        return f"<td{style}>{escape(amount(stat, '', digits) + partly(stat, arm))}{marks}</td>"


class _Footnotes:
    """Notes below a table, each once, marked a, b, c ..."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def mark(self, text: str) -> str:
        place = len(self.texts)
        letter = chr(97 + place % 26) * (1 + place // 26)
        return f"<sup>{self.texts.setdefault(text, letter)}</sup>"

    def html(self) -> str:
        if not self.texts:
            return ""
        notes = " ".join(f"<span><sup>{letter}</sup> {escape(text)}.</span>" for text, letter in self.texts.items())
        return f'<p class="foot">{notes}</p>'


def _unbroken(label: str) -> str:
    """A label as HTML that breaks between its settings only."""
    return escape(label).replace(" ", "&nbsp;").replace(",&nbsp;", ", ")


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(head)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _image(data: bytes, kind: str, caption: str, style: str = "") -> str:
    source = f"data:{SIZES[kind]};base64,{base64.b64encode(data).decode()}"
    return (
        f'<figure><img {style} alt="{escape(caption, quote=True)}" src="{source}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _distinct(values: Iterable[Any]) -> str:
    """The different values among some, those that are None left out."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def as_plain(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON has it: arms with their statistics, and the differences to the reference."""
    c = comparison
    return {
        "format": 1,
        "reference": c.reference.label,
        "level": LEVEL,
        "settings": {"differ": c.differing, "equal": c.equal},
        "arms": [_plain_arm(c, arm) for arm in c.arms],
        "differences": [
            {
                "arm": d.arm,
                "figure": d.figure,
                "value": d.value,
                "interval": d.interval,
                "seeds": d.seeds,
                "paired": d.is_paired,
                "is_difference": d.is_real,
            }
            for d in c.differences
        ],
        "comparisons": c.comparisons,
        "at_equal_rate": [
            {
                "family": found.family,
                "rate": found.rate,
                "outside": found.outside,
                "distortion": None if found.difference is None else found.difference.value,
                "interval": None if found.difference is None else found.difference.interval,
                "is_difference": None if found.difference is None else found.difference.is_real,
            }
            for found in c.at_equal_rate
        ],
        "answers": {
            claim: {"question": a.question, "verdict": a.verdict, "sentences": a.sentences}
            for claim, a in answers(c).items()
        },
    }


def _plain_arm(comparison: Comparison, arm: Arm) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, info in comparison.figures.items():
        about = {"unit": info.unit, "claim": info.claim}
        if info.is_curve and (curves := arm.curves(name)):
            stats = [statistic(column) for column in zip(*curves, strict=True)]
            figures[name] = {"mean": [s.mean for s in stats], "sd": [s.sd for s in stats], "n": len(curves), **about}
        elif (stat := arm.stat(name)) is not None:
            figures[name] = {"mean": stat.mean, "sd": stat.sd, "n": stat.n, "interval": stat.interval, **about}
        if name not in figures and (reason := arm.reason(name)):
            left_out[name] = reason
    runs = [{"path": str(member.folder.path), "seed": member.seed} for member in arm.members]
    return {"label": arm.label, "settings": arm.settings, "runs": runs, "figures": figures, "left_out": left_out}


def as_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One row a run: its folder, arm, seed, the settings that differ, and every scalar figure."""
    names = [name for name, info in comparison.figures.items() if not info.is_curve]
    rows = []
    for arm in comparison.arms:
        for member in arm.members:
            row: dict[str, Any] = {"run": str(member.folder.path), "arm": arm.label, "seed": member.seed}
            row |= {key: _plain(member.settings.get(key)) for key in comparison.differing}
            rows.append(row | {name: _plain(member.scalar(name)) for name in names})
    return rows


def _plain(value: Any) -> Any:
    return "" if value is None else value
