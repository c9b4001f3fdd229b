"""Metrics of neighbors and shortcuts, against models with known answers."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.func import jacrev

from vae_cli import load_run
from vae_cli.axes.dataset import Split, Splits
from vae_cli.axes.likelihood import Gaussian, Likelihood
from vae_cli.axes.network import MLP, Conv, Network
from vae_cli.axes.prior import StandardNormal
from vae_cli.axes.sigma import Deterministic, Fixed, Learned
from vae_cli.commands.train import train
from vae_cli.config import catalog
from vae_cli.config.instantiate import build
from vae_cli.metrics import derivatives, neighbours
from vae_cli.metrics.base import Budget, Figure, MeasuredRun, Metric, as_plain, compute_metrics
from vae_cli.metrics.neighbours import ClassChange, Interpolation, Jacobian, NeighbourLabels
from vae_cli.metrics.shortcuts import Collapse, Generalization, Probes, Reidentification
from vae_cli.model.vae import VAE
from vae_cli.runs.folder import RunDir

METRICS: list[type[Metric]] = [
    *(Jacobian, Interpolation, ClassChange, NeighbourLabels),
    *(Collapse, Reidentification, Generalization, Probes),
]
BUDGET = Budget(10**6, 10**6, 8, 20, 10**6, 6, 20, 200)
PLACES = ("codes", "halfway", "prior")

Compose = Callable[..., dict[str, Any]]


def images_of(codes: Tensor, labels: Tensor | None) -> Split:
    return Split(codes.float()[:, None, None, :], labels, torch.arange(len(codes)))


class Codes(nn.Module):
    """An encoder for images that are already codes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def subject(
    codes: Tensor,
    labels: Tensor | None = None,
    sigma: nn.Module | None = None,
    decoder: nn.Module | None = None,
    likelihood: nn.Module | None = None,
    train: tuple[Tensor, Tensor | None] | None = None,
    folder: Path = Path("none"),
) -> MeasuredRun:
    """Test images whose codes are known: they are the codes, (N, D). By default they are decoded into themselves."""
    dimensions = codes.shape[1] // getattr(sigma, "raw_size", 1)
    decoder = decoder or nn.Unflatten(1, (1, 1, dimensions))
    model = VAE(Codes(), sigma or Deterministic(), decoder, likelihood or Gaussian(1.0), StandardNormal(dimensions))
    test = images_of(codes, labels)
    splits = Splits(test if train is None else images_of(*train), test, test, None)
    shape = tuple(model.decode(torch.zeros(1, dimensions)).mean.shape[1:])
    run: Any = SimpleNamespace(
        model=model.eval(), device=torch.device("cpu"), splits=splits, shape=shape, folder=RunDir(folder)
    )
    return MeasuredRun(run, BUDGET)


def figures(of: MeasuredRun, kind: type[Metric]) -> dict[str, Figure]:
    found = compute_metrics(of, [kind])[kind.__name__]
    for figure in found.values():
        as_plain(figure)  # raises if a number is not finite
    return found


def numbers(of: MeasuredRun, kind: type[Metric]) -> dict[str, float]:
    return {name: figure.value for name, figure in figures(of, kind).items() if isinstance(figure.value, float)}


class FakeNet:
    """A feature net that classifies an image by its first pixel."""

    accuracy = 0.5

    def classes(self, x: Tensor) -> Tensor:
        assert float(x.min()) >= 0
        assert float(x.max()) <= 1
        return (x.flatten(1)[:, 0] > 0.5).long()


