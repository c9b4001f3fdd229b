"""Statistics over seeds, against scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vae_cli.comparison.findings import gap
from vae_cli.comparison.statistics import difference, interpolate, statistic


def test_interval_is_students() -> None:
    values = [3.0, 4.5, 3.7, 5.1]
    found = statistic(values)
    low, high = stats.t.interval(0.95, 3, loc=found.mean, scale=stats.sem(values))
    assert found.interval == pytest.approx((low, high))
    assert found.sd == pytest.approx(math.sqrt(sum((v - found.mean) ** 2 for v in values) / 3))
    assert statistic([2.0]) == (2.0, None, 1)
    assert statistic([2.0]).interval is None


def test_a_difference_is_paired_if_seeds_match() -> None:
    one, other = {0: 3.0, 1: 5.0, 2: 9.0}, {0: 2.0, 1: 4.1, 2: 7.8}
    found = difference("rate", "a", one, "b", other)
    assert found is not None
    test = stats.ttest_rel(list(one.values()), list(other.values())).confidence_interval(0.95)
    assert found.interval == pytest.approx((test.low, test.high))
    assert (found.is_paired, found.is_real, found.seeds) == (True, True, 3)


def test_a_difference_is_welchs_if_they_do_not() -> None:
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
    assert (always.interval, always.is_real) == (None, None)  # an interval of width 0 would claim certainty
    assert gap(always) == "+0.500 (the same difference in all 2 seeds, no interval)"
    unpaired = difference("scale", "a", {0: 1.0, 1: 1.0}, "b", {2: 0.5, 3: 0.5})
    assert unpaired is not None
    assert (unpaired.interval, unpaired.is_real) == (None, None)
    assert statistic([1.0, 1.0]).interval is None
    assert difference("scale", "a", {}, "b", {0: 1.0}) is None


def test_95_percent_intervals_contain_the_true_difference_95_percent_of_the_time() -> None:
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
