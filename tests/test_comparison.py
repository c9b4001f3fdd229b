"""Comparisons: arms and labels, which runs can be compared, findings and answers, plots and the report."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vae_cli.axes import sigma
from vae_cli.comparison.answers import DESCRIBED, answers
from vae_cli.comparison.arms import Comparison
from vae_cli.comparison.export import as_plain
from vae_cli.comparison.findings import amount
from vae_cli.comparison.members import Member, common_folder, drop_twins, like_the_newest, refuse_incomparable
from vae_cli.comparison.plot_layout import limits
from vae_cli.comparison.plot_style import looks
from vae_cli.comparison.plots import draw_all
from vae_cli.comparison.report import Pictures, render
from vae_cli.comparison.selection import BESIDE_HEADLINES, OVER_WEIGHTS, SOURCES, TERMINAL
from vae_cli.comparison.statistics import statistic
from vae_cli.comparison.table import SummaryTable, print_table
from vae_cli.comparison.tables import MISSING
from vae_cli.comparison.verdicts import WORDS, compared
from vae_cli.config.claims import CLAIMS, entry, is_primary
from vae_cli.core.errors import UserError
from vae_cli.core.wording import number
from vae_cli.runs.folder import RunDir

BASE = {"dataset": "digits", "likelihood": "gaussian", "prior": "standard_normal", "regularizer": "kl"}
BASE |= {"network": "mlp", "optimizer": "adam", "latent": "8"}
REASON = "a point mass has no finite rate"


def member(
    seed: int, settings: Mapping[str, Any], figures: Mapping[str, Any], left_out: tuple[str, ...] = ()
) -> Member:
    """Return a run with these settings and figures, without files."""
    whole: dict[str, Any] = {**BASE, "sigma": "learned", "regularizer.beta": 1.0, **settings}
    name = "_".join(f"{key}-{value}" for key, value in settings.items()) or "default"
    evaluation = {
        "format": 1,
        "profile": "quick",
        "images": "abc",
        "noise": sorted(getattr(sigma, whole["sigma"].title().replace("_", ""), sigma.Sigma).provides),
        "figures": {
            key: {"value": value, "unit": "nats", "count": 9, "metric": "M", "claim": claim_of(key)}
            | ({"resampled": [0.01, -0.01] * 50} if is_primary(key) else {})
            for key, value in figures.items()
        },
        "left_out": {key: {"reason": REASON, "metric": "M", "claim": claim_of(key)} for key in left_out},
    }
    return Member(RunDir(Path(f"runs/digits/{name}_seed-{seed}")), whole, seed, {}, evaluation)


def claim_of(name: str) -> str:
    for words, claim in CLAIM_WORDS.items():
        if name.startswith(words):
            return claim
    return "price"


CLAIM_WORDS = {
    ("rate", "noise_probe", "quantization"): "bits",
    ("jacobian", "largest", "midpoint", "neighbour_label"): "neighbours",
    ("collapsed", "reident", "distortion_gap"): "shortcuts",
    ("scale", "training"): "scale",
}


def labels(*settings: Mapping[str, Any]) -> list[str]:
    """Return the labels of arms with these settings, in this order."""
    comparison = Comparison([member(0, one, {"distortion": 1.0}) for one in settings])
    by_run = {arm.members[0].folder.path: arm.label for arm in comparison.arms}
    return [by_run[member(0, one, {}).folder.path] for one in settings]


# Arms and labels.


def test_labels_have_as_few_words_as_possible() -> None:
    fixed, half = {"sigma": "fixed", "sigma.value": 1.0}, {"sigma": "fixed", "sigma.value": 0.5}
    assert labels({}, half, fixed, {**fixed, "prior": "scaled_normal"}, {"regularizer.beta": 4}) == [
        "learned",
        "fixed 0.5",
        "fixed 1.0",
        "fixed 1.0, scaled_normal",
        "learned, beta 4",
    ]
    assert labels(fixed, half) == ["fixed 1.0", "fixed 0.5"]
    assert labels({}, {"latent": 2}, {"latent": 4}) == ["latent 8", "latent 2", "latent 4"]
    assert labels({"latent": "2x4x4"}, {"latent": "4x4x4"}) == ["latent 2x4x4", "latent 4x4x4"]
    assert labels({}, half, {"regularizer.beta": 0}, {**half, "regularizer.beta": 0}) == [
        "learned",
        "fixed 0.5",
        "learned, beta 0",
        "fixed 0.5, beta 0",
    ]
    assert labels({"regularizer.beta": 1.0}, {"regularizer.beta": 4}) == ["beta 1.0", "beta 4"]
    bounded = {"sigma": "bounded", "sigma.least": 0.1, "sigma.most": 0.9}
    assert labels({}, bounded) == ["learned", "bounded"]
    assert labels({}, bounded, {**bounded, "sigma.most": 0.5}) == ["learned", "bounded most 0.9", "bounded most 0.5"]
    network = {"network": "conv", "network.width": 32}
    assert labels({}, network) == ["mlp", "conv"]
    assert labels({}, {"sigma": "fixed", "epochs": 3}) == ["learned", "fixed"]


def test_the_weight_of_a_total_correlation_is_not_the_weight_of_the_kl_term() -> None:
    own = {"regularizer": "total_correlation", "regularizer.alpha": 1.0, "regularizer.gamma": 1.0}
    settings: list[dict[str, Any]] = [{"regularizer.beta": 4.0}, *({**own, "regularizer.beta": b} for b in (1.0, 6.0))]
    comparison = Comparison([member(0, {}, {"rate": 1.0}), *(member(0, words, {"rate": 2.0}) for words in settings)])
    assert [[arm.beta for arm in family.arms] for family in comparison.families] == [[1.0, 4.0], [None], [None]]
    assert len({family.label for family in comparison.families}) == 3
    assert all(arm.has_price for arm in comparison.arms)


def test_families_have_different_labels() -> None:
    settings = [{"regularizer": "mmd", "regularizer.beta": b, "regularizer.kernel": k} for b, k in ((0, "a"), (1, "b"))]
    comparison = Comparison([member(0, words, {"rate": 1.0}) for words in settings])
    assert {family.label for family in comparison.families} == {"beta 0", "beta 1"}


def test_a_regularizer_without_a_kl_term_can_penalize_the_code() -> None:
    choices = {"mmd": {"weight": 10.0}, "dip": {"lambda_od": 0.0, "lambda_d": 1.0}}
    for choice, weights in choices.items():
        words = {"regularizer": choice, "regularizer.beta": 0.0}
        named = {f"regularizer.{name}": weight for name, weight in weights.items()}
        idle = dict.fromkeys(named, 0.0)
        arms = Comparison([member(0, {**words, **given}, {"rate": 1.0}) for given in (named, idle)]).arms
        assert sorted(arm.has_price for arm in arms) == [False, True]


def test_only_normal_noise_is_compared_as_hard_coded() -> None:
    for choice in ("fixed", "preserving", "uniform", "random", "deterministic"):
        figures = {} if choice == "deterministic" else {"scale_min": 0.5, "scale_max": 0.5}
        arm = Comparison([member(0, {"sigma": choice}, {"distortion": 1.0, **figures})]).reference
        assert arm.has_noise == (choice != "deterministic")
        assert arm.has_constant_scale == (choice in ("fixed", "preserving")), choice


def test_grouping_reference_and_families() -> None:
    members = [
        member(seed, {"sigma": sigma, "regularizer.beta": beta}, {"rate": 1 / beta, "distortion": beta})
        for sigma in ("learned", "shared", "zero")
        for beta in (0.25, 0.5, 1, 2)
        for seed in (0, 1, 2)
    ]
    comparison = Comparison(members)
    assert len(comparison.arms) == 12
    assert comparison.reference.label == "learned"  # all weights are equally common, and 1 is the ELBO's
    members += [
        member(seed, {"sigma": "deterministic"}, {"distortion": 1.0}, ("rate", "scale_mean")) for seed in (0, 1)
    ]
    comparison = Comparison(members)
    assert comparison.reference.label == "learned"
    assert [arm.label for arm in comparison.shown] == ["learned", "shared", "zero", "deterministic"]
    assert [(f.label, len(f.ladder)) for f in comparison.families] == [
        ("learned", 4),
        ("shared", 4),
        ("zero", 4),
        ("deterministic", 0),
    ]
    assert not comparison.arms[-1].has_noise
    assert comparison.arms[-1].seeds == [0, 1]
    assert Comparison(members, "shared").reference.label == "shared"
    with pytest.raises(UserError, match="Did you mean 'shared'"):
        Comparison(members, "sharde")


def test_twins_are_counted_once() -> None:
    one = member(0, {}, {"distortion": 1.0})
    kept, twins = drop_twins([one, member(0, {}, {"distortion": 2.0}), member(1, {}, {})])
    assert [m.seed for m in kept] == [0, 1]
    assert twins[0][1] is one


def test_equal_rate_takes_the_rate_out_of_the_comparison() -> None:
    """Two families at different rates on the curve D = 100 / R do not differ at equal rate; a third is 7 above it."""

    def run(seed: int, sigma: str, beta: float, rate: float, above: float = 0.0) -> Member:
        rate += 0.01 * seed
        figures = {"rate": rate, "distortion": 100 / rate + above + 0.001 * seed * seed, "scale_mean": 0.5}
        return member(seed, {"sigma": sigma, "regularizer.beta": beta}, figures)

    members = []
    for seed in (0, 1, 2):
        members += [run(seed, "learned", 1, 10.0)]
        members += [run(seed, "same", beta, rate) for beta, rate in ((1, 9.0), (0.5, 9.99), (0.25, 10.05))]
        members += [run(seed, "worse", beta, rate, 7) for beta, rate in ((1, 9.0), (0.5, 9.99), (0.25, 10.05))]
        members += [run(seed, "far", beta, rate) for beta, rate in ((1, 4.0), (0.5, 5.0))]
    found = {equal.family: equal for equal in Comparison(members, "learned").at_equal_rate}
    assert set(found) == {"same", "worse", "far"}
    same, worse = found["same"].difference, found["worse"].difference
    assert same is not None
    assert worse is not None
    assert same.value == pytest.approx(0, abs=2e-3)
    assert worse.value == pytest.approx(7, abs=2e-3)
    assert worse.is_real
    assert found["far"].difference is None
    assert found["far"].outside == pytest.approx((4.01, 5.01))
    assert any(
        "outside the range of rates" in text for text in answers(Comparison(with_price(members)))["price"].sentences
    )


def with_price(members: list[Member]) -> list[Member]:
    """Return the same runs and an arm with constant sigma, without which the claim about its cost is not tested."""
    return [
        *members,
        *(
            member(
                seed,
                {"sigma": "set"},
                {"rate": 9.0, "distortion": 9.0, "elbo": -18.0, "scale_min": 1.0, "scale_max": 1.0},
            )
            for seed in (0, 1, 2)
        ),
        *(
            member(seed, {"batch_size": 9}, {"rate": 9.0, "distortion": 9.0, "elbo": -17.0 - 0.01 * seed})
            for seed in (0, 1, 2)
        ),
    ]


# Refusals.


@pytest.mark.parametrize(
    "other",
    [
        {"dataset": "mnist"},
        {"dataset.split_seed": 1},
        {"likelihood": "bernoulli"},
        {"likelihood.scale": 0.1},
    ],
    ids=str,
)
def test_runs_about_other_images_or_units_are_refused(other: dict[str, Any]) -> None:
    members = [member(0, {}, {}), member(1, {}, {}), member(0, {"sigma": "fixed", **other}, {})]
    with pytest.raises(UserError) as caught:
        refuse_incomparable(members)
    (key, value), text = next(iter(other.items())), str(caught.value)
    for said in (key, str(value), str(members[2].folder.path), "vae compare "):
        assert said in text
    refuse_incomparable(members[:2])


def test_other_images_are_refused() -> None:
    members = [member(0, {}, {}), member(1, {}, {})]
    members[1].evaluation["images"] = "other"
    with pytest.raises(UserError, match="fingerprint"):
        refuse_incomparable(members)


def test_common_folder() -> None:
    assert common_folder([Path("runs/digits/a"), Path("runs/digits/b")]) == Path("runs/digits")
    assert common_folder([Path("runs/digits/a"), Path("runs/mnist/b")]) == Path("runs")
    assert common_folder([Path("a"), Path("b")]) == Path()


# Findings.


def test_in_a_folder_the_runs_comparable_with_the_newest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"likelihood": "bernoulli"}
    members = [member(0, {}, {}), member(1, other, {}), member(2, {}, {}), member(3, other, {})]
    ages = {one.folder.path: age for age, one in enumerate(members)}
    monkeypatch.setattr("vae_cli.comparison.members.last_written", ages.__getitem__)
    kept, note = like_the_newest(members)
    assert kept == [members[1], members[3]]
    assert note is not None
    assert f"{members[0].folder.path}, {members[2].folder.path}" in note
    assert note.endswith("differ from it in likelihood.")
    assert like_the_newest(members[::2]) == (members[::2], None)


def study(constant: float, refit: float, noise: float = 0.01) -> Comparison:
    """Return three seeds each of a learned sigma, a constant one, a point mass, and a learned one with beta 0."""
    members = []
    for seed in (0, 1, 2):
        jitter = noise * (seed - 1)
        common = {"distortion": 80.0, "noise_probe_tolerance": 0.5 + jitter / 100, "largest_step_over_mean": 1.5}
        common |= {"quantization_bits_within_1_nat": 30.0, "jacobian_ratio": 1.1 + jitter / 10}
        scales = {"scale_mean": 0.3 + jitter / 10, "scale_min": 0.1, "scale_max": 1.0, "rate": 20.0}
        learned = {**common, **scales, "elbo": -100.0 + jitter, "elbo_gaussian_prior": -99.0}
        learned |= {"iw_bound_k5000": -98.0 + jitter, "iw_growth": 0.5, "scale_distance_from_1": 0.7}
        members.append(member(seed, {}, learned))
        fixed = {**common, "rate": 20.0, "scale_mean": 1.0, "scale_min": 1.0, "scale_max": 1.0}
        fixed |= {"elbo": -100.0 - constant - jitter, "elbo_gaussian_prior": -99.0 - refit}
        fixed |= {"iw_bound_k5000": -98.0 - constant / 2 - jitter, "iw_growth": 2.0, "scale_distance_from_1": 0.0}
        members.append(member(seed, {"sigma": "fixed", "sigma.value": 1.0}, fixed))
        point = {**common, "noise_probe_tolerance": 0.1 + jitter / 100, "largest_step_over_mean": 1.5}
        point |= {"quantization_bits_within_1_nat": 60.0 + jitter, "jacobian_ratio": 1.1 - jitter / 20}
        gone = ("rate", "elbo", "elbo_gaussian_prior", "scale_mean", "scale_min", "scale_max", "iw_bound_k5000")
        members.append(member(seed, {"sigma": "deterministic"}, point, gone))
        free = {**learned, "noise_probe_tolerance": 0.05, "scale_mean": 0.001 + jitter / 1e4, "rate": 300.0 + jitter}
        free["elbo"] = -400.0 + jitter
        members.append(member(seed, {"regularizer.beta": 0}, free))
        for beta, away in ((0.5, 0.8), (4, 0.4)):
            members.append(
                member(seed, {"regularizer.beta": beta}, {**learned, "scale_distance_from_1": away + jitter})
            )
    return Comparison(members)


def test_answers_follow_the_numbers() -> None:
    found = answers(study(constant=28.0, refit=1.4))
    assert found["bits"].verdict == "Tentatively: yes"
    assert found["neighbours"].verdict == "Tentatively: no difference"
    assert found["shortcuts"].verdict == "Not tested"  # its figure was not measured
    assert found["scale"].verdict == "Tentatively: yes"
    assert found["price"].verdict == "Tentatively: 14.00 nats per image, with 8 latent dimensions"
    assert "for 'deterministic' and" in found["bits"].sentences[0]
    assert "[" in found["bits"].sentences[0]
    assert "95 % of the difference" in " ".join(found["price"].sentences)
    assert "From 64 to 5,000 draws, the importance-weighted bound grows by" in " ".join(found["price"].sentences)
    assert REASON in " ".join(found["bits"].sentences)
    none = answers(study(constant=0.0, refit=0.0, noise=0.02))["price"]
    assert none.verdict == "Tentatively: nothing: less than 0.500 nats per image, with 8 latent dimensions"
    assert "no difference found with 3 seeds" in " ".join(none.sentences)


def test_the_share_of_the_prior_is_measured_by_arms_that_differ_only_in_it() -> None:
    comparison = study(constant=28.0, refit=26.0)
    learned_prior = {"sigma": "fixed", "sigma.value": 1.0, "prior": "scaled_normal"}
    figures = {"elbo": -100.5, "rate": 20.0, "distortion": 80.5, "scale_min": 1.0, "scale_max": 1.0}
    members = [*comparison.members, *(member(seed, learned_prior, figures) for seed in (0, 1, 2))]
    _, told, *_ = answers(Comparison(members))["price"].sentences
    assert "7 % of the difference" in told
    assert "in 'fixed 1.0, scaled_normal', " in told
    assert "98 % of the difference" in told


def test_one_seed_is_never_a_difference() -> None:
    comparison = study(constant=28.0, refit=1.4)
    alone = Comparison([m for m in comparison.members if m.seed == 0])
    found = answers(alone)
    assert {found[claim].verdict for claim in ("bits", "neighbours", "scale", "price")} == {"Not judged"}
    assert "not judged, because there is only one seed" in found["price"].sentences[0]
    assert all(d.is_real is None for d in alone.differences)
    assert alone.comparisons == 0
    assert 'class="differs"' not in page_of(alone)
    assert "claims no difference for them" in page_of(alone)


def test_numbers_read_well() -> None:
    assert number(-12.345) == "\N{MINUS SIGN}12.35"
    assert number(-0.0001, 2) == "0.00"
    assert amount(statistic([0.0051, 0.0053]), "", 2) == "0.0052 ± 0.0001"
    assert amount(statistic([23.4])) == "23.40"
    assert amount(statistic([0.0, 0.0]), "nats", 2) == "0.00 ± 0.00 nats"


# Plots and the report.


def test_axes_leave_out_outliers_that_would_hide_the_rest() -> None:
    near = [(30.0, 0.1), (30.5, 0.2), (27.0, 0.3), (13.0, 1.0)] * 3
    found = limits([*near, (-400.0, 1.0), (-399.0, 1.0)])
    assert found is not None
    assert -400 < found[0] < 12
    assert found[1] > 30.7
    wide = limits([(0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (5.0, 0.0)])
    assert wide is not None
    assert wide[0] < 0
    assert wide[1] > 5
    apart = limits([*near, (-500.0, 1.0), (-280.0, 1.0)])  # the widest gap is between the two that are far off
    assert apart is not None
    assert apart[0] > -280
    assert limits([]) is None
    assert limits([(1.0, 0.0)]) is not None
    assert limits([(0.0, 0.0)] * 3) == (-0.05, 1.0)  # a share of 0 in all arms: no axis to -0.5


def test_the_table_is_a_list_on_a_terminal_that_is_too_narrow() -> None:
    columns = {"Rate": ["1.0", "2.0"], "Distortion": ["3.0", ""], "ELBO": ["5.0", "6.0"], "Noise tolerance": ["7", "8"]}
    table = SummaryTable("title", ["learned, [400, 400]", "fixed 1.0"], ["2", "3"], columns, "below")
    printed = {}
    for width in (200, 40):
        console = Console(width=width, force_terminal=True, no_color=True, file=StringIO(), highlight=False)
        print_table(console, table)
        assert isinstance(console.file, StringIO)
        printed[width] = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in console.file.getvalue().splitlines()]
        assert max(map(len, printed[width])) <= width
        assert printed[width][-1] == "below"
    assert any("tolerance" in line for line in printed[200])
    assert printed[40] == [
        "title", "learned, [400, 400]", "  runs: 2", "  Rate: 1.0", "  Distortion: 3.0", "  ELBO: 5.0", "fixed 1.0",
        "  runs: 3", "  Rate: 2.0", "  ELBO: 6.0", "below",
    ]  # fmt: skip


class Parsed(HTMLParser):
    """The tags of a page, its text, and its links and sources."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(
    comparison: Comparison, pictures: Pictures | None = None, title: str = "title", notes: Sequence[str] = ()
) -> str:
    return render(comparison, draw_all(comparison), pictures or Pictures(), title, notes)