@pytest.fixture
def fake_net(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("vae_cli.metrics.features")
    module.feature_net = lambda subject: None if subject.splits.train.labels is None else FakeNet()
    monkeypatch.setitem(sys.modules, "vae_cli.metrics.features", module)


# --- The Jacobian ---


def dense(of: MeasuredRun, z: Tensor) -> Tensor:
    """The Jacobian in units of the aggregate standard deviation, (B, pixels, D), by reverse differentiation."""

    def one(code: Tensor) -> Tensor:
        return neighbours.mean_images(of, code[None])[0].flatten()

    return torch.stack([jacrev(one)(code) for code in z]).detach() * of.spread


DECODERS: dict[str, tuple[Network, tuple[int, int, int]]] = {
    "mlp": (MLP([24], activation="tanh"), (1, 5, 4)),
    "conv": (Conv(width=4, hidden=16), (2, 8, 8)),
    "conv-batch": (Conv(width=4, hidden=16, normalization="batch"), (1, 8, 8)),
}
LIKELIHOODS = [("mlp", likelihood) for likelihood in catalog.groups()["likelihood"].choices]


@pytest.mark.parametrize(("name", "likelihood"), [*LIKELIHOODS, ("conv", "gaussian"), ("conv-batch", "bernoulli")])
def test_the_jacobian_norms_agree_with_the_dense_jacobian(compose: Compose, name: str, likelihood: str) -> None:
    network, shape = DECODERS[name]
    torch.manual_seed(0)
    family: Any = build(compose(f"likelihood={likelihood}")["likelihood"], "likelihood", Likelihood)
    decoder = network.decoder(5, torch.zeros(family.raw_size * shape[0], *shape[1:]))
    of = subject(torch.randn(30, 5) * torch.tensor([3.0, 1.0, 0.2, 1.0, 1.0]), None, Fixed(0.5), decoder, family)
    z = of.codes().loc[:3]
    truth = dense(of, z)

    def function(codes: Tensor) -> Tensor:
        return neighbours.mean_images(of, codes)

    frobenius = derivatives.frobenius_norm(function, z, of.spread)
    largest, converged = derivatives.largest_singular_value(function, z, of.spread)
    torch.testing.assert_close(frobenius.float(), torch.linalg.matrix_norm(truth), rtol=1e-4, atol=0)
    torch.testing.assert_close(largest, torch.linalg.matrix_norm(truth, 2), rtol=2e-3, atol=0)
    assert converged.all()


def test_the_jacobian_of_a_linear_decoder_is_its_weight() -> None:
    torch.manual_seed(0)
    codes, sigma = torch.randn(400, 3) @ torch.diag(torch.tensor([4.0, 1.0, 0.1])) + 5, 0.5
    decoder = nn.Sequential(nn.Linear(3, 12), nn.Unflatten(1, (1, 3, 4)))
    of = subject(codes, None, Fixed(sigma), decoder)
    weight: Any = decoder[0].weight
    unit = (codes.double().var(0, correction=0) + sigma**2).sqrt()
    J = weight.detach().double() * unit  # noqa: N806
    found = figures(of, Jacobian)
    names = {f"jacobian_{kind}_{place}" for kind in ("frobenius", "norm") for place in PLACES}
    assert found.keys() == {*names, "jacobian_ratio", "jacobian_ratio_means"}
    for place in PLACES:
        frobenius, norm = found[f"jacobian_frobenius_{place}"], found[f"jacobian_norm_{place}"]
        assert frobenius.value == pytest.approx(float(torch.linalg.matrix_norm(J)), rel=1e-5)
        assert norm.value == pytest.approx(float(torch.linalg.matrix_norm(J, 2)), rel=1e-4)
        assert frobenius.count == norm.count == BUDGET.points
        assert frobenius.note == norm.note == ""


def test_the_jacobian_is_invariant_to_the_scale_of_the_code() -> None:
    found = []
    for size in (1.0, 100.0):
        torch.manual_seed(0)
        decoder = MLP([24], activation="tanh").decoder(4, torch.zeros(1, 4, 4))
        codes = torch.randn(50, 4)
        layer: Any = decoder[0]
        with torch.no_grad():
            layer.weight /= size
        of = subject(codes * size, None, Fixed(0.3 * size), decoder)
        found.append(numbers(of, Jacobian))
    for name in ("jacobian_frobenius_codes", "jacobian_norm_codes", "jacobian_frobenius_halfway"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)


def test_random_directions_estimate_the_frobenius_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(30, 40) * torch.linspace(0.1, 2, 40)
    monkeypatch.setattr(derivatives, "MAX_DIRECTIONS", 32)
    estimates = derivatives.frobenius_norm(
        lambda z: (z @ weight.T)[:, None, None], torch.zeros(4000, 40), torch.ones(40)
    )
    truth = float(weight.double().norm())
    spread = float(estimates.std()) / truth
    assert 0 < spread <= 1 / math.sqrt(2 * 32)
    assert float(estimates.square().mean()) == pytest.approx(truth**2, rel=5 * 2 * spread / math.sqrt(4000))


def test_a_missing_jacobian_has_a_reason() -> None:
    class Detached(Gaussian):
        def forward(self, raw: Tensor) -> Distribution:
            return super().forward(raw.detach())

    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(3, 12), nn.Unflatten(1, (1, 3, 4)))
    found = figures(subject(torch.randn(9, 3), None, None, linear, Detached(1.0)), Jacobian)
    assert all(figure.value is None and "gradient" in figure.reason for figure in found.values())
    found = figures(subject(torch.ones(9, 3), None, None, linear), Jacobian)
    assert all(figure.value is None and "equal" in figure.reason for figure in found.values())
    with torch.no_grad():
        linear[0].weight.zero_()  # a decoder that ignores the code has a Jacobian: 0
    of = subject(torch.randn(9, 3), None, None, linear)
    assert set(numbers(of, Jacobian).values()) == {0.0}
    assert figures(of, Jacobian)["jacobian_ratio"].reason == "all codes decode to the same image"


