"""Second stages in comparisons: noise families, best levels, equal rate, the predictor, the section and its plots."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from vae_cli.comparison.arms import Comparison
from vae_cli.comparison.export import as_plain, as_rows
from vae_cli.comparison.members import Member
from vae_cli.comparison.missing import metrics_named, metrics_of_study, not_measured
from vae_cli.comparison.noise_families import NoiseFamily, noise_families
from vae_cli.comparison.plots import draw_all
from vae_cli.comparison.report import Pictures, render
from vae_cli.comparison.second_stage import SecondStages, second_stages, tuned
from vae_cli.comparison.second_stage_plots import noise_level, predictor
from vae_cli.comparison.second_stage_text import in_plain_english, verdict_in_short
from vae_cli.comparison.statistics import along, correlation, could_be_lowest
from vae_cli.core.errors import UserError
from vae_cli.metrics.record import FORMAT, metric_words, usual_metrics
from vae_cli.runs.folder import RunDir

LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8)
BETAS = (0.25, 0.5, 1.0, 2.0)
SHARED = {"dataset": "digits", "prior": "standard_normal", "regularizer": "kl", "latent": 16, "regularizer.beta": 1.0}
Figures = Callable[[float, int], Mapping[str, float]]


def member(seed: int, settings: Mapping[str, Any], figures: Mapping[str, float]) -> Member:
    """Return a run with these figures; one without noise has no rate."""
    noise = ["dimensions", "noise", "smooth"] if "rate" in figures else []
    whole = {**SHARED, "sigma": "learned", **settings}
    left_out = {} if "rate" in figures else {"rate": {"reason": "there is no noise"}}
    values = {name: {"value": value} for name, value in figures.items()}
    evaluation = {"noise": noise, "figures": values, "left_out": left_out}
    name = "_".join(map(str, settings.values())) or "default"
    return Member(RunDir(Path(f"runs/{name}_{seed}")), whole, seed, {}, evaluation)


def family(sigma: str, figures: Figures, levels: Sequence[float] = LEVELS, seeds: int = 5) -> list[Member]:
    """Return runs of a noise at several levels: values of beta if sigma is learned, otherwise of sigma.value."""
    key = "regularizer.beta" if sigma == "learned" else "sigma.value"
    return [
        member(seed, {"sigma": sigma, key: level}, figures(level, seed)) for level in levels for seed in range(seeds)
    ]


def figures(best: float | None, spread: float = 0.1, low: float = 10.0, draw: int = 0) -> Figures:
    """Return figures whose generation is best at one level, if there is one, and varies between seeds."""
    random = np.random.default_rng(draw)

    def at(level: float, seed: int) -> dict[str, float]:
        curve = 0.0 if best is None else 5 * math.log(level / best) ** 2
        value = low + curve + spread * float(random.normal())
        return {
            "rate": -16 * math.log(level / 4),
            "frechet_reconstructions": 4 + 10 * level + 0.01 * seed * level,
            "frechet_flow": value,
            "frechet_mixture": 2 * value,
            "viv": value**0.5,
        }

    return at


def silent(value: float, seeds: int = 5) -> list[Member]:
    """Return runs without noise."""
    return [
        member(
            seed,
            {"sigma": "deterministic"},
            {
                "frechet_reconstructions": 3.0 + 0.01 * seed,
                "frechet_flow": value + 0.05 * seed,
                "frechet_mixture": 90.0,
            },
        )
        for seed in range(seeds)
    ]


def analyzed(members: Sequence[Member]) -> SecondStages:
    found = second_stages(Comparison(members))
    assert found is not None
    return found


def named(found: SecondStages, label: str) -> NoiseFamily:
    return next(family for family in found.families if family.label == label)


# Statistics.


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_best_arm_is_among_those_that_could_be_in_95_percent_of_samples(seeds: int) -> None:
    random, count, kept = np.random.default_rng(seeds), 2000, 0
    for _ in range(count):
        common = random.normal(size=seeds)  # seeds are paired
        arms = [dict(enumerate((common + random.normal(size=seeds)).tolist())) for _ in range(5)]
        kept += could_be_lowest(arms)[0]  # all arms have the same mean, so that each is the best
    assert kept / count >= 0.95 - 2 * math.sqrt(0.05 * 0.95 / count)


def test_an_arm_is_ruled_out_only_by_a_test() -> None:
    low, high = {0: 1.0, 1: 1.1, 2: 0.9, 3: 1.0}, {0: 3.0, 1: 3.2, 2: 2.9, 3: 3.1}
    assert could_be_lowest([low, high]) == [True, False]
    assert could_be_lowest([low, {0: 9.0}]) == [True, True]  # one seed has no interval
    assert could_be_lowest([{0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.0}]) == [True, True]  # nor have equal differences
    assert could_be_lowest([low, {}]) == [True, True]
    assert could_be_lowest([]) == []
    # With two arms, it is a one-sided test at 5 %.
    for shift in (0.1, 0.25, 0.4):
        other = {seed: value + shift * (1 + 0.8 * (-1) ** seed) for seed, value in low.items()}
        p = stats.ttest_rel(list(other.values()), list(low.values()), alternative="greater").pvalue
        assert could_be_lowest([low, other])[1] == (p > 0.05)


def test_a_path_is_interpolated_where_it_has_one_value() -> None:
    rising = [(1.0, 5.0), (2.0, 2.0), (4.0, 4.0)]
    assert along(rising, 3.0) == pytest.approx(3.0)
    assert along(rising[::-1], 3.0) == pytest.approx(3.0)
    assert along(rising, 0.9) is along(rising, 4.1) is None
    assert along([*rising, (2.5, 9.0)], 3.0) is None  # it comes back with another value
    assert along([(1.0, 1.0), (3.0, 3.0), (2.0, 2.0)], 2.5) == pytest.approx(2.5)  # it comes back with the same


def test_the_correlation_is_spearmans() -> None:
    random = np.random.default_rng(0)
    points = [(x, x + float(random.normal()) * 2) for x in [1.0, 2.0, 2.0, 3.0, 5.0, 7.0, 7.0, 9.0, 12.0, 13.0]]
    found = correlation(points)
    assert found is not None
    assert found.value == pytest.approx(stats.spearmanr(*zip(*points, strict=True)).statistic)
    assert found.interval is not None
    assert found.interval[0] < found.value < found.interval[1]
    assert found == correlation(points)
    assert correlation([(1.0, 2.0)]) is correlation([(1.0, 2.0), (1.0, 3.0)]) is None
    few = correlation([(1.0, 2.0), (2.0, 3.0)])
    assert few == (1.0, None, 2)


def test_the_interval_of_a_correlation_contains_the_true_one() -> None:
    random, rho, hits = np.random.default_rng(1), 0.6, 0
    true = 6 / math.pi * math.asin(rho / 2)  # Spearman's for a normal distribution
    for _ in range(200):
        x = random.normal(size=30)
        y = rho * x + math.sqrt(1 - rho**2) * random.normal(size=30)
        found = correlation(list(zip(x.tolist(), y.tolist(), strict=True)), resamples=400)
        assert found is not None
        assert found.interval is not None
        hits += found.interval[0] <= true <= found.interval[1]
    assert hits / 200 >= 0.88  # a percentile interval of 30 points is a little too narrow


# Families.


def test_families_are_arms_that_differ_only_in_the_level() -> None:
    members = [*family("fixed", figures(0.2)), *family("learned", figures(1.0), BETAS), *silent(30.0)]
    members += family("random", figures(0.5), [0.5])
    members += [
        member(seed, {"sigma": "fixed", "sigma.value": 0.2, "prior": "vamp"}, figures(0.2)(0.2, seed))
        for seed in (0, 1)
    ]
    found = {family.label: family for family in noise_families(Comparison(members))}
    assert {label: len(family.arms) for label, family in found.items()} == {
        "learned": 4,
        "fixed": 5,
        "fixed, vamp": 1,
        "random": 1,
    }
    assert [found["fixed"].level(arm) for arm in found["fixed"].arms] == list(LEVELS)
    assert [found["learned"].level(arm) for arm in found["learned"].arms] == list(BETAS)
    assert found["learned"].key == "regularizer.beta"


def test_an_arm_with_values_of_sigma_and_beta_is_in_the_longer_family() -> None:
    def run(level: float, beta: float) -> list[Member]:
        settings = {"sigma": "fixed", "sigma.value": level, "regularizer.beta": beta}
        return [member(seed, settings, figures(None)(level, seed)) for seed in (0, 1)]

    members = [one for level in LEVELS for one in run(level, 1.0)] + [
        one for beta in (0.5, 2.0) for one in run(0.8, beta)
    ]
    found = noise_families(Comparison(members))
    assert sorted((family.key, len(family.arms)) for family in found) == [("regularizer.beta", 3), ("sigma.value", 5)]


def test_without_three_levels_or_figures_the_report_is_as_before() -> None:
    few = Comparison([*family("fixed", figures(0.2), LEVELS[:2]), *silent(30.0)])
    bare = Comparison(family("fixed", lambda level, seed: {"rate": level, "distortion": 1.0 + seed}))
    for comparison in (few, bare):
        assert second_stages(comparison) is None
        assert not {"noise_level", "predictor"} & draw_all(comparison).keys()
        assert as_plain(comparison)["second_stage"] is None
        page = page_of(comparison)
        assert "second stage" not in page.lower()
        assert 'id="second_stage"' not in page


# Best levels and the ranking.


def test_a_known_best_level_is_found() -> None:
    best = analyzed(family("fixed", figures(0.2))).best
    found = best(named(analyzed(family("fixed", figures(0.2))), "fixed"), "flow")
    assert found is not None
    assert found.is_decided
    assert found.arm.label == "fixed 0.2"
    assert not found.edge
    text = " ".join(in_plain_english(analyzed([*family("fixed", figures(0.2)), *silent(30.0)])))
    assert "which are 0.05, 0.1, 0.2, 0.4 and 0.8, 0.2 is the best." in text
    assert "This costs reconstruction: with 'fixed 0.2'" in text
    assert "tried" not in text


def test_a_best_level_at_the_end_of_those_tried_is_said_to_be_there() -> None:
    found = analyzed(family("fixed", figures(0.8)))
    best = found.best(named(found, "fixed"), "flow")
    assert best is not None
    assert best.edge == "highest"
    assert "0.8 is the highest that was tried, so a higher one may be better" in " ".join(in_plain_english(found))


def test_a_flat_family_is_undecided() -> None:
    found = analyzed([*family("fixed", figures(None, 2.0, draw=1)), *family("uniform", figures(None, 2.0, draw=2))])
    best = found.best(named(found, "fixed"), "flow")
    assert best is not None
    assert best.is_judged
    assert best.is_flat
    assert verdict_in_short(found) == "Undecided: no noise can be ruled out"
    text = " ".join(in_plain_english(found))
    assert "is the best is undecided" in text
    assert "these runs can rule out no other noise" in text


def test_one_seed_decides_nothing() -> None:
    found = analyzed([*family("fixed", figures(0.2), seeds=1), *silent(30.0, 1)])
    assert verdict_in_short(found) == "Not judged"
    assert "train more seeds" in in_plain_english(found)[0]
    best = found.best(named(found, "fixed"), "flow")
    assert best is not None
    assert not best.is_judged
    page_of(found.comparison)


def test_a_single_noise_cannot_be_compared_but_its_levels_can() -> None:
    found = analyzed(family("fixed", figures(0.2)))
    assert verdict_in_short(found) == "Not judged"
    first, second = in_plain_english(found)
    assert first.startswith("These runs have a single noise, 'fixed'")
    assert "0.2 is the best" in second


def test_the_better_noise_is_found_and_the_gain_over_no_noise() -> None:
    members = [*family("fixed", figures(0.2, low=20.0)), *family("uniform", figures(0.2)), *silent(30.0)]
    found = analyzed(members)
    assert [rank.label for rank in found.ranking("flow")] == ["uniform", "fixed", "deterministic"]
    assert verdict_in_short(found) == "'uniform', with flow matching as the second stage"
    text = in_plain_english(found)[0]
    assert text.startswith(
        "With flow matching as the second stage, the Fréchet distance of images is lowest for codes of"
    )
    assert "Without noise, the distance is 20." in text
    assert text.endswith("higher.")


def test_a_difference_that_has_no_interval_is_not_called_one() -> None:
    """All seeds have the same figures, so nothing is known about others."""
    members = family(
        "fixed", lambda level, seed: {"frechet_flow": 1 + level, "frechet_reconstructions": 2.0, "rate": level}
    )
    for seed in range(5):
        members.append(member(seed, {"sigma": "deterministic"}, {"frechet_flow": 9.0, "frechet_reconstructions": 1.0}))
    text = " ".join(in_plain_english(analyzed(members)))
    assert "the difference is not judged" in text
    assert "The cost is not judged" in text
    assert "these runs can rule out no other noise" in text
    assert "higher." not in text


def test_images_that_resemble_training_images_are_reported() -> None:
    for novelty, is_said in ((0.2, True), (0.9, False)):
        at = figures(0.2)
        members = family("fixed", lambda level, seed, at=at, n=novelty: {**at(level, seed), "novelty_flow": n})
        text = " ".join(in_plain_english(analyzed(members)))
        assert ("their novelty is 0.200" in text) == is_said


def test_the_answer_counts_differences_at_equal_rate() -> None:
    members = [*family("learned", log_linear(5.0, 20.0), BETAS), *family("fixed", log_linear(5.0, 10.0), BETAS)]
    for number, one in enumerate(members):
        one.figures["frechet_flow"]["value"] += 0.01 * math.sin(number)
    text = " ".join(in_plain_english(analyzed(members)))
    for word in ("rate", "reconstruction"):
        assert (
            f"At equal {word}, the distance of 'fixed' is lower than that of 'learned' at 4 of 4 {word}s, higher at 0, "
            "and undecided at 0." in text
        )


def test_codes_without_noise_can_be_the_best() -> None:
    found = analyzed([*family("fixed", figures(0.2)), *silent(5.0)])
    assert verdict_in_short(found) == "'deterministic', with flow matching as the second stage"
    assert "Of the noises, 'fixed' (" in in_plain_english(found)[1]


def test_a_level_chosen_on_other_seeds_has_no_advantage_from_being_chosen() -> None:
    """Of a flat family, the lowest mean is too low by its own noise; the tuned one is not."""
    random, chosen, lowest = np.random.default_rng(0), [], []
    for _ in range(200):
        values = random.normal(size=(5, 4))
        members = [
            member(
                seed, {"sigma": "fixed", "sigma.value": level}, {"rate": 1.0, "frechet_flow": 9 + values[place, seed]}
            )
            for place, level in enumerate(LEVELS)
            for seed in range(4)
        ]
        (one,) = noise_families(Comparison(members))
        chosen.append(float(np.mean(list(tuned(one, "frechet_flow").values()))) - 9)
        lowest.append(float(values.mean(1).min()))
    assert abs(np.mean(chosen)) < 3 * np.std(chosen) / math.sqrt(200)
    assert np.mean(lowest) < -0.3


# At equal rate and at equal reconstruction.


def log_linear(slope: float, above: float) -> Figures:
    """Return figures that are linear in the logarithms of the rate, and of the distance of reconstructions."""

    def at(level: float, seed: int) -> dict[str, float]:
        rate = 20 / level**0.5 * (1 + 0.01 * seed)
        return {
            "rate": rate,
            "frechet_reconstructions": 300 / rate,
            "frechet_flow": slope * math.log(rate) + above + seed,
        }

    return at


def test_interpolation_at_equal_rate_is_exact_for_log_linear_curves() -> None:
    members = [
        *family("learned", log_linear(5.0, 10.0), BETAS),
        *family("fixed", log_linear(5.0, 13.0), (0.3, 0.9, 2.5)),
    ]
    members += family("uniform", log_linear(5.0, 10.0), (0.3, 0.9, 2.5))
    members += family("random", log_linear(5.0, 8.5), [1.0])
    found = analyzed(members)
    assert found.reference is not None
    assert found.reference.label == "learned"
    for rows in (found.at_equal_rate, found.at_equal_reconstruction):
        for label, above in (("fixed", 3.0), ("uniform", 0.0), ("random", -1.5)):
            own = [row.difference for row in rows if row.family == label and row.difference is not None]
            assert len(own) >= (1 if label == "random" else 3)
            assert [one.value for one in own] == pytest.approx([above] * len(own), abs=1e-9)
    places = {row.at for row in found.at_equal_rate if row.family == "fixed"}
    assert len(places) == 4
    reference = [row for row in found.at_equal_rate if row.family == "learned"]
    assert all(row.difference is None and row.stat is not None for row in reference)
    (own,) = (row for row in found.at_equal_rate if row.family == "random")
    assert own.at is None
    assert own.own == pytest.approx(20.4)


def test_there_is_no_number_outside_the_range_of_a_family() -> None:
    members = [
        *family("learned", log_linear(5.0, 10.0), BETAS),
        *family("fixed", log_linear(5.0, 13.0), (90.0, 200.0, 400.0)),
    ]
    members += silent(30.0)
    found = analyzed(members)
    assert all(row.difference is None for row in found.at_equal_rate)
    assert not any(row.family == "deterministic" for row in found.at_equal_rate)  # it has no rate
    assert any(row.family == "deterministic" for row in found.at_equal_reconstruction)
    assert "no number: in some seed" in page_of(found.comparison)


def test_a_difference_at_equal_rate_is_real_only_if_its_interval_says_so() -> None:
    noisy = figures(None, 3.0)
    found = analyzed([*family("learned", noisy, BETAS), *family("fixed", noisy, BETAS)])
    for row in found.at_equal_rate:
        if row.difference is not None and row.difference.interval is not None:
            low, high = row.difference.interval
            assert row.difference.is_real == (low > 0 or high < 0)


# The predictor.


def test_a_monotone_predictor_has_correlation_one() -> None:
    found = analyzed([*family("fixed", figures(0.2)), *family("learned", figures(1.0), BETAS)])
    assert found.prediction is not None
    assert found.prediction.value == 1
    assert found.prediction.interval == (1.0, 1.0)
    assert found.prediction.n == len(LEVELS) + len(BETAS)
    figure = predictor(found.comparison)
    assert figure is not None
    assert "rank correlation 1.00" in figure.axes[0].get_title(loc="left")
    for one in found.comparison.members:
        one.figures["viv"]["value"] *= -1
    turned = analyzed(found.comparison.members).prediction
    assert turned is not None
    assert turned.value == -1


def test_without_the_predictor_there_is_no_plot_of_it() -> None:
    comparison = Comparison(family("fixed", lambda level, seed: {"rate": level, "frechet_mixture": 9.0 + seed}))
    assert second_stages(comparison) is not None
    assert predictor(comparison) is None
    assert "irreducible variance" not in page_of(comparison)


# The section, its plot and its exports.


def page_of(comparison: Comparison) -> str:
    return render(comparison, draw_all(comparison), Pictures(), "title")


def test_the_plot_has_a_column_for_each_second_stage_and_a_row_for_each_kind_of_level() -> None:
    members = [*family("fixed", figures(0.2)), *family("learned", figures(1.0), BETAS), *silent(500.0)]
    figure = noise_level(Comparison(members))
    assert figure is not None
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:3] == ["Reconstruction", "10 Gaussians", "Flow matching"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["noise level"] * 3 + ["beta"] * 3
    flow = figure.axes[2]
    marks = [line for line in flow.lines if line.get_marker() == "s" and len(line.get_xdata()) > 0]  # type: ignore[arg-type]
    filled = [len(line.get_xdata()) for line in marks if line.get_markerfacecolor() != "white"]  # type: ignore[arg-type]
    hollow = [len(line.get_xdata()) for line in marks if line.get_markerfacecolor() == "white"]  # type: ignore[arg-type]
    assert (filled, hollow) == ([1], [4])
    assert any("deterministic 500" in text.get_text() for text in flow.texts)  # it would flatten the curve
    assert flow.get_ylim()[1] < 100


def test_the_section_is_first_if_no_claim_was_judged() -> None:
    page = page_of(Comparison([*family("fixed", figures(0.2)), *silent(30.0)]))
    assert page.index('id="second_stage"') < page.index('id="bits"')
    answer = page[page.index('class="answer"') : page.index("</div>")]
    assert "With flow matching as the second stage" in answer
    for name in ("frechet_flow", "sigma.value"):
        assert name not in page[page.index('id="second_stage"') : page.index('id="bits"')]


def test_the_exports_contain_the_tables() -> None:
    members = [*family("fixed", figures(0.2)), *family("learned", figures(1.0), BETAS), *silent(30.0)]
    comparison = Comparison(members)
    plain = json.loads(json.dumps(as_plain(comparison), allow_nan=False))["second_stage"]
    best = next(one for one in plain["best_levels"] if (one["stage"], one["family"]) == ("flow", "fixed"))
    assert (best["level"], best["could_be_best"]) == (0.2, [0.2])
    assert {one["stage"] for one in plain["at_equal_rate"]} == {"flow", "mixture"}
    assert plain["prediction"]["rank_correlation"] == 1
    assert plain["ranking"][0]["could_be_best"]
    assert all(row["frechet_flow"] for row in as_rows(comparison))


# The metrics that a study names.


def studied(metrics: list[str] | None, *measured: str) -> Member:
    figures = {name.lower(): {"value": 1.0, "metric": name} for name in measured}
    evaluation = {"format": FORMAT, "figures": figures, "left_out": {}}
    return Member(RunDir(Path("runs/a")), {}, 0, {}, evaluation, metrics)


def test_only_the_metrics_that_the_runs_name_are_measured() -> None:
    assert metrics_of_study([studied(["rate"]), studied(["rate", "quality"])]) == ({"Rate", "Quality"}, [])
    assert metrics_of_study([studied(["rate"]), studied(None)]) == (None, [])  # other runs need all metrics
    wanted, notes = metrics_of_study([studied(["rate", "qualty"])])
    assert wanted == {"Rate"}
    assert len(notes) == 1
    assert "Did you mean 'quality'?" in notes[0]


def test_metrics_are_named_as_on_the_command_line() -> None:
    assert metrics_named(["noise_probe", "rate"]) == {"NoiseProbe", "Rate"}
    assert metrics_named(["all"]) == set(metric_words().values())
    with pytest.raises(UserError, match=r"--metrics rat: there is no metric .* Did you mean 'rate'\?"):
        metrics_named(["rat"])


def test_a_note_names_the_metrics_that_were_measured() -> None:
    note = not_measured([studied(None, "Rate"), studied(None, "Rate", "Quality")])
    assert note == "Measured: only rate, quality. To measure the other metrics, too, add --metrics all."
    assert not_measured([studied(None, *usual_metrics())]) is None