def test_the_report_needs_no_other_file_and_escapes_all_text() -> None:
    evil = '<script>alert("$\\x$ & y")</script>'
    members = study(constant=28.0, refit=1.4).members
    members += [member(seed, {"sigma": evil}, {"distortion": 81.0, "rate": 1.0, "rate_per_dimension": [2.0, 1.0]})
                for seed in (0, 1)]  # fmt: skip
    members[0].summary["git_commit"] = evil
    members[0].evaluation["figures"]["distortion"]["note"] = evil
    members[2].evaluation["left_out"]["rate"]["reason"] = evil
    page = page_of(Comparison(members), Pictures(reason=evil), evil, [evil])
    parsed = Parsed(page)
    assert parsed.open == []
    assert parsed.tags.count("script") == 1  # the one that sorts tables
    assert parsed.text.count(evil) >= 5
    assert parsed.links
    kinds = {link.partition(":")[0] if ":" in link else link[:1] for link in parsed.links}
    assert kinds == {"data", "#", "r"}  # pictures, sections of the page, folders of runs such as runs/digits/a
    names = set(re.findall(r' id="(.*?)"', page))
    assert {link[1:] for link in parsed.links if link.startswith("#")} <= names
    assert not re.search(r"@import|url\(", page)
    assert "@media print" in page


