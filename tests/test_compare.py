"""`vae compare`: which runs go together, what differs, what seeds can tell, and a report that stands alone."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from vae_cli.cli import run as run_command
from vae_cli.commands.train import train
from vae_cli.comparison.answers import answers, verdict_of
from vae_cli.comparison.arms import Comparison
from vae_cli.comparison.findings import amount, gap
from vae_cli.comparison.members import Member, common_folder, drop_twins, like_the_newest, refuse_incomparable
from vae_cli.comparison.plots import Plots
from vae_cli.comparison.report import Pictures, as_plain, render
from vae_cli.comparison.statistics import difference, interpolate, statistic
from vae_cli.config.naming import clean
from vae_cli.core.errors import UserError
from vae_cli.core.wording import number
from vae_cli.runs.folder import RunDir

BASE = {"dataset": "digits", "likelihood": "gaussian", "prior": "standard_normal", "regularizer": "kl"}
BASE |= {"network": "mlp", "optimizer": "adam", "latent": "8"}
REASON = "a point mass has no finite rate"


def member(
    seed: int, settings: Mapping[str, Any], figures: Mapping[str, Any], left_out: tuple[str, ...] = ()
) -> Member:
    """A run with these settings and figures, none of it on disk."""
    whole: dict[str, Any] = {**BASE, "sigma": "learned", "regularizer.beta": 1.0, **settings}
    name = "_".join(f"{key}-{value}" for key, value in settings.items()) or "default"
    evaluation = {
        "format": 1,
        "profile": "quick",
        "images": "abc",
        "figures": {
            key: {"value": value, "unit": "nats", "count": 9, "metric": "M", "claim": claim_of(key)}
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
    ("collapsed", "reident"): "shortcuts",
    ("scale", "training"): "scale",
}


def labels(*settings: Mapping[str, Any]) -> list[str]:
    """The labels of arms with these settings, in the order given."""
    comparison = Comparison([member(0, one, {"distortion": 1.0}) for one in settings])
    by_run = {arm.members[0].folder.path: arm.label for arm in comparison.arms}
    return [by_run[member(0, one, {}).folder.path] for one in settings]


# Statistics against scipy and closed forms.


def test_interval_is_students() -> None:
    values = [3.0, 4.5, 3.7, 5.1]
    found = statistic(values)
    low, high = stats.t.interval(0.95, 3, loc=found.mean, scale=stats.sem(values))
    assert found.interval == pytest.approx((low, high))
    assert found.sd == pytest.approx(math.sqrt(sum((v - found.mean) ** 2 for v in values) / 3))
    assert statistic([2.0]) == (2.0, None, 1)
    assert statistic([2.0]).interval is None


def test_difference_is_paired_where_seeds_match() -> None:
    one, other = {0: 3.0, 1: 5.0, 2: 9.0}, {0: 2.0, 1: 4.1, 2: 7.8}
    found = difference("rate", "a", one, "b", other)
    assert found is not None
    test = stats.ttest_rel(list(one.values()), list(other.values())).confidence_interval(0.95)
    assert found.interval == pytest.approx((test.low, test.high))
    assert (found.is_paired, found.is_real, found.seeds) == (True, True, 3)


def test_difference_is_welchs_where_they_do_not() -> None:
    one, other = {0: 3.0, 1: 5.0, 2: 9.0}, {5: 2.0, 6: 4.1, 7: 7.8, 8: 3.3}
    found = difference("rate", "a", one, "b", other)
    assert found is not None
    test = stats.ttest_ind(list(one.values()), list(other.values()), equal_var=False).confidence_interval(0.95)
    assert found.interval == pytest.approx((test.low, test.high))
    assert (found.is_paired, found.is_real, found.seeds) == (False, False, 3)


def test_one_seed_has_no_interval_and_equal_values_no_difference() -> None:
    found = difference("rate", "a", {0: 3.0}, "b", {0: 1.0})
    assert found is not None
    assert (found.interval, found.is_real) == (None, None)
    assert "no interval" in gap(found)
    same = difference("scale", "a", {0: 0.1 + 0.2, 1: 0.1 + 0.2}, "b", {0: 0.3, 1: 0.3})
    assert same is not None
    assert same.is_real is False
    always = difference("scale", "a", {0: 1.0, 1: 1.0}, "b", {0: 0.5, 1: 0.5})
    assert always is not None
    assert always.is_real is True
    assert difference("scale", "a", {}, "b", {0: 1.0}) is None


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    import numpy as np

    draws = np.random.default_rng(0).normal(size=(2000, 2, 3))
    hits = 0
    for one, other in draws:
        found = difference("f", "a", dict(enumerate(one.tolist())), "b", dict(enumerate(other.tolist())))
        assert found is not None
        assert found.interval is not None
        hits += found.interval[0] <= 0 <= found.interval[1]
    assert hits / len(draws) == pytest.approx(0.95, abs=0.015)


def test_interpolation() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 2.0)]
    assert interpolate(points, 1.5) == pytest.approx(3.5)
    assert interpolate(points, 3.0) == pytest.approx(1.0)
    assert interpolate(points, 0.9) is None
    assert interpolate(points, 3.1) is None


# Arms and labels.


def test_labels_are_the_fewest_words() -> None:
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
    assert labels({}, half, {"regularizer.beta": 0}, {**half, "regularizer.beta": 0}) == [
        "learned",
        "fixed 0.5",
        "learned, beta 0",
        "fixed 0.5, beta 0",
    ]
    assert labels({"regularizer.beta": 1.0}, {"regularizer.beta": 4}) == ["beta 1.0", "beta 4"]
    network = {"network": "conv", "network.width": 32}
    assert labels({}, network) == ["mlp", "conv"]
    assert labels({}, {"sigma": "fixed", "epochs": 3}) == ["learned", "fixed"]


def test_grouping_reference_and_families() -> None:
    members = [
        member(seed, {"sigma": sigma, "regularizer.beta": beta}, {"rate": 1 / beta, "distortion": beta})
        for sigma in ("learned", "shared", "zero")
        for beta in (0.25, 0.5, 1, 2)
        for seed in (0, 1, 2)
    ]
    comparison = Comparison(members)
    assert len(comparison.arms) == 12
    assert comparison.reference.label == "learned"  # all weights are as common, and 1 is that of the ELBO
    members += [member(seed, {"sigma": "more"}, {"distortion": 1.0}, ("rate", "scale_mean")) for seed in (0, 1)]
    comparison = Comparison(members)
    assert comparison.reference.label == "learned"
    assert [arm.label for arm in comparison.shown] == ["learned", "shared", "zero", "more"]
    assert [(f.label, len(f.ladder)) for f in comparison.families] == [
        ("learned", 4),
        ("shared", 4),
        ("zero", 4),
        ("more", 0),
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
    """Two families on one curve D = 100 / R that sit at other rates are equal at equal rate; a third is 7 above it."""

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
    assert any("outside the range" in text for text in answers(Comparison(with_price(members)))["price"].sentences)


def with_price(members: list[Member]) -> list[Member]:
    """The same with an arm of constant scale, which the question of the price is about."""
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


def test_of_a_folder_the_runs_like_its_newest_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"likelihood": "bernoulli"}
    members = [member(0, {}, {}), member(1, other, {}), member(2, {}, {}), member(3, other, {})]
    ages = {one.folder.path: age for age, one in enumerate(members)}
    monkeypatch.setattr("vae_cli.comparison.arms.last_written", ages.__getitem__)
    kept, note = like_the_newest(members)
    assert kept == [members[1], members[3]]
    assert note is not None
    assert f"{members[0].folder.path}, {members[2].folder.path}" in note
    assert note.endswith("differ from it in likelihood.")
    assert like_the_newest(members[::2]) == (members[::2], None)


def study(constant: float, refit: float, noise: float = 0.01) -> Comparison:
    """Three seeds of a learned arm, one of constant scale, a point mass, and one without a price."""
    members = []
    for seed in (0, 1, 2):
        jitter = noise * (seed - 1)
        common = {"distortion": 80.0, "noise_probe_tolerance": 0.5 + jitter / 100, "largest_step_over_mean": 1.5}
        scales = {"scale_mean": 0.3 + jitter / 10, "scale_min": 0.1, "scale_max": 1.0, "rate": 20.0}
        learned = {**common, **scales, "elbo": -100.0 + jitter, "elbo_gaussian_prior": -99.0}
        members.append(member(seed, {}, learned))
        fixed = {**common, "rate": 20.0, "scale_mean": 1.0, "scale_min": 1.0, "scale_max": 1.0}
        fixed |= {"elbo": -100.0 - constant - jitter, "elbo_gaussian_prior": -99.0 - refit}
        members.append(member(seed, {"sigma": "fixed", "sigma.value": 1.0}, fixed))
        point = {**common, "noise_probe_tolerance": 0.1 + jitter / 100, "largest_step_over_mean": 1.5}
        gone = ("rate", "elbo", "elbo_gaussian_prior", "scale_mean", "scale_min", "scale_max")
        members.append(member(seed, {"sigma": "deterministic"}, point, gone))
        free = {**learned, "noise_probe_tolerance": 0.05, "scale_mean": 0.001 + jitter / 1e4, "rate": 300.0 + jitter}
        free["elbo"] = -400.0 + jitter
        members.append(member(seed, {"regularizer.beta": 0}, free))
    return Comparison(members)


def test_answers_follow_the_numbers() -> None:
    found = answers(study(constant=28.0, refit=1.4))
    assert found["bits"].verdict == "Yes"
    assert found["neighbours"].verdict == "Not shown"
    assert found["shortcuts"].verdict == "Not tested"  # none of its figures was measured
    assert found["scale"].verdict == "Yes"
    assert found["price"].verdict == "The arm of constant scale loses 28.00 nats"
    assert "95 % of the loss less" in found["price"].sentences[0]
    assert REASON in " ".join(found["bits"].sentences)
    none = answers(study(constant=0.0, refit=0.0, noise=0.5))["price"]
    assert none.verdict == "No loss that 3 seeds could show"
    assert "no difference that 3 seeds could show" in none.sentences[0]


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ((3, 0, 3), "Yes"),
        ((2, 0, 3), "Mostly"),
        ((1, 0, 3), "In part"),
        ((1, 1, 3), "Mixed"),
        ((0, 1, 3), "No, the opposite"),
        ((0, 0, 3), "Not shown"),
        ((0, 0, 0), "Cannot be told"),
    ],
)
def test_verdicts(counts: tuple[int, int, int], verdict: str) -> None:
    assert verdict_of(*counts) == verdict


def test_the_share_of_the_prior_is_told_by_arms_that_differ_in_it() -> None:
    comparison = study(constant=28.0, refit=26.0)
    learned_prior = {"sigma": "fixed", "sigma.value": 1.0, "prior": "scaled_normal"}
    figures = {"elbo": -100.5, "rate": 20.0, "distortion": 80.5, "scale_min": 1.0, "scale_max": 1.0}
    members = [*comparison.members, *(member(seed, learned_prior, figures) for seed in (0, 1, 2))]
    told = answers(Comparison(members))["price"]
    assert told.verdict == "2 of the 2 arms of constant scale lose 0.50 to 28.00 nats"
    assert len(told.sentences) == 1
    assert "7 % of the loss less" in told.sentences[0]
    assert "as 'fixed 1.0, scaled_normal', " in told.sentences[0]
    assert "98 % of the loss less" in told.sentences[0]


def test_one_seed_is_never_a_difference() -> None:
    comparison = study(constant=28.0, refit=1.4)
    alone = Comparison([m for m in comparison.members if m.seed == 0])
    found = answers(alone)
    assert found["bits"].verdict == "Cannot be told"
    assert found["scale"].verdict == "Cannot be told"
    assert "one seed" in found["price"].verdict
    assert all(d.is_real is None for d in alone.differences)
    assert alone.comparisons == 0
    assert 'class="differs"' not in render(Plots(alone), Pictures(), "one seed")
    assert "have no interval" in render(Plots(alone), Pictures(), "one seed")


def test_numbers_read_well() -> None:
    assert number(-12.345) == "\N{MINUS SIGN}12.35"
    assert number(-0.0001, 2) == "0.00"
    assert amount(statistic([0.0051, 0.0053]), "", 2) == "0.0052 ± 0.0001"
    assert amount(statistic([23.4])) == "23.40"
    assert amount(statistic([0.0, 0.0]), "nats", 2) == "0.00 ± 0.00 nats"


# The report.


class Parsed(HTMLParser):
    """The tags of a page, its text, and whatever it refers to."""

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


def test_report_stands_alone_and_escapes_what_it_is_told() -> None:
    evil = '<script>alert("$\\x$ & y")</script>'
    members = study(constant=28.0, refit=1.4).members
    members += [member(seed, {"sigma": evil}, {"distortion": 81.0, "rate": 1.0, "rate_per_dimension": [2.0, 1.0]})
                for seed in (0, 1)]  # fmt: skip
    members[0].summary["git_commit"] = evil
    members[0].evaluation["figures"]["distortion"]["note"] = evil
    members[2].evaluation["left_out"]["rate"]["reason"] = evil
    page = render(Plots(Comparison(members)), Pictures(reason=evil), evil, [evil])
    parsed = Parsed(page)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert parsed.text.count(evil) >= 5
    assert parsed.links
    assert all(link.startswith("data:image/") for link in parsed.links)
    assert not re.search(r"@import|url\(", page)
    assert "@media print" in page


def test_what_is_left_out_is_never_a_number() -> None:
    comparison = study(constant=28.0, refit=1.4)
    html = render(Plots(comparison), Pictures(), "title")
    row = re.search(r"deterministic</th>((?:<td[^>]*>.*?</td>)+)", html[html.index("1. The noise limits the") :])
    assert row is not None
    assert row[1].startswith("<td>-<sup>a</sup></td>")
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
    """Whatever is taken away, from some runs or from all, a report comes out."""
    comparison = study(constant=28.0, refit=1.4)
    for place, one in enumerate(comparison.members):
        figures = one.evaluation["figures"]
        for name in [name for count, name in enumerate(list(figures)) if (count + place * (gone % 2)) % gone == 0]:
            del figures[name]
    rebuilt = Comparison(comparison.members)
    render(Plots(rebuilt), Pictures(), "title")
    as_plain(rebuilt)


# The command, on runs.

SIGMAS = {"learned": "learned", "fixed": "fixed 1.0", "deterministic": "deterministic"}  # and the arms' labels
Vae = Callable[..., int]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of short runs of three sigma modes."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for sigma in SIGMAS:
            for seed in (0, 1):
                train([f"sigma={sigma}", "epochs=3", "network.hidden=[16]", "latent=3", f"seed={seed}"])
    return folder


class Terms:
    """A stand-in for the one metric that there is."""


def read_evaluation(folder: RunDir) -> dict[str, Any] | None:
    """What the stand-in for the evaluation has written of a run."""
    file = folder.path / "evaluation/metrics.json"
    return json.loads(file.read_text()) if file.exists() else None


def stand_in(monkeypatch: pytest.MonkeyPatch, evaluate_run: Callable[..., dict[str, Any]]) -> None:
    """Put a quick evaluation in the place of the real one."""
    monkeypatch.setattr("vae_cli.metrics.record.MODULES", {"terms": ("Terms",)})
    monkeypatch.setattr("vae_cli.metrics.evaluate.METRICS", (Terms,))
    monkeypatch.setattr("vae_cli.metrics.evaluate.evaluate_run", evaluate_run)
    monkeypatch.setattr("vae_cli.comparison.missing.stored_evaluation", read_evaluation)


@pytest.fixture
def assessed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The runs that were evaluated, by a stand-in that takes its figures from the summary."""
    seen: list[Path] = []

    def evaluate_run(
        folder: RunDir,
        profile: str = "quick",
        kinds: object = (Terms,),
        before: dict[str, Any] | None = None,
        samples: int | None = None,
        seed: int = 0,
        weights: str = "best",
        device: str = "auto",
        data_dir: object = None,
    ) -> dict[str, Any]:
        seen.append(folder.path)
        summary = folder.summary()
        figures: dict[str, Any] = {
            name: {"value": value, "unit": "nats", "count": 297, "metric": "Terms", "claim": claim_of(name)}
            for name, value in {**summary["test"], **summary["posterior"]}.items()
        }
        figures["noise_probe_t"] = {"value": [0.0, 0.5, 1.0], "metric": "Terms", "claim": "bits"}
        figures["noise_probe_distortion"] = {"value": [1.0, 2.0, 4.0], "metric": "Terms", "claim": "bits"}
        evaluation = {
            "format": 1,
            "run": folder.path.name,
            "step": summary["step"],
            "weights": weights,
            "seed": seed,
            "profile": profile,
            "budget": {"samples": samples},
            "images": "abc",
            "figures": {**(before or {}).get("figures", {}), **figures},
            "left_out": {} if "rate" in figures else {"rate": {"reason": REASON, "metric": "Terms", "claim": "bits"}},
        }
        (folder.path / "evaluation").mkdir(exist_ok=True)
        (folder.path / "evaluation/metrics.json").write_text(json.dumps(evaluation))
        return evaluation

    stand_in(monkeypatch, evaluate_run)
    return seen