@pytest.mark.parametrize("directions", [256, 3])
def test_variance_after_linear_maps(directions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all Jacobians and all codes; with fewer directions than dimensions, only the first codes are used."""
    monkeypatch.setattr(derivatives, "MAX_DIRECTIONS", directions)
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 12), nn.Unflatten(1, (1, 3, 4)))
    codes = torch.randn(300, 5) @ torch.randn(5, 5) + 1
    jacobians = torch.func.vmap(torch.func.jacrev(lambda z: decoder(z[None]).flatten()))(codes[:40])
    squares = torch.einsum("pxd,nd->pnx", jacobians, codes - codes.mean(0)).square().sum(2)
    if directions == 3:
        squares = squares[:, :3]
    after, of_codes = derivatives.variance_after_linear_maps(decoder, codes[:40], codes)
    torch.testing.assert_close(after, squares.mean(1).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_codes, squares.mean(0).double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sigma", [None, Fixed(2.0)])
def test_the_jacobian_ratio_of_a_linear_decoder_is_1(sigma: nn.Module | None) -> None:
    """Whatever the noise, and however the codes are correlated."""
    torch.manual_seed(0)
    codes = torch.randn(400, 3) @ torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1e-3]]) + 5
    decoder = nn.Sequential(nn.Linear(3, 12), nn.Unflatten(1, (1, 3, 4)))
    found = figures(subject(codes, None, sigma, decoder), Jacobian)
    for name in ("jacobian_ratio", "jacobian_ratio_means"):
        assert found[name].value == pytest.approx(1, abs=1e-4)
        assert found[name].error == pytest.approx(0, abs=1e-5)  # it is 1 for any images


def test_the_jacobian_ratio_of_a_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """For g(z) = z^2 and z ~ N(0, 1), E g'^2 = 4 and Var g = 2."""

    class Square(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.square()[:, None, None, :]

    torch.manual_seed(0)
    of = subject(torch.randn(20_000, 1), None, None, Square())
    of.budget = dataclasses.replace(BUDGET, points=20_000)
    ratio = figures(of, Jacobian)["jacobian_ratio"]
    assert isinstance(ratio.error, float)
    assert ratio.value == pytest.approx(math.sqrt(2), abs=4 * ratio.error)
    values = []
    for seed in range(60):  # its error is its spread over samples of images
        torch.manual_seed(seed)
        of = subject(torch.randn(300, 1), None, None, Square())
        of.budget = dataclasses.replace(BUDGET, points=150)
        figure = figures(of, Jacobian)["jacobian_ratio"]
        values.append((figure.value, figure.error))
    spread = torch.tensor([value for value, _ in values]).std()
    assert float(torch.tensor([error for _, error in values]).mean() / spread) == pytest.approx(1, abs=0.35)


# --- Interpolation ---


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_interpolation_through_a_linear_decoder_is_straight_and_even(precision: Any) -> None:
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(3, 12), nn.Unflatten(1, (1, 3, 4)))
    of = subject(torch.randn(50, 3), None, None, decoder, train=(torch.rand(70, 12), None))
    of.model.precision = precision
    found = figures(of, Interpolation)
    for name in ("path_length_over_chord", "largest_step_over_mean"):
        assert found[name].value == pytest.approx(1, abs=1e-4)
        assert found[name].count == BUDGET.pairs


def test_interpolation_along_a_half_circle() -> None:
    class Circle(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            angle = math.pi * z[:, :1]
            return torch.cat([angle.cos(), angle.sin()], 1)[:, None, None]

    found = numbers(
        subject(torch.tensor([[0.0], [1.0]]), decoder=Circle(), train=(torch.zeros(4, 2), None)), Interpolation
    )
    assert found["path_length_over_chord"] == pytest.approx(16 * math.sin(math.pi / 32), rel=1e-5)  # 16 chords
    assert found["largest_step_over_mean"] == pytest.approx(1, rel=1e-5)
    assert found["midpoint_distance_to_training"] == pytest.approx(math.sqrt(1 / 2), rel=1e-5)


def test_a_single_jump_is_sixteen_mean_steps() -> None:
    class Jump(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return (z > 0.47).float()[:, None, None]

    codes = torch.tensor([[0.0], [1.0]])
    found = numbers(subject(codes, decoder=Jump(), train=(torch.tensor([[0.0], [0.9]]), None)), Interpolation)
    assert found["path_length_over_chord"] == pytest.approx(1)
    assert found["largest_step_over_mean"] == pytest.approx(16)


def test_distance_to_the_nearest_training_image() -> None:
    """Codes on a circle about the origin and training images at the same places: ends are there, midpoints are not."""
    angle = torch.arange(8) * math.pi / 4
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    of = subject(circle, train=(torch.cat([circle, circle * 7]), None))
    first, second = neighbours.pairs(of, BUDGET.pairs) or ()
    assert (first != second).all()
    found = figures(of, Interpolation)
    assert found["reconstruction_distance_to_training"].value == pytest.approx(0, abs=1e-6)
    assert found["reconstruction_distance_to_training"].count == 2 * BUDGET.pairs
    loc = of.codes().loc
    middle = (loc[first] + loc[second]) / 2
    nearest = (middle[:, None] - circle).square().mean(-1).sqrt().amin(1)
    assert found["midpoint_distance_to_training"].value == pytest.approx(float(nearest.mean()), rel=1e-5)


def test_interpolation_does_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    decoder = MLP([24]).decoder(3, torch.zeros(1, 4, 4))
    of = subject(torch.randn(50, 3), None, None, decoder, train=(torch.rand(700, 16), None))
    found = numbers(of, Interpolation)
    monkeypatch.setattr(neighbours, "PIXELS_KEPT", 17 * 16 * 3)
    assert numbers(of, Interpolation) == pytest.approx(found, rel=1e-5)


def test_a_decoder_that_ignores_the_code_has_no_path() -> None:
    class Deaf(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return torch.full((len(z), 1, 2, 2), 0.7) + 1e-7 * z.sum(1)[:, None, None, None]

    found = figures(subject(torch.randn(20, 3), decoder=Deaf(), train=(torch.zeros(5, 4), None)), Interpolation)
    for name in ("path_length_over_chord", "largest_step_over_mean"):
        assert "the same image" in found[name].reason
    assert found["midpoint_distance_to_training"].value == pytest.approx(0.7, rel=1e-5)


# --- Classes ---


@pytest.mark.usefixtures("fake_net")
def test_class_change_is_the_probability_of_crossing_the_border() -> None:
    """One dimension, two clusters 0.3 from the border, which is at 0.5, and noise of a known scale: Phi(-0.3 / s)."""
    labels = torch.arange(4000) % 2
    codes = torch.where(labels == 1, 0.8, 0.2)[:, None]
    of = subject(codes, labels, Fixed(0.2))
    of.budget = Budget(**{**vars(BUDGET), "pictures": 20_000})
    found = figures(of, ClassChange)
    spread = math.sqrt(0.09 + 0.04)
    for name, s in [("class_change_by_noise", 0.2), ("class_change_by_step", 0.5 * spread)]:
        truth = math.erfc(0.3 / s / math.sqrt(2)) / 2
        error = found[name].error
        assert isinstance(error, float)
        assert found[name].count == 4000
        assert found[name].value == pytest.approx(truth, abs=4 * error)
        assert error == pytest.approx(math.sqrt(truth * (1 - truth) / 20_000), rel=0.1)
    assert found["class_change_from_label"].value == found["class_change_by_noise"].value
    # If a quarter of the labels are wrong, a quarter of the draws disagree with their label, even without noise.
    wrong = torch.where(torch.arange(4000) % 4 == 0, 1 - labels, labels)
    quiet = subject(codes, wrong, Fixed(1e-6))
    quiet.budget = of.budget
    found = figures(quiet, ClassChange)
    assert found["class_change_by_step"].value == pytest.approx(math.erfc(2 / math.sqrt(2)) / 2, abs=0.005)
    assert found["class_change_by_noise"].value == 0
    assert found["class_change_from_label"].value == 0.25
    assert found["class_change_from_label"].note.startswith(
        "25.0% for codes without noise; the feature net's accuracy is 50.0%"
    )


@pytest.mark.usefixtures("fake_net")
def test_class_change_of_a_point_mass_and_without_labels() -> None:
    labels = torch.arange(50) % 2
    found = figures(subject(torch.where(labels == 1, 0.8, 0.2)[:, None], labels), ClassChange)
    assert {name for name, figure in found.items() if figure.value is None} == {
        "class_change_by_noise",
        "class_change_from_label",
    }
    assert found["class_change_by_step"].count == 40
    found = figures(subject(torch.rand(50, 2), None, Fixed(0.1)), ClassChange)
    assert all("labels" in figure.reason for figure in found.values())


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_neighbours_in_clusters_agree_and_in_noise_do_not(size: float) -> None:
    torch.manual_seed(0)
    labels = torch.arange(900) % 3
    clustered = torch.randn(900, 4) * 0.1 + 10 * torch.eye(4)[labels]
    found = figures(subject(clustered * size, labels), NeighbourLabels)
    assert found["neighbour_label_agreement"].value == 1
    chance = 299 / 899
    assert found["neighbour_label_chance"].value == pytest.approx(chance)
    found = figures(subject(torch.randn(900, 4) * size, labels), NeighbourLabels)
    assert found["neighbour_label_agreement"].value == pytest.approx(chance, abs=0.03)
    assert figures(subject(clustered, None), NeighbourLabels)["neighbour_label_agreement"].value is None


def test_neighbours_are_found_in_units_of_the_spread() -> None:
    """An uninformative dimension with large values counts no more than the one that separates the classes, and
    dimensions in which only the last digit varies do not count."""
    torch.manual_seed(0)
    labels = torch.arange(600) % 2
    codes = torch.stack([labels + 0.01 * torch.randn(600), 1e4 * torch.randn(600)], 1)
    rounding = 3000 * (1 + torch.randint(2, (600, 20)) * torch.finfo(torch.float32).eps)
    of = subject(torch.cat([codes, rounding], 1), labels)
    assert (of.spread > 1e-5).all()
    assert numbers(of, NeighbourLabels)["neighbour_label_agreement"] > 0.99


# --- Shortcuts ---


def test_collapsed_dimensions_are_counted_and_growth_is_read_from_the_record(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loc = torch.randn(500, 4) * torch.tensor([2.0, 1.0, 1.0, 0.0])
    log_scale = torch.tensor([0.019, 0.011, 0.009, 1.0]).log().expand(500, 4)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"epoch": e, "step": e, "seconds": e, "posterior/loc_std": s}) + "\n"
            for e, s in [(1, 0.2), (2, 9), (3, 0.8)]
        )
    )
    of = subject(torch.cat([loc, log_scale], 1), None, Learned(), folder=tmp_path)
    found = figures(of, Collapse)
    truth = float(loc.double().var(0, correction=0).mean().sqrt())
    assert found["collapsed_share"].value == 0.5  # 0.019 of about 2, and 0.009 of about 1
    assert found["loc_std"].value == pytest.approx(truth)
    assert found["loc_std_growth"].value == pytest.approx(4)
    assert found["largest_loc"].value == float(loc.abs().max())
    found = figures(subject(loc), Collapse)
    assert found["collapsed_share"].reason
    assert found["loc_std_growth"].reason


@pytest.mark.parametrize("ratio", [0.5, 2.0, 4.0])
def test_reidentification_of_two_overlapping_codes(ratio: float) -> None:
    """Pairs of codes at the distance d, far from all others, and noise of scale s: the error is Phi(-d / 2s)."""
    s = 0.01
    codes = torch.tensor([[100.0 * pair, side * ratio * s] for pair in range(1000) for side in (0, 1)])
    found = figures(subject(codes, None, Fixed(s)), Reidentification)
    truth = 1 - math.erfc(ratio / 2 / math.sqrt(2)) / 2
    value, error = found["reidentification"].value, found["reidentification"].error
    assert value == pytest.approx(truth, abs=4 * math.sqrt(truth * (1 - truth) / 2000))
    assert error == pytest.approx(math.sqrt(truth * (1 - truth) / 2000), rel=0.2)
    assert found["reidentification_chance"].value == 1 / 2000


def test_reidentification_uses_the_density_not_the_distance() -> None:
    """Pairs with the same loc and scales 1 and 5: the best accuracy is half the integral of the larger density."""
    grid = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    densities = torch.stack([Normal(0.0, s).log_prob(grid).exp() for s in (1.0, 5.0)])
    truth = float(torch.trapezoid(densities.amax(0), grid)) / 2
    codes = torch.tensor([[1e4 * pair, math.log(s)] for pair in range(1000) for s in (1.0, 5.0)])
    value = numbers(subject(codes, None, Learned()), Reidentification)["reidentification"]
    assert value == pytest.approx(truth, abs=4 * math.sqrt(truth * (1 - truth) / 2000))


def test_reidentification_of_a_point_mass_counts_distinct_codes() -> None:
    codes = torch.tensor([[0.0], [0.0], [0.0], [1.0], [1.0], [2.0], [3.0], [4.0]])
    found = figures(subject(codes), Reidentification)
    assert found["reidentification"].value == pytest.approx(5 / 8)
    assert "distinct" in found["reidentification"].note
    # As noise vanishes, the share tends to that of a point mass; with very large noise, it tends to chance.
    distinct = torch.arange(600.0)[:, None]
    assert numbers(subject(distinct), Reidentification)["reidentification"] == 1
    assert numbers(subject(distinct, None, Fixed(1e-3)), Reidentification)["reidentification"] == 1
    assert numbers(subject(distinct, None, Fixed(1e6)), Reidentification)["reidentification"] < 0.01


def test_the_generalization_gap_is_the_extra_cost_of_test_images() -> None:
    """Codes that decode into themselves plus noise of scale 1, under a Gaussian of scale 1: the distortion is D / 2 +
    D ln(2 pi) / 2, and the rate of a loc m is |m|^2 / 2, so the entire gap is due to the rate."""
    torch.manual_seed(0)
    train, test = torch.zeros(3000, 2), torch.full((1000, 2), 2.0)
    found = figures(subject(test, None, Fixed(1.0), train=(train, None)), Generalization)
    distortion = 1 + math.log(2 * math.pi)
    truth = {"distortion_train": distortion, "distortion_test": distortion, "distortion_gap": 0.0}
    truth |= {"elbo_train": -distortion, "elbo_test": -distortion - 4, "elbo_gap": -4.0}
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        error = found[name].error
        assert isinstance(error, float)
        assert found[name].value == pytest.approx(value, abs=4 * error)
        assert error == pytest.approx(math.sqrt((2 if name.endswith("gap") else 1) / 1000), rel=0.15)
        assert found[name].count == 1000
    found = figures(subject(test, train=(train, None)), Generalization)
    assert {name for name, figure in found.items() if figure.value is None} == {"elbo_train", "elbo_test", "elbo_gap"}


def test_probes_find_labels_only_if_codes_carry_them() -> None:
    torch.manual_seed(0)
    labels, others = torch.arange(1200) % 3, torch.arange(900) % 3
    centers = torch.eye(3) * 10
    loc = centers[labels] + torch.randn(1200, 3) * 0.1
    train = centers[others] + torch.randn(900, 3) * 0.1, others
    names = [f"{probe}_{code}" for probe in ("linear_probe", "nearest_neighbour") for code in ("loc", "z")]
    found = figures(subject(loc, labels, Fixed(0.1), train=train), Probes)
    assert {name: found[name].value for name in names} == dict.fromkeys(names, 1.0)
    # Noise far larger than the distance between clusters hides from z what loc still shows.
    found = figures(subject(loc, labels, Fixed(1000.0), train=train), Probes)
    error = math.sqrt(1 / 3 * 2 / 3 / 1200)
    for name in names:
        figure = found[name]
        if name.endswith("loc"):
            assert figure.value == 1
        else:
            assert figure.value == pytest.approx(1 / 3, abs=5 * error)
            assert figure.error == pytest.approx(error, rel=0.1)
    # Codes that do not depend on the labels.
    found = figures(subject(torch.randn(1200, 3), labels, train=(torch.randn(900, 3), others)), Probes)
    assert found["linear_probe_loc"].value == pytest.approx(1 / 3, abs=5 * error)
    assert found["nearest_neighbour_loc"].value == pytest.approx(1 / 3, abs=5 * error)
    assert found["linear_probe_z"].reason
    assert found["nearest_neighbour_z"].reason
    found = figures(subject(loc, None, Fixed(0.1)), Probes)
    assert all("labels" in figure.reason for figure in found.values())
    found = figures(subject(loc, labels, Fixed(0.1), train=(loc, torch.zeros(1200).long())), Probes)
    assert all("the same label" in figure.reason for figure in found.values())


def test_posterior_of_another_family() -> None:
    """Only the density of a posterior is used, so a heavy-tailed one works as well."""

    class Tailed(Fixed):
        def forward(self, raw: Tensor) -> Distribution:
            return Independent(torch.distributions.Laplace(raw, 0.01, validate_args=False), 1, validate_args=False)

    found = numbers(subject(torch.arange(300.0)[:, None], None, Tailed(1.0)), Reidentification)
    assert found["reidentification"] == 1


# --- All of them, of runs ---

ON_SPHERE = "power_spherical"
UNDEFINED_FOR_A_POINT_MASS = {
    *("class_change_by_noise", "class_change_from_label", "collapsed_share"),
    *("elbo_train", "elbo_test", "elbo_gap", "linear_probe_z", "nearest_neighbour_z"),
}
NEEDS_LABELS = {
    *("class_change_by_noise", "class_change_from_label", "class_change_by_step"),
    *("neighbour_label_agreement", "neighbour_label_chance"),
    *("linear_probe_loc", "linear_probe_z", "nearest_neighbour_loc", "nearest_neighbour_z"),
}


def trained(folder: Path, overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> MeasuredRun:
    monkeypatch.chdir(folder)
    train([*overrides, "epochs=2", "run_name=tiny"])
    return MeasuredRun(load_run(folder / "runs" / "tiny", device="cpu"), Budget(100, 200, 8, 20, 50, 6, 20, 100))


@pytest.mark.usefixtures("fake_net")
@pytest.mark.parametrize(
    ("overrides", "undefined"),
    [
        *((f"sigma={s}", set()) for s in catalog.groups()["sigma"].choices if s not in ("deterministic", ON_SPHERE)),
        (f"sigma={ON_SPHERE} prior=sphere", set()),
        ("sigma=deterministic", UNDEFINED_FOR_A_POINT_MASS),
        ("sigma=fixed prior=scaled_normal latent=1 likelihood=bernoulli likelihood.binarize=dynamic", set()),
        ("network=conv network.width=4 likelihood=continuous_bernoulli precision=bfloat16", set()),
        ("experiment=linear_vae dataset.images=300 dataset.test=60 dataset.validation=60", NEEDS_LABELS),
    ],
)
def test_every_figure_of_a_run_is_given_or_has_a_reason(
    overrides: str, undefined: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = trained(tmp_path, overrides.split(), monkeypatch)
    found = compute_metrics(of, METRICS)
    flat = {name: figure for each in found.values() for name, figure in each.items()}
    assert len(flat) == sum(len(each) for each in found.values()) == 33
    assert {name for name, figure in flat.items() if figure.value is None} == undefined
    for name, figure in flat.items():
        as_plain(figure)
        assert figure.count > 0 or figure.reason, name
    assert found == compute_metrics(of, METRICS)
    for kind in METRICS:
        assert compute_metrics(of, [kind])[kind.__name__] == found[kind.__name__]