def test_a_run_whose_name_is_not_utf8_is_linked() -> None:
    comparison = study(constant=28.0, refit=1.4)
    first = comparison.members[0]
    object.__setattr__(first, "folder", RunDir(Path("runs/digits/a\udcff b")))
    page = page_of(Comparison(comparison.members))
    page.encode()
    assert 'href="runs/digits/a%FF%20b/"' in page


def test_a_missing_figure_is_shown_with_its_reason_and_never_as_a_number() -> None:
    comparison = study(constant=28.0, refit=1.4)
    html = page_of(comparison)
    row = re.search(r"deterministic</th>\s*((?:<td[^>]*>.*?</td>\s*)+)", html[html.index("More figures") :])
    assert row is not None
    assert re.fullmatch(f"<td><span[^>]*>{MISSING}</span><sup>a</sup></td>", row[1].partition("\n")[0])
    page = Parsed(html).text
    assert not re.search(r"\b(nan|inf|None)\b", page)
    assert REASON in page
    plain = as_plain(comparison)
    point = next(arm for arm in plain["arms"] if arm["label"] == "deterministic")
    assert "rate" not in point["figures"]
    assert point["left_out"]["rate"] == REASON
    json.dumps(plain, allow_nan=False)
    assert not any(d["arm"] == "deterministic" and d["figure"] == "rate" for d in plain["differences"])