@pytest.fixture
def vae(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Vae:
    monkeypatch.chdir(trained)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["vae", *words])
        return run_command()

    return call


def test_compare(vae: Vae, trained: Path, assessed: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert vae("compare", "--jobs", "1") == 0
    out = capsys.readouterr().out
    assert len(assessed) == 6
    folder = trained / "runs/digits/compare"
    assert all(str(Path("runs/digits/compare", name)) in out for name in ("compare.csv", "compare.json", "report.html"))
    assert re.search(r"^ *deterministic +2 ", out, re.MULTILINE)
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert len(rows) == 6
    assert {row["arm"] for row in rows} == set(SIGMAS.values())
    assert all((row["rate"] == "") == (row["arm"] == "deterministic") for row in rows)
    plain = json.loads((folder / "compare.json").read_text())
    summaries = [RunDir(trained / row["run"]).summary() for row in rows if row["arm"] == "learned"]
    learned = next(arm for arm in plain["arms"] if arm["label"] == "learned")
    mean = sum(summary["test"]["distortion"] for summary in summaries) / 2
    assert learned["figures"]["distortion"]["mean"] == pytest.approx(mean)
    assert learned["figures"]["distortion"]["n"] == 2
    page = Parsed((folder / "report.html").read_text())
    assert page.tags.count("img") >= 6
    assert "Pictures are of the runs of seed 0" in page.text

    # What it wrote is no run, and evaluated runs are not evaluated again, unless more is asked for.
    assert vae("compare", "runs/digits", "--jobs", "1", "--out", "elsewhere", "--tensorboard") == 0
    assert len(assessed) == 6
    assert (trained / "elsewhere/report.html").exists()
    assert {p.parent.name for p in (trained / "elsewhere/tensorboard/fixed-1.0").rglob("events*")} == {"mean", "sd"}
    assert vae("compare", "--jobs", "1", "--profile", "default", "--reference", "fixed 1.0") == 0
    assert len(assessed) == 12
    assert vae("compare", "--jobs", "1") == 0  # as thorough as most of the runs are
    assert len(assessed) == 12
    part = folder.parent / Path(rows[0]["run"]).name / "evaluation/metrics.json"
    found = json.loads(part.read_text())
    own = {"value": 1.0, "metric": "Mine", "claim": "bits"}
    part.write_text(json.dumps({**found, "figures": {"mine": own}, "left_out": {}}))
    assert vae("compare", "--jobs", "1", "--reference", "fixed 1.0") == 0
    assert assessed[12:] == [Path(rows[0]["run"])]
    whole = json.loads(part.read_text())
    assert (whole["profile"], whole["figures"]) == ("default", {**found["figures"], "mine": own})
    assert json.loads((folder / "compare.json").read_text())["reference"] == "fixed 1.0"


@pytest.mark.parametrize("out", ["notes.txt", "notes.txt/below"])
def test_a_place_that_cannot_be_is_refused_before_anything_is_measured(
    vae: Vae, trained: Path, assessed: list[Path], out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained / "notes.txt").write_text("")
    assert vae("compare", "--jobs", "1", "--profile", "full", "--out", out) == 2
    assert "notes.txt is a file; name a folder" in capsys.readouterr().err
    assert assessed == []


def test_a_run_that_was_measured_in_another_way_is_named(
    vae: Vae, trained: Path, assessed: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert vae("compare", "--jobs", "1") == 0
    count = len(assessed)
    run = sorted((trained / "runs/digits").glob("*/evaluation"))[0].parent
    file = run / "evaluation/metrics.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"seed": 9}))
    try:
        assert vae("compare", "--jobs", "1") == 2
    finally:
        file.write_text(whole)
    assert f"vae evaluate runs/digits/{run.name} --quick --seed 0 --weights best" in capsys.readouterr().err
    assert len(assessed) == count


@pytest.fixture
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put files without content in the place of a report."""

    def write(_: object, folder: Path, *__: object) -> bool:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for name in ("compare.csv", "compare.json", "report.html", "figures/plane.png"):
            (folder / name).write_text(name)
        return True

    monkeypatch.setattr("vae_cli.comparison.compare.write_all", write)


@pytest.fixture
def compared(
    vae: Vae, trained: Path, assessed: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[Callable[..., str], Path, Path]:
    """Compares copies of the runs and gives what was said; the folder of the copies, and that of the report."""
    runs = tmp_path / "copies"
    for run in (trained / "runs/digits").glob("*latent*"):
        shutil.copytree(run, runs / run.name)
    assert vae("compare", str(runs), "--jobs", "1") == 0  # which evaluates them, if no other test has
    shutil.rmtree(runs / "compare")
    capsys.readouterr()

    def compare(*words: str) -> str:
        assert vae("compare", str(runs), "--jobs", "1", *words) == 0
        return capsys.readouterr().out

    return compare, runs, runs / "compare"


UNCHANGED = "Nothing has changed since this report was written:\n"


def test_an_answer_is_kept_as_long_as_nothing_changes(
    compared: tuple[Callable[..., str], Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, _, folder = compared
    said = compare()
    assert UNCHANGED not in said

    def write(*_: object) -> None:
        raise AssertionError("there is nothing to write")

    with monkeypatch.context() as patched:
        patched.setattr("vae_cli.comparison.compare.write_all", write)
        patched.setattr("vae_cli.comparison.compare.collect", write)
        again = compare()
    assert again.replace(UNCHANGED, "") == said
    assert UNCHANGED in again
    with_curves = compare("--tensorboard")
    assert UNCHANGED not in with_curves
    assert compare("--tensorboard") == with_curves.replace(
        str(folder / "compare.csv"), UNCHANGED + str(folder / "compare.csv")
    )


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "other figures": lambda run, _: (run / "evaluation/metrics.json").write_text(
        (run / "evaluation/metrics.json").read_text().replace('"value": ', '"value":  ')
    ),
    "other weights": lambda run, _: (run / "best.pt").write_bytes((run / "best.pt").read_bytes()),
    "another summary": lambda run, _: os.utime(run / "summary.json", ns=(1, 1)),
    "other settings": lambda run, _: os.utime(run / "config.yaml", ns=(1, 1)),
    "a run less": lambda run, _: shutil.rmtree(run),
    "a run more": lambda run, _: shutil.copytree(run, run.parent / "another"),
    "no report": lambda _, folder: (folder / "report.html").unlink(),
    "no figure": lambda _, folder: next((folder / "figures").iterdir()).unlink(),
    "another figure": lambda _, folder: next((folder / "figures").iterdir()).write_bytes(b""),
    "a changed answer": lambda _, folder: (folder / ".kept.json").write_text("{}"),
}


@pytest.mark.usefixtures("quick_report")
@pytest.mark.parametrize("change", CHANGES)
def test_an_answer_is_given_anew_where_something_has_changed(
    compared: tuple[Callable[..., str], Path, Path], change: str
) -> None:
    compare, runs, folder = compared
    compare()
    CHANGES[change](sorted(runs.glob("*latent*"))[0], folder)
    assert UNCHANGED not in compare()
    assert UNCHANGED in compare()


@pytest.mark.usefixtures("quick_report")
def test_an_answer_is_kept_of_runs_that_were_evaluated_for_it(
    compared: tuple[Callable[..., str], Path, Path], assessed: list[Path]
) -> None:
    compare, runs, _ = compared
    for file in runs.rglob("evaluation/metrics.json"):
        file.unlink()
    count = len(assessed)
    assert UNCHANGED not in compare()
    assert len(assessed) == count + 6
    assert UNCHANGED in compare()
    assert len(assessed) == count + 6


@pytest.mark.usefixtures("quick_report")
def test_an_answer_is_not_kept_where_it_may_change_by_itself(compared: tuple[Callable[..., str], Path, Path]) -> None:
    compare, runs, _ = compared
    last = sorted(runs.glob("*latent*"))[-1]
    summary = json.loads((last / "summary.json").read_text())
    (last / "summary.json").write_text(json.dumps({**summary, "status": "running"}))
    for _ in range(2):
        assert "is interrupted" in compare()
    assert UNCHANGED not in compare()


@pytest.mark.usefixtures("quick_report")
@pytest.mark.parametrize(
    "change",
    [
        {"notes": ["\x1b[2J"]}, {"notes": 1}, {"sheet": {}}, {"sheet": {"title": 1}}, {"format": 2},
        {"sheet": {"title": "", "arms": ["a"], "counts": [], "columns": {}, "below": ""}},
        {"sheet": {"title": "", "arms": ["a"], "counts": [[]], "columns": {}, "below": ""}},
    ],
)  # fmt: skip
def test_a_kept_answer_that_is_none_is_not_given(
    compared: tuple[Callable[..., str], Path, Path], change: dict[str, Any]
) -> None:
    compare, _, folder = compared
    said = compare()
    file = folder / ".kept.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert compare() == said


def test_curves_over_seeds(
    vae: Vae, trained: Path, assessed: list[Path], tmp_path: Path, tensorboard: Callable[..., Callable[..., Any]]
) -> None:
    assert vae("compare", "--jobs", "1", "--out", str(tmp_path), "--tensorboard") == 0
    get = tensorboard(tmp_path / "tensorboard")
    assert set(get("runs")) == {f"{clean(label)}/{kind}" for label in SIGMAS.values() for kind in ("mean", "sd")}
    paths = [path for path in (trained / "runs/digits").glob("latent-3*") if "sigma" not in path.name]
    values = [RunDir(path).metrics()[-1]["validation/loss"] for path in paths]
    tag = "validation/loss"
    for kind, expected in {"mean": statistic(values).mean, "sd": statistic(values).sd}.items():
        points = get("plugin/scalars/scalars", run=f"learned/{kind}", tag=tag)
        assert len(points) == 3
        assert points[-1][2] == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_compared(
    vae: Vae, trained: Path, assessed: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = next((trained / "runs/digits").glob("*sigma-fixed*"))
    assert vae("compare", str(run)) == 2
    assert "only finished run" in capsys.readouterr().err
    assert vae("compare", str(tmp_path)) == 2
    assert "holds no run" in capsys.readouterr().err
    assert vae("compare", "nowhere") == 2
    assert vae("compare", "--reference", "fixd", "--jobs", "1") == 2
    assert "Did you mean 'fixed 1.0'" in capsys.readouterr().err
    assert not assessed  # all of this was seen before anything was evaluated


def test_unfinished_runs_are_left_out_and_named(
    vae: Vae, trained: Path, assessed: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for run in sorted((trained / "runs/digits").glob("*latent*")):
        copy = tmp_path / run.name
        copy.mkdir()
        for name in ("config.yaml", "summary.json", "best.pt", "metrics.jsonl"):
            (copy / name).write_bytes((run / name).read_bytes())
    first, second, *_ = sorted(tmp_path.iterdir())
    (first / "summary.json").write_text(json.dumps({"status": "interrupted"}))
    (second / "summary.json").write_text("{")
    assert vae("compare", str(tmp_path), "--jobs", "1") == 0
    out = capsys.readouterr().out
    assert f"Left out: {first} is interrupted, after 3 epochs" in out
    assert "damaged" in out
    assert len(assessed) == 4


def test_an_evaluation_that_fails_names_its_run(
    vae: Vae, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def evaluate_run(folder: RunDir, **_: object) -> dict[str, Any]:
        raise UserError("no images")

    stand_in(monkeypatch, evaluate_run)
    assert vae("compare", "--jobs", "1", "--profile", "full") == 1
    error = capsys.readouterr().err
    assert "6 of 6 runs could not be evaluated" in error
    assert "no images" in error


def test_axes_leave_out_what_would_hide_the_rest() -> None:
    from vae_cli.comparison.plots import _limits

    near = [(30.0, 0.1), (30.5, 0.2), (27.0, 0.3), (13.0, 1.0)] * 3
    limits = _limits([*near, (-400.0, 1.0), (-399.0, 1.0)])
    assert limits is not None
    assert -400 < limits[0] < 12
    assert limits[1] > 30.7
    wide = _limits([(0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (5.0, 0.0)])
    assert wide is not None
    assert wide[0] < 0
    assert wide[1] > 5
    apart = _limits([*near, (-500.0, 1.0), (-280.0, 1.0)])  # the widest gap is between the two that are far off
    assert apart is not None
    assert apart[0] > -280
    assert _limits([]) is None
    assert _limits([(1.0, 0.0)]) is not None
