"""Metrics of known factors: codes that are the factors, or rotations of them, and straightforward computations."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import entropy
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.metrics import mutual_info_score, r2_score
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from vae_cli.axes.dataset import Factor, Split, Splits
from vae_cli.axes.likelihood import Gaussian
from vae_cli.axes.prior import StandardNormal
from vae_cli.axes.sigma import Deterministic, Learned
from vae_cli.cli import run as run_command
from vae_cli.config.claims import GROUPS, entry
from vae_cli.metrics.base import BUDGETS, Budget, Figure, MeasuredRun, Metric, as_plain, compute_metrics
from vae_cli.metrics.disentanglement import Known, alike, cast_votes, factor_bins, information_gaps, vote_accuracy
from vae_cli.metrics.factors import CONSTANT, NO_FACTORS, ONE_DIMENSION, ONE_FACTOR, Dci, FactorVaeScore, Mig, Sap
from vae_cli.model.vae import VAE

METRICS: list[type[Metric]] = [Mig, Dci, Sap, FactorVaeScore]
MEANS = ("mig", "dci_disentanglement", "dci_completeness", "dci_informativeness", "sap", "factor_vae_score")
BUDGET = Budget(10**6, 10**6, 8, 20, 10**6, 6, 20, 200)
KINDS = (
    Factor("shape", "categorical"),
    Factor("scale", "continuous"),
    Factor("orientation", "circular"),
    Factor("x", "continuous"),
)
CONTINUOUS = tuple(Factor(name, "continuous") for name in "abcd")
Code = Callable[[Tensor], Tensor]


class AsCodes(nn.Module):
    """An encoder for images that are already codes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def draw(kinds: Sequence[Factor], count: int, seed: int) -> Tensor:
    """Draw independent factors, uniform on [0, 1) or on three classes, float64 (count, K)."""
    factors = torch.rand(count, len(kinds), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for column, kind in enumerate(kinds):
        if kind.kind == "categorical":
            factors[:, column] = (3 * factors[:, column]).floor() + 4  # classes need not begin with 0
    return factors.float().double()


def subject(code: Code, kinds: Sequence[Factor] = KINDS, train: Any = 4000, test: Any = 2000) -> MeasuredRun:
    """A run whose images are codes, computed from factors; train and test are numbers of images, or the factors."""
    factors = [
        draw(kinds, part, seed) if isinstance(part, int) else part.float() for seed, part in enumerate((train, test))
    ]
    splits = []
    for part in factors:
        codes = code(part.double()).float()
        splits.append(Split(codes[:, None, None, :], None, torch.arange(len(codes)), factors=part.float()))
    dimensions = splits[0].images.shape[-1]
    model = VAE(
        AsCodes(), Deterministic(), nn.Unflatten(1, (1, 1, dimensions)), Gaussian(1.0), StandardNormal(dimensions)
    )
    all_splits = Splits(splits[0], splits[1], splits[1], None, factors=tuple(kinds))
    run: Any = SimpleNamespace(model=model.eval(), device=torch.device("cpu"), splits=all_splits)
    return MeasuredRun(run, BUDGET)


def figures(of: MeasuredRun, kinds: Sequence[type[Metric]] = METRICS) -> dict[str, Figure]:
    """Return the figures of metrics, after a check that each is a finite number or says why it is not defined."""
    found = {name: figure for part in compute_metrics(of, kinds).values() for name, figure in part.items()}
    for figure in found.values():
        as_plain(figure)  # raises if a number is not finite
        assert (figure.value is None) == bool(figure.reason)
    return found


def value(figure: Figure) -> Any:
    assert figure.value is not None, figure.reason
    return figure.value


def permuted(factors: Tensor) -> Tensor:
    """Each factor in a dimension of its own, in another order, with other units and signs, and two idle dimensions."""
    idle = torch.full((len(factors), 1), 0.3, dtype=torch.float64)
    return torch.cat([idle, factors.flip(1) * torch.tensor([-3.0, 0.5, 4.0, -2.0])[: factors.shape[1]], idle], 1)


def entangled(factors: Tensor) -> Tensor:
    """Four continuous factors, each in all dimensions with the same weight: a rotation by Hadamard's matrix."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return (factors - 0.5) @ torch.kron(two, two) / 2


# -- Laws ------------------------------------------------------------------------------------------------------------


def test_permuted_factors_are_disentangled() -> None:
    found = figures(subject(permuted, train=10_000, test=20_000))
    assert value(found["mig"]) == pytest.approx(1, abs=0.005)
    assert value(found["dci_disentanglement"]) > 0.999
    assert value(found["dci_completeness"]) > 0.999
    assert value(found["dci_informativeness"]) > 0.99
    assert value(found["factor_vae_score"]) > 0.99
    # A constant code predicts one of three classes; a circle is correlated with a line by sqrt(6 / pi^2).
    assert value(found["sap_per_factor"]) == pytest.approx([2 / 3, 1, 6 / math.pi**2, 1], abs=0.03)
    assert value(found["dci_disentanglement_per_dimension"]) == pytest.approx([0, 1, 1, 1, 1, 0], abs=1e-3)


def test_rotated_factors_are_entangled() -> None:
    found = figures(subject(entangled, CONTINUOUS))
    assert abs(value(found["mig"])) < 0.02
    assert value(found["dci_disentanglement"]) < 0.05
    assert value(found["dci_completeness"]) < 0.05
    assert value(found["dci_informativeness"]) > 0.6  # nothing is lost
    assert value(found["sap"]) < 0.05
    assert value(found["factor_vae_score"]) == pytest.approx(1 / 4, abs=0.05)
    same = figures(subject(lambda factors: factors, CONTINUOUS))
    for name in MEANS:
        assert value(same[name]) > 0.95, name


def test_two_dimensions_that_know_the_same_have_no_gap() -> None:
    found = figures(subject(lambda factors: torch.cat([factors, 2 - factors], 1), CONTINUOUS))
    assert value(found["mig"]) == pytest.approx(0, abs=1e-9)
    assert value(found["sap"]) == pytest.approx(0, abs=1e-9)
    assert value(found["dci_disentanglement"]) > 0.99  # each of them is still about one factor
    assert value(found["dci_completeness"]) == pytest.approx(1 - math.log(2) / math.log(8), abs=0.1)
    assert value(found["factor_vae_score"]) > 0.99


def test_a_circular_factor_has_no_first_value() -> None:
    """Where the circle begins does not matter: codes that are its cosine and sine get the same figures."""
    kinds = (Factor("orientation", "circular"), Factor("x", "continuous"))

    def code(factors: Tensor) -> Tensor:
        angle = 2 * math.pi * factors[:, :1]
        return torch.cat([angle.cos(), angle.sin(), factors[:, 1:]], 1)

    factors = [draw(kinds, count, seed) for seed, count in enumerate((4000, 2000))]
    turned = [torch.stack([(part[:, 0] + 0.3).remainder(1), part[:, 1]], 1) for part in factors]
    codes = {id(part): code(part) for part in factors}
    one = figures(subject(code, kinds, *factors))
    back = dict(zip(map(len, turned), codes.values(), strict=True))
    other = figures(subject(lambda part: back[len(part)], kinds, *turned))
    for name in MEANS:
        assert value(other[name]) == pytest.approx(value(one[name]), abs=0.03), name
    assert value(one["dci_informativeness"]) > 0.99
    assert value(one["factor_vae_score"]) > 0.99
    assert value(one["sap_per_factor"])[0] == pytest.approx(0, abs=0.02)  # two dimensions share the circle


def test_the_order_sign_and_unit_of_dimensions_do_not_matter() -> None:
    mixing = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    order, unit = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([1.0, -7.0, 0.2, -1.0, 5.0], dtype=torch.float64)
    one = figures(subject(lambda factors: factors @ mixing))
    other = figures(subject(lambda factors: (factors @ mixing * unit + unit)[:, order]))
    for name in MEANS:
        near = 0.03 if name.startswith("dci") else 0.002
        assert value(other[name]) == pytest.approx(value(one[name]), abs=near), name


def test_the_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    mixing = torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def found(seed: int) -> dict[str, Figure]:
        of = subject(lambda factors: factors @ mixing, train=500, test=300)
        return figures(MeasuredRun(of.run, BUDGETS["quick"], seed))

    assert found(0) == found(0)
    assert found(0)["factor_vae_score"] != found(1)["factor_vae_score"]
    alone = figures(MeasuredRun(subject(lambda f: f @ mixing, train=500, test=300).run, BUDGETS["quick"]), [Dci])
    assert alone.items() <= found(0).items()


# -- Cases without an answer -----------------------------------------------------------------------------------------


def test_a_constant_code_knows_nothing() -> None:
    found = figures(subject(lambda factors: torch.full((len(factors), 3), 0.7)))
    for name in ("mig", "dci_disentanglement", "dci_completeness", "sap"):
        assert value(found[name]) == 0, name
    assert value(found["dci_informativeness"]) == pytest.approx(0, abs=0.01)
    assert value(found["factor_vae_score"]) == 1 / 4
    assert found["factor_vae_score"].note == "guessing: 0.25"


def test_without_known_factors_nothing_is_defined() -> None:
    of = subject(permuted)
    of.splits = of.run.splits._replace(factors=None)
    found = figures(of)
    assert found.keys() >= set(MEANS)
    assert {figure.reason for figure in found.values()} == {NO_FACTORS}


def test_factors_that_do_not_vary_are_left_out() -> None:
    train, test = draw(KINDS, 1000, 0), draw(KINDS, 500, 1)
    test[:, 1] = 0.5
    found = figures(subject(permuted, KINDS, train, test))
    for name in MEANS:
        assert "without the factors that do not vary: scale" in found[name].note, name
    assert value(found["mig"]) > 0.9
    assert found["mig_per_factor"].note == "factors: shape, orientation, x"
    assert len(value(found["mig_per_factor"])) == 3
    train[:, [0, 2]] = 4.0
    found = figures(subject(permuted, KINDS, train, test))
    for name in ("dci_disentanglement", "dci_disentanglement_per_dimension", "factor_vae_score"):
        assert found[name].reason == ONE_FACTOR
    assert value(found["dci_completeness"]) > 0.99
    train[:] = 0.5
    assert {figure.reason for figure in figures(subject(permuted, KINDS, train, test)).values()} == {CONSTANT}


def test_with_one_dimension_its_own_scores_are_the_gaps() -> None:
    found = figures(subject(lambda factors: factors[:, 3:]))
    assert found["dci_completeness"].reason == found["dci_completeness_per_factor"].reason == ONE_DIMENSION
    assert value(found["mig_per_factor"])[3] == pytest.approx(1)
    assert value(found["sap_per_factor"])[3] == pytest.approx(1)
    assert value(found["factor_vae_score"]) == pytest.approx(1 / 4, abs=0.01)


@pytest.mark.parametrize("test", [1, 2, 3, 12])
@pytest.mark.parametrize("train", [1, 2, 12])
def test_few_images_give_a_number_or_a_reason(train: int, test: int) -> None:
    found = figures(subject(permuted, KINDS, train, test))
    if min(train, test) == 1:
        assert {figure.reason for figure in found.values()} == {CONSTANT}
    for name in ("mig", "factor_vae_score"):
        if found[name].value is not None:
            assert 0 <= value(found[name]) <= 1 + 1e-9


def test_a_class_that_only_the_test_images_have_is_never_predicted() -> None:
    train, test = draw(KINDS, 1000, 0), draw(KINDS, 500, 1)
    train[train[:, 0] == 6, 0] = 4
    found = figures(subject(permuted, KINDS, train, test))
    assert value(found["dci_informativeness_per_factor"])[0] < 0.8
    assert value(found["factor_vae_score"]) > 0.95


def test_codes_that_are_not_finite_are_not_measured() -> None:
    found = figures(subject(lambda factors: factors / 0))
    assert {figure.reason for figure in found.values()} == {"the mean codes are not finite"}


def test_idle_dimensions_have_no_vote() -> None:
    """A dimension is idle if its mean varies far less than its noise, even if the mean knows a factor exactly."""
    of = subject(lambda factors: torch.cat([factors[:, :3], 0.05 * factors[:, 3:]], 1))
    everything = value(figures(of, [FactorVaeScore])["factor_vae_score"])
    model: Any = of.run.model
    model.sigma = Learned()
    model.encoder = nn.Sequential(AsCodes(), nn.ConstantPad1d((0, 4), 0.0))
    of = MeasuredRun(of.run, BUDGET)
    assert of.active.tolist() == [True, True, True, False]
    assert everything > 0.98
    assert value(figures(of, [FactorVaeScore])["factor_vae_score"]) == pytest.approx(3 / 4 + 1 / 16, abs=0.08)


# -- Straightforward computations ------------------------------------------------------------------------------------


def mixed(count: int, seed: int) -> Known:
    """Codes that are nonlinear mixtures of the factors, with noise and a constant dimension."""
    factors = draw(KINDS, count, seed)
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    angle = 2 * math.pi * factors[:, 2:3]
    inputs = torch.cat([factors[:, :2], angle.cos(), angle.sin(), factors[:, 3:]], 1)
    noise = 0.3 * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    return Known(torch.cat([(inputs @ mixing).tanh() + noise, torch.ones(count, 1)], 1).float().double(), factors)


def measured_run(train: Known, test: Known) -> MeasuredRun:
    codes = {len(part.factors): part.codes for part in (train, test)}
    return subject(lambda factors: codes[len(factors)], KINDS, train.factors, test.factors)


def digitized(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    edges = np.histogram(values, count)[1]
    return np.digitize(values, edges[1:-1])


def test_the_mutual_information_gap_is_that_of_scikit_learn() -> None:
    train, test = mixed(1500, 0), mixed(1000, 1)
    found = figures(measured_run(train, test), [Mig])
    codes, factors = test.codes.numpy(), test.factors.numpy()
    expected = []
    for column, kind in enumerate(KINDS):
        values = factors[:, column]
        symbols = values if kind.kind == "categorical" else digitized(values, 10)
        if kind.kind == "circular":
            symbols = (values * 10).astype(int)
        shared = sorted(mutual_info_score(symbols, digitized(code, 20)) for code in codes.T)
        expected.append((shared[-1] - shared[-2]) / entropy(np.unique(symbols, return_counts=True)[1]))
    assert value(found["mig_per_factor"]) == pytest.approx(expected, abs=1e-9)
    assert value(found["mig"]) == pytest.approx(np.mean(expected), abs=1e-9)


def test_scores_of_separated_attributes_are_those_of_numpy_and_scikit_learn() -> None:
    train, test = mixed(1500, 0), mixed(1000, 1)
    found = figures(measured_run(train, test), [Sap])
    expected = []
    for column, kind in enumerate(KINDS):
        scores = []
        for code in range(4):
            z, v = test.codes[:, code].numpy(), test.factors[:, column].numpy()
            if kind.kind == "continuous":
                scores.append(np.corrcoef(z, v)[0, 1] ** 2)
            elif kind.kind == "circular":  # Mardia and Jupp, Directional Statistics, 2000, equation 11.2.1
                c, s = np.cos(2 * np.pi * v), np.sin(2 * np.pi * v)
                zc, zs, cs = np.corrcoef(z, c)[0, 1], np.corrcoef(z, s)[0, 1], np.corrcoef(c, s)[0, 1]
                scores.append((zc**2 + zs**2 - 2 * zc * zs * cs) / (1 - cs**2))
            else:
                fitted = train.codes[:, code].numpy()
                center, unit = fitted.mean(), fitted.std()
                machine = LinearSVC(C=0.01, class_weight="balanced", dual=False)
                machine.fit((fitted[:, None] - center) / unit, train.factors[:, column].numpy())
                scores.append(machine.score((z[:, None] - center) / unit, v))
        # Of the constant dimension.
        often = test.factors[:, column] == train.factors[:, column].mode().values
        scores.append(float(often.double().mean()) if kind.kind == "categorical" else 0)
        scores.sort()
        expected.append(scores[-1] - scores[-2])
    assert value(found["sap_per_factor"]) == pytest.approx(expected, abs=1e-6)


def test_importances_are_those_of_forests_of_classifiers_and_regressors() -> None:
    train, test = mixed(3000, 0), mixed(1000, 1)
    found = figures(measured_run(train, test), [Dci])
    importances, informativeness = [], []
    for column, kind in enumerate(KINDS):
        v, asked = train.factors[:, column].numpy(), test.factors[:, column].numpy()
        forest: Any = RandomForestRegressor(30, min_samples_leaf=5, random_state=1)
        if kind.kind == "categorical":
            forest = RandomForestClassifier(30, min_samples_leaf=5, max_features=None, random_state=1)
        forest.fit(train.codes.numpy(), np.stack([np.cos(2 * np.pi * v), np.sin(2 * np.pi * v)], 1)
                   if kind.kind == "circular" else v)  # fmt: skip
        importances.append(forest.feature_importances_)
        if kind.kind == "continuous":
            informativeness.append(r2_score(asked, forest.predict(test.codes.numpy())))
    table = np.array(importances).T
    assert value(found["dci_completeness_per_factor"]) == pytest.approx(
        [1 - entropy(column, base=5) for column in table.T], abs=0.03
    )
    rows = [1 - entropy(row, base=4) if row.sum() else 0 for row in table]
    assert value(found["dci_disentanglement_per_dimension"]) == pytest.approx(rows, abs=0.05)
    weights = table.sum(1) / table.sum()
    assert value(found["dci_disentanglement"]) == pytest.approx(weights @ rows, abs=0.03)
    r2 = value(found["dci_informativeness_per_factor"])
    assert [r2[1], r2[3]] == pytest.approx(informativeness, abs=0.03)
    assert value(found["dci_informativeness"]) == pytest.approx(np.mean(r2))


def test_images_that_are_alike_share_the_value_of_their_factor() -> None:
    torch.manual_seed(0)
    factors = draw(KINDS, 1000, 0)
    for column, kind in enumerate(KINDS):
        values = factors[:, column]
        rows = alike(values, kind, 3000)
        assert rows.shape == (3000, 64)
        chosen = values[rows]
        if kind.kind == "categorical":
            assert (chosen == chosen[:, :1]).all()
            assert len(rows.unique()) == 1000
        elif kind.kind == "continuous":
            assert (chosen.amax(1) - chosen.amin(1)).max() < 0.1
            assert all(len(set(one)) == 64 for one in rows.tolist())
        else:
            gap = (chosen - chosen[:, :1]).remainder(1)
            assert torch.minimum(gap, 1 - gap).max() < 0.1
            # Every image takes part equally often, also where the circle closes.
            counts = rows.flatten().bincount(minlength=1000)
            assert 192 / 1.7 < counts.min() < counts.max() < 192 * 1.7
        assert values[rows].flatten().mean() == pytest.approx(float(values.mean()), abs=0.05)


def test_votes_are_counted_as_in_the_paper() -> None:
    """A plain loop with factors that are exactly fixed, as the paper draws them, agrees with neighbors in order."""
    train, test = mixed(20_000, 0), mixed(20_000, 1)
    train, test = (Known(part.codes[:, :4], part.factors) for part in (train, test))
    torch.manual_seed(0)
    score = vote_accuracy(train, test, KINDS)

    random = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(5, 4, generator=generator, dtype=torch.float64).numpy()
    everything = train.codes.numpy().std(0) ** 2
    votes = []
    for turn in range(6000):
        fixed = turn % 4
        shape, rest = random.integers(4, 7, 64), random.random((3, 64))
        factors = np.stack([shape, *rest])
        factors[fixed] = factors[fixed, 0]
        angle = 2 * np.pi * factors[2]
        inputs = np.stack([factors[0], factors[1], np.cos(angle), np.sin(angle), factors[3]], 1)
        codes = np.tanh(inputs @ mixing) + 0.3 * random.standard_normal((64, 4))
        votes.append((int((codes.var(0) / everything).argmin()), fixed))
    counts = np.zeros((4, 4))
    for dimension, fixed in votes[:4000]:
        counts[dimension, fixed] += 1
    table = counts.argmax(1)
    plain = np.mean([table[dimension] == fixed for dimension, fixed in votes[4000:]])
    assert 0.3 < score < 0.95
    assert score == pytest.approx(plain, abs=0.03)


def test_each_factor_is_fixed_equally_often() -> None:
    torch.manual_seed(0)
    known = mixed(500, 0)
    counts = cast_votes(known, KINDS, known.codes.var(0).clamp_min(1e-9), 600)
    assert counts.sum(1).tolist() == [600] * 4


@pytest.mark.parametrize(("name", "kind"), [("mig", Mig), ("sap", Sap), ("dci_informativeness", Dci)])
def test_standard_errors_are_the_deviations_between_samples_of_images(name: str, kind: type[Metric]) -> None:
    train = mixed(200, 0)
    found = [figures(measured_run(train, mixed(800, 1 + seed)), [kind])[name] for seed in range(25)]
    spread = float(np.std([value(figure) for figure in found], ddof=1))
    errors = [figure.error for figure in found if isinstance(figure.error, float)]
    assert len(errors) == 25
    assert float(np.mean(errors)) == pytest.approx(spread, rel=0.4)
    assert found[0].parts is not None
    assert float(found[0].parts.sum()) == pytest.approx(0, abs=1e-9)


def test_the_bias_of_the_gap_is_as_documented() -> None:
    """An unrelated dimension has about 19 * 9 / (2 N) nats of mutual information with a factor, instead of 0."""
    gaps = []
    for seed in range(20):
        factors = draw(CONTINUOUS[:1], 1000, seed)
        noise = torch.rand(1000, 1, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)
        gaps.append(float(information_gaps(Known(torch.cat([factors, noise], 1), factors), CONTINUOUS[:1])[0][0]))
    assert 1 - np.mean(gaps) == pytest.approx(19 * 9 / 2000 / math.log(10), rel=0.15)


def test_bins_of_a_factor() -> None:
    values = torch.tensor([0.0, 0.05, 0.5, 0.999, 1.0])
    assert factor_bins(values, Factor("x", "continuous")).tolist() == [0, 0, 5, 9, 9]
    assert factor_bins(values / 2, Factor("angle", "circular")).tolist() == [0, 0, 2, 4, 5]
    assert factor_bins(torch.tensor([3.0, 1.0, 3.0]), Factor("shape", "categorical")).tolist() == [1, 0, 1]


# -- The commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two short runs on the shapes and one on the digits, evaluated quickly."""
    folder = tmp_path_factory.mktemp("factors")
    short = ["epochs=1", "network.hidden=[8]", "latent=3", "batch_size=200"]
    shapes = ["dataset=shapes", "dataset.side=8", "dataset.images=600", "dataset.test=200", "dataset.validation=100"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for words in (
            ["train", *shapes, *short, "run_name=shapes/one"],
            ["train", *shapes, *short, "sigma=deterministic", "run_name=shapes/two"],
            ["train", *short, "run_name=digits"],
            *(["evaluate", run, "--quick", "--metrics", "rate,mig,dci,sap,factor_vae_score"]
              for run in ("runs/shapes/one", "runs/shapes/two", "runs/digits")),
        ):  # fmt: skip
            patch.setattr(sys, "argv", ["vae", *words])
            assert run_command() == 0
    return folder


def evaluation(runs: Path, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runs / "runs" / run / "evaluation" / "metrics.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("run", ["shapes/one", "shapes/two"])
def test_runs_on_shapes_are_measured_in_every_mode(runs: Path, run: str) -> None:
    found = evaluation(runs, run)
    assert found["figures"].keys() >= {*MEANS, "mig_per_factor", "dci_informativeness_per_factor", "sap_per_factor"}
    assert found["figures"]["mig_per_factor"]["note"] == "factors: shape, scale, orientation, x, y"
    assert len(found["figures"]["dci_disentanglement_per_dimension"]["value"]) == 3
    for name in MEANS:
        one = found["figures"][name]
        assert one["claim"] == "factors"
        assert entry(name).definition
        assert "resampled" not in one  # no verdict depends on it


@pytest.mark.slow
def test_elsewhere_the_reason_is_stored_and_the_headlines_do_not_mention_factors(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {evaluation(runs, "digits")["left_out"][name]["reason"] for name in MEANS} == {NO_FACTORS}
    monkeypatch.chdir(runs)
    monkeypatch.setenv("XDG_CACHE_HOME", str(runs / "cache"))
    for run, words, is_there in (
        ("digits", [], False),
        ("digits", ["--all"], True),
        ("shapes/one", [], True),
    ):
        monkeypatch.setattr(sys, "argv", ["vae", "evaluate", f"runs/{run}", "--quick", "--out", f"out/{run}", *words])
        assert run_command() == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert (entry("mig").title in printed) == is_there, (run, words)
        assert (GROUPS["factors"] in printed) == (run != "digits"), (run, words)
        assert (f"Reason: {NO_FACTORS}." in printed) == bool(words)


@pytest.mark.slow
def test_a_comparison_describes_the_factors_and_judges_nothing_by_them(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    monkeypatch.setenv("XDG_CACHE_HOME", str(runs / "cache"))
    monkeypatch.setattr(sys, "argv", ["vae", "compare", "runs/shapes", "--jobs", "1"])
    assert run_command() == 0
    page = (runs / "runs/shapes/compare/report.html").read_text()
    assert GROUPS["factors"] in page
    assert "factor_vae_score" in page
    compared = json.loads((runs / "runs/shapes/compare/compare.json").read_text())
    assert all("mig" in arm["figures"] for arm in compared["arms"])
    assert "factors" not in compared["answers"]