@pytest.mark.parametrize("gone", [1, 2, 3, 5])
def test_any_figure_may_be_missing(gone: int) -> None:
    """A report is written whichever figures are missing, from some runs or from all."""
    comparison = study(constant=28.0, refit=1.4)
    for place, one in enumerate(comparison.members):
        figures = one.evaluation["figures"]
        for name in [name for count, name in enumerate(list(figures)) if (count + place * (gone % 2)) % gone == 0]:
            del figures[name]
    rebuilt = Comparison(comparison.members)
    page_of(rebuilt)
    as_plain(rebuilt)


def test_names_in_any_script_and_with_any_quotes_are_shown_unchanged() -> None:
    odd = "<b>'dü\"nn'</b>"
    members = study(constant=28.0, refit=1.4).members
    members += [member(seed, {"sigma": odd}, {"distortion": 81.0, "rate": 1.0}) for seed in (0, 1)]
    page = page_of(Comparison(members))
    assert "<b>" not in page
    assert "&lt;b&gt;&#39;dü&#34;nn&#39;&lt;/b&gt;" in page
    assert odd in Parsed(page).text


def test_figures_have_titles_and_identifiers_are_in_the_appendix_only() -> None:
    comparison = study(constant=28.0, refit=1.4)
    page = page_of(comparison)
    text = Parsed(page[: page.index('<h2 id="glossary">')]).text
    names = [name for name in comparison.figures if "_" in name]
    assert len(names) >= 5
    assert not [name for name in names if name in text]
    appendix = Parsed(page[page.index('<h2 id="all">') : page.index("<script>")]).text
    for name in names:
        assert name in appendix
        assert entry(name).title in appendix


