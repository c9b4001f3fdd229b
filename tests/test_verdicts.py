"""Verdicts: false and true positives of whole reports by simulation, the arms that are compared, and the words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_cli.comparison.arms import Comparison
from vae_cli.comparison.members import Member
from vae_cli.comparison.plain import BITS, NEIGHBOURS, PRICE, SCALE, SHORTCUTS, in_plain_english
from vae_cli.comparison.price_plot import price_by_latent
from vae_cli.comparison.statistics import Sample, contrast, holm
from vae_cli.comparison.verdicts import WORDS, Verdict, compared, verdicts
from vae_cli.config.claims import CLAIMS, ClaimName
from vae_cli.runs.folder import RunDir

SHARED = {"dataset": "digits", "prior": "standard_normal", "regularizer": "kl", "latent": "16", "sigma": "learned"}
PRIMARY = {claim: found.primary.replace("{k}", "5000") for claim, found in CLAIMS.items()}
ARMS: list[dict[str, Any]] = [
    {},
    {"sigma": "deterministic"},
    {"sigma": "fixed", "sigma.value": 1.0},
    {"regularizer.beta": 0.25},
    {"regularizer.beta": 4.0},
]
USUAL = dict(zip(PRIMARY.values(), (30.0, 1.1, 2.0, 0.5, -90.0), strict=True))


def member(
    seed: int, settings: Mapping[str, Any], values: Mapping[str, float], deviations: Sequence[float] = (0.001,) * 100
) -> Member:
    """Return a run with these values of the figures that decide."""
    whole = {**SHARED, "regularizer.beta": 1.0, **settings}
    is_point, is_fixed = whole["sigma"] == "deterministic", whole["sigma"] == "fixed"
    value = whole.get("sigma.value", 1.0)
    scales = {"scale_mean": value if is_fixed else 0.4, "scale_min": value if is_fixed else 0.1, "scale_max": value}
    gone = {*scales, "rate", PRIMARY["price"], PRIMARY["scale"]} if is_point else set[str]()
    numbers = {**values, **scales, "rate": 20.0}
    figures = {
        name: {"value": value, "resampled": list(deviations)} for name, value in numbers.items() if name not in gone
    }
    noise = [] if is_point else ["dimensions", "noise", "smooth"]
    evaluation = {
        "noise": noise,
        "figures": figures,
        "left_out": {name: {"reason": "there is no noise"} for name in gone},
    }
    name = "_".join(map(str, settings.values())) or "default"
    return Member(RunDir(Path(f"runs/{name}_{seed}")), whole, seed, {}, evaluation)


def simulated(
    random: np.random.Generator, seeds: int, effects: Mapping[ClaimName, float] | None = None
) -> dict[ClaimName, Verdict]:
    """Return the verdicts on simulated runs. All arms have the same distribution, except for the `effects`: how much
    the figure of a claim differs as predicted, in standard deviations of the differences between runs with the same
    seed. Half of the variance over seeds is common to all arms; the images vary, too."""
    effects = effects or {}
    common = {name: random.normal(size=seeds) for name in USUAL}
    shared_images = random.normal(size=100) * 0.3
    members = []
    for settings in ARMS:
        changed = {
            "bits": settings.get("sigma") == "deterministic",
            "neighbours": settings.get("sigma") == "deterministic",
            "shortcuts": settings.get("sigma") == "deterministic",
            "scale": settings.get("regularizer.beta") == 4.0,
            "price": settings.get("sigma") == "fixed",
        }
        own_images = random.normal(size=100) * 0.1
        for seed in range(seeds):
            values = {}
            for claim, name in PRIMARY.items():
                values[name] = USUAL[name] + common[name][seed] + random.normal() + own_images[0]
                if changed[claim]:
                    values[name] += CLAIMS[claim].sign * effects.get(claim, 0.0) * math.sqrt(2)
            members.append(member(seed, settings, values, shared_images + own_images))
    return verdicts(Comparison(members))


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_at_most_5_percent_of_reports_find_a_difference_where_there_is_none(seeds: int, is_long: bool) -> None:
    random, count = np.random.default_rng(seeds), 2000 if is_long else 300
    wrong = sum(any(verdict.is_difference for verdict in simulated(random, seeds).values()) for _ in range(count))
    assert wrong / count <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / count)


@pytest.mark.parametrize(("seeds", "least"), [(5, 0.4), (10, 0.95)])
def test_an_effect_of_two_standard_deviations_is_found(seeds: int, least: float, is_long: bool) -> None:
    random, count = np.random.default_rng(seeds), 1000 if is_long else 200
    for claim in CLAIMS:
        found = sum(simulated(random, seeds, {claim: 2.0})[claim].word == "yes" for _ in range(count // 5))
        assert found / (count // 5) >= least - (0 if seeds == 10 else 0.1), claim
    everywhere = [simulated(random, seeds, dict.fromkeys(CLAIMS, 2.0)) for _ in range(count // 5)]
    found = sum(verdict.word == "yes" for one in everywhere for verdict in one.values())
    assert found / len(everywhere) / len(CLAIMS) >= least


def test_the_error_has_a_part_from_seeds_and_a_part_from_images() -> None:
    random = np.random.default_rng(0)
    images = {seed: (0.3 * random.normal(size=100)).tolist() for seed in range(4)}
    same = Sample({seed: float(seed) for seed in range(4)}, images)
    moved = Sample({seed: 2.0 + seed + 0.1 * (-1) ** seed for seed in range(4)}, images)
    found = contrast("rate", "a", moved, "b", same)
    assert found is not None
    assert found.value == pytest.approx(2.0)
    assert found.error == pytest.approx(0.1 / math.sqrt(3), rel=1e-6)  # the images are the same, and cancel
    assert found.degrees == pytest.approx(3)
    other = Sample(moved.values, {seed: [2 * value for value in images[seed]] for seed in images})
    found = contrast("rate", "a", other, "b", same)
    assert found is not None
    mean = np.mean(list(images.values()), axis=0)
    assert found.error == pytest.approx(math.hypot(0.1 / math.sqrt(3), math.sqrt((mean**2).mean())), rel=1e-6)
    assert found.degrees == 3
    unpaired = contrast(
        "rate", "a", Sample({8: 1.0, 9: 1.5}, {8: [0.0], 9: [0.0]}), "b", Sample({0: 0.0, 1: 0.1}, {0: [0.0], 1: [0.0]})
    )
    assert unpaired is not None
    assert unpaired.error == pytest.approx(math.sqrt(0.25 / 4 + 0.01 / 4))
    for lacking in (
        Sample(moved.values, {}),
        Sample({0: 1.0}, images),
        Sample({seed: 2.0 + seed for seed in range(4)}, images),
    ):
        unknown = contrast("rate", "a", lacking, "b", same)
        assert unknown is not None
        assert unknown.error is unknown.p is unknown.interval() is None
        assert unknown.why_unknown


def test_holm_rejects_what_it_should() -> None:
    assert holm([]) == []
    assert holm([0.04]) == [0.95]
    levels = holm([0.01, 0.02, 0.03, 0.04])  # 0.05 / 4 is reached, 0.05 / 3 is not
    assert levels == pytest.approx([1 - 0.05 / 4, *[1 - 0.05 / 3] * 3])
    assert holm([0.001, 0.002, 0.003]) == pytest.approx([1 - 0.05 / 3, 1 - 0.05 / 2, 1 - 0.05])


def runs(*arms: Mapping[str, Any], seeds: int = 5, **values: float) -> list[Member]:
    """Return runs of these arms, whose figures differ a little between seeds."""
    jitter = [0.001, -0.002, 0.003, -0.001, 0.002, 0.0]
    return [
        member(
            seed, settings, {name: value + jitter[(seed + place) % 6] for name, value in {**USUAL, **values}.items()}
        )
        for place, settings in enumerate(arms)
        for seed in range(seeds)
    ]


def test_the_arms_that_decide_are_the_closest_to_the_reference() -> None:
    fixed = {"sigma": "fixed", "sigma.value": 1.0}
    members = runs(
        {}, {"sigma": "deterministic", "latent": "2"}, {"sigma": "deterministic"}, {"regularizer.beta": 0.0},
        {**fixed, "prior": "scaled_normal"}, fixed, {"sigma": "fixed", "sigma.value": 0.5}, {"latent": "2"},
        *({"regularizer.beta": beta} for beta in (0.25, 4.0)),
        *({"regularizer.beta": beta, "prior": "scaled_normal"} for beta in (0.1, 8.0)),
    )  # fmt: skip
    found = verdicts(Comparison(members, "learned"))
    pairs = {claim: (one.contrast.arm, one.contrast.reference) for claim, one in found.items() if one.contrast}
    assert pairs == {
        "bits": ("deterministic", "learned"),
        "neighbours": ("deterministic", "learned"),
        "shortcuts": ("deterministic", "learned"),
        "scale": ("learned, beta 4.0", "learned, beta 0.25"),  # not beta 0, and only under N(0, I)
        "price": ("fixed 1.0", "learned"),
    }


def test_without_a_point_mass_an_arm_without_penalty_takes_its_place() -> None:
    found = verdicts(Comparison(runs({}, {"regularizer.beta": 0.0}), "beta 1.0"))
    assert found["bits"].contrast is not None
    assert found["bits"].contrast.arm == "beta 0.0"
    assert found["neighbours"].word == found["scale"].word == found["price"].word == "not tested"
    assert found["neighbours"].why == "no arm was trained without noise"


def test_a_reference_without_noise_or_penalty_is_no_reference() -> None:
    found = verdicts(Comparison(runs({}, {"sigma": "deterministic"}), "deterministic"))
    assert found["bits"].word == "not tested"
    assert "choose another arm with --reference ARM" in found["bits"].why


def test_few_draws_and_few_seeds() -> None:
    few = [
        Member(m.folder, m.settings, m.seed, {}, {**m.evaluation, "figures": {
            name.replace("5000", "64"): figure for name, figure in m.evaluation["figures"].items()}})
        for m in runs({}, {"sigma": "fixed", "sigma.value": 1.0})
    ]  # fmt: skip
    found = verdicts(Comparison(few))["price"]
    assert found.word == "not judged"
    assert "64 draws are too few" in found.why
    for seeds, text in ((5, "No difference"), (3, "Tentatively: no difference"), (1, "Not judged")):
        assert verdicts(Comparison(runs({}, {"sigma": "deterministic"}, seeds=seeds)))["neighbours"].text == text


def test_a_relative_margin_is_a_share_of_the_reference() -> None:
    found = verdicts(Comparison(runs({}, {"sigma": "deterministic"})))
    assert found["bits"].margin == pytest.approx(0.05 * 30, rel=1e-2)
    assert found["shortcuts"].margin == 0.5


def told(members: Sequence[Member]) -> str:
    comparison = Comparison(members)
    return " ".join(in_plain_english(comparison, verdicts(comparison)))


def effect(*arms: Mapping[str, Any], seeds: int = 5, **moved: float) -> list[Member]:
    """Return runs in which the figures of the arms without noise, or with a constant sigma, are moved."""
    members = runs(*arms, seeds=seeds)
    for one in members:
        for name, size in moved.items():
            is_moved = one.settings["sigma"] in ("deterministic", "fixed") and name in one.figures
            if is_moved and one.settings["prior"] == "standard_normal":
                one.figures[name]["value"] += size
    return members


def test_the_answer_is_told_in_plain_english() -> None:
    fixed = {"sigma": "fixed", "sigma.value": 1.0}
    arms = ({}, {"sigma": "deterministic"}, fixed, {**fixed, "prior": "scaled_normal"})
    bits, price = PRIMARY["bits"], PRIMARY["price"]
    text = told(effect(*arms, **{bits: 20.0, price: -7.3}))
    assert text.startswith(
        "The noise limits how much a code says about its image (a code trained without noise needs 20.0 bits"
    )
    assert "it does not change how similar the images of neighboring codes are." in text
    assert "Without it, the network does not memorize its training images more than with it." in text
    assert (
        "to 1 costs 7.3 nats (10.5 bits) per image (with 16 latent dimensions): if the width of the prior is learned, "
        "too, no cost is left that these runs could show" in text
    )
    partly = effect(*arms, **{price: -7.3})
    for one in partly:
        if one.settings["prior"] == "scaled_normal":
            one.figures[price]["value"] -= 3.0
    assert "also learning the width of the prior recovers 59 % of it" in told(partly)
    assert "tentative" not in text
    assert told(effect(*arms, seeds=3, **{bits: 20.0})).endswith("All of this is tentative: there are only 3 seeds.")
    assert told(runs({}, {"sigma": "deterministic"}, seeds=1)) == ""
    for name in (*USUAL, "latent=", "_"):
        assert name not in text


def test_every_verdict_has_words() -> None:
    judged = WORDS.keys() - {"not judged", "not tested"}
    assert all(words.keys() == judged for words in (BITS, NEIGHBOURS, SHORTCUTS, SCALE, PRICE))


def test_the_price_is_drawn_by_latent_size() -> None:
    fixed = {"sigma": "fixed", "sigma.value": 1.0}
    arms = [
        {**arm, "latent": latent}
        for latent in ("2", "16", "64")
        for arm in ({}, fixed, {**fixed, "prior": "scaled_normal"})
    ]
    # Other weights have other prices, which the plot leaves out.
    weights = [{"latent": "16", "regularizer.beta": 4}, {**fixed, "latent": "16", "regularizer.beta": 4}]
    priced = effect(*arms, **{PRIMARY["price"]: -5.0}) + effect(*weights, **{PRIMARY["price"]: -9.0})
    figure = price_by_latent(Comparison(priced))
    assert figure is not None
    (axes,) = figure.axes
    curves = {container.get_label(): container[0].get_data() for container in axes.containers}
    assert set(curves) == {"fixed 1.0 under N(0, I)", "fixed 1.0, prior scaled_normal"}
    sizes, prices = curves["fixed 1.0 under N(0, I)"]
    assert list(sizes) == [2, 16, 64]
    assert prices == pytest.approx([5.0] * 3, abs=0.01)
    assert price_by_latent(Comparison(runs({}, fixed))) is None


def test_the_price_of_codes_with_positions_is_drawn_by_the_number_of_dimensions() -> None:
    fixed = {"sigma": "fixed", "sigma.value": 1.0}
    sizes = ("32", "64", "2x4x4", "4x4x4", "8x1x1")
    arms = [{**arm, "latent": latent} for latent in sizes for arm in ({}, fixed)]
    comparison = Comparison(effect(*arms, **{PRIMARY["price"]: -5.0}))
    dimensions = {(arm.settings["latent"], arm.latent, arm.positions) for arm in comparison.arms}
    assert dimensions == {
        ("32", 32, ""), ("64", 64, ""), ("2x4x4", 32, "4x4"), ("4x4x4", 64, "4x4"), ("8x1x1", 8, "")
    }  # fmt: skip
    figure = price_by_latent(comparison)
    assert figure is not None
    (axes,) = figure.axes
    curves = {container.get_label(): list(container[0].get_xdata()) for container in axes.containers}
    assert curves == {"fixed 1.0 under N(0, I)": [8, 32, 64], "fixed 1.0 under N(0, I), 4x4 positions": [32, 64]}


def test_the_overview_shows_the_reference_and_the_arms_of_the_verdicts() -> None:
    many = [{"sigma": "fixed", "sigma.value": value} for value in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 1.0)]
    shown = compared(Comparison(runs({}, *many, {"sigma": "deterministic"})), most=4)
    assert [arm.label for arm in shown] == ["learned", "fixed 0.4", "fixed 1.0", "deterministic"]