def test_a_section_explains_its_headline_figures() -> None:
    text = " ".join(Parsed(page_of(study(constant=28.0, refit=1.4))).text.split())
    assert entry("rate").definition in text
    assert "Rate (nats, neither direction is better)" in text


def many_arms() -> Comparison:
    """Return the arms of `study` and ten more, in three seeds."""
    comparison = study(constant=28.0, refit=1.4)
    members = list(comparison.members)
    for seed in (0, 1, 2):
        figures = {name: figure["value"] for name, figure in comparison.reference.members[seed].figures.items()}
        constant = {**figures, "scale_mean": 1.0, "scale_min": 1.0, "scale_max": 1.0}
        members.append(member(seed, {"sigma": "fixed", "sigma.value": 1.0, "prior": "scaled_normal"}, constant))
        for latent in range(20, 29):
            members.append(member(seed, {"latent": latent}, figures))
    return Comparison(members)


def test_the_plot_of_a_claim_shows_the_arms_of_the_verdicts_and_another_one_more() -> None:
    comparison = many_arms()
    assert len(comparison.shown) > 8
    page = Parsed(page_of(comparison)).text
    assert page.count("Shown are the arms of the table") == page.count("The same plot, for more arms.") > 0
    assert "'deterministic' has no rate." in page
    arms = [arm.label for arm in compared(comparison)]
    assert arms[0] == comparison.reference.label
    assert {"fixed 1.0", "fixed 1.0, scaled_normal", "deterministic"} <= set(arms)
    few = Parsed(page_of(study(constant=28.0, refit=1.4))).text
    assert "Shown are the arms" not in few
    assert "for more arms" not in few


def test_arms_that_are_shown_together_look_different_and_the_same_in_every_plot() -> None:
    comparison = many_arms()
    found = looks(comparison)
    together = [found[arm.label] for arm in compared(comparison)]
    assert len(set(together)) == len(together)
    assert looks(comparison.only(compared(comparison))) == found
    assert len(comparison.only(comparison.arms[:2]).shown) == 2
    assert len(comparison.shown) > 2


@pytest.mark.parametrize("commit", [None, "0123456789abcdef+"])
def test_the_report_gives_the_commit_if_there_is_one(commit: str | None) -> None:
    members = study(constant=28.0, refit=1.4).members
    for one in members:
        one.summary["git_commit"] = commit
    assert ("0123456789ab+" in page_of(Comparison(members))) == (commit is not None)


def test_all_words_of_verdicts_are_explained() -> None:
    page = page_of(study(constant=28.0, refit=1.4))
    explained = set(re.findall(r"<dt>(.*?)</dt>", page[page.index("How to read this</h2>") :]))
    assert {*WORDS.values(), "Tentatively"} <= explained


def test_all_figures_that_the_rules_and_tables_name_are_in_the_register() -> None:
    expected = [name for names in DESCRIBED.values() for name in names]
    expected += [claim.primary.replace("{k}", "64") for claim in CLAIMS.values()]
    shown = [name for names in BESIDE_HEADLINES.values() for name in names]
    named = {*expected, *shown, *TERMINAL, *OVER_WEIGHTS, *(f"frechet_{source}" for source in SOURCES)}
    unknown = [name for name in named if not entry("iw_bound_k64" if name == "iw_bound_k" else name).definition]
    assert not unknown
